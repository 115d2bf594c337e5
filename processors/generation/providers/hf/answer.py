"""One answer in the making: its tokens, how the next is chosen, and what of its text may be sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from processors.generation.providers.hf.forms import Form, FormError
from processors.generation.providers.hf.sampling import Likelihood, Sampler, likelihood
from processors.generation.providers.hf.text import Decode, Detokenizer, Stops


@dataclass(frozen=True, slots=True)
class Event:
    """What a step made of an answer."""

    token: int
    text: str
    likelihood: Likelihood | None = None
    reason: str | None = None
    """Why the answer ended: `stop` or `length`; None while it goes on."""
    error: str | None = None
    """Why it failed."""


class Answer:
    """Prompt and answer of one choice. Touched by the engine's thread alone, but for `cancelled`."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        room: int,
        sampler: Sampler,
        ends: frozenset[int],
        decode: Decode,
        stops: Sequence[str] = (),
        form: Form | None = None,
        top_logprobs: int | None = None,
        adapter: str = "",
    ) -> None:
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.computed = 0
        self.adapter = adapter
        self.cancelled = False
        self.ended = False
        self._room = room
        self._sampler = sampler
        self._ends = ends
        self._text = Detokenizer(decode)
        self._stops = Stops(stops)
        self._form = form
        self._top_logprobs = top_logprobs
        """How many likeliest tokens are told; None for no log probabilities at all."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.tokens)

    @property
    def completion_tokens(self) -> int:
        """Tokens that were generated, the one that ends the answer included."""
        return len(self.tokens) - self.prompt_tokens

    def take(self, scores: torch.Tensor) -> Event:
        """Choose the next token from the scores `(vocabulary,)` behind the last one."""
        try:
            token = self._sampler.choose(scores, self._form.allowed() if self._form is not None else None)
            if self._form is not None and token not in self._ends:
                self._form.take(token)
        except FormError as problem:
            self.ended = True
            return Event(0, "", error=f"the form of the answer cannot be kept: {problem}")
        told = likelihood(scores, token, self._top_logprobs) if self._top_logprobs is not None else None
        self.tokens.append(token)
        if token in self._ends:
            return self._end(token, self._rest(), told, "stop")
        text, stopped = self._stops.add(self._text.add(token))
        if stopped:
            return self._end(token, text, told, "stop")
        if self._form is not None and self._form.complete:
            return self._end(token, text + self._rest(), told, "stop")
        if self.completion_tokens >= self._room:
            return self._end(token, text + self._rest(), told, "length")
        return Event(token, text, told)

    def _rest(self) -> str:
        """What was held back: it can no longer become a character, or a stop text."""
        text, stopped = self._stops.add(self._text.rest())
        return text if stopped else text + self._stops.rest()

    def _end(self, token: int, text: str, told: Likelihood | None, reason: str) -> Event:
        self.ended = True
        return Event(token, text, told, reason)
