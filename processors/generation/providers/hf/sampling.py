"""How the next token is chosen from a model's scores, by each request's own wishes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import torch

HEAD = 1024
"""Most likely tokens that top_p looks at first; seldom more are needed, and sorting all of them costs milliseconds."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """Sampling parameters of a request, as OpenAI names them; top_k 0, top_p 1 and min_p 0 keep every token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)


class Sampler:
    """Chooses the tokens of one answer; the same seed chooses the same tokens from the same scores."""

    def __init__(self, wishes: Wishes, seed: int | None) -> None:
        self._wishes = wishes
        self._random = random.Random(seed)  # noqa: S311  (no secret hangs on it)
        self._counts: Counter[int] = Counter()

    def choose(self, scores: torch.Tensor, allowed: torch.Tensor | None = None) -> int:
        """The next token, given the scores `(vocabulary,)` in float32 and a mask of the tokens that a form allows."""
        wishes = self._wishes
        scores = self._biased(scores)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        token = int(scores.argmax()) if wishes.temperature == 0 else self._drawn(scores / wishes.temperature)
        self._counts[token] += 1
        return token

    def _biased(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores with biases and penalties, as OpenAI's API reference defines them."""
        wishes = self._wishes
        changes = dict(wishes.logit_bias)
        if wishes.presence_penalty or wishes.frequency_penalty:
            for token, count in self._counts.items():
                penalty = wishes.presence_penalty + count * wishes.frequency_penalty
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return scores
        tokens = torch.tensor(list(changes), device=scores.device)
        added = torch.tensor(list(changes.values()), dtype=scores.dtype, device=scores.device)
        return scores.index_add(0, tokens, added)

    def _drawn(self, scores: torch.Tensor) -> int:
        wishes = self._wishes
        chances = scores.softmax(-1)
        if wishes.top_p >= 1 and wishes.top_k <= 0 and wishes.min_p <= 0:
            return self._at(chances)
        kept, tokens = _likeliest(chances, wishes.top_k, wishes.top_p)
        if wishes.top_p < 1:
            kept = kept[: int((kept.cumsum(-1) - kept < wishes.top_p).sum().clamp(min=1))]
        if wishes.min_p > 0:
            kept = kept[: int((kept >= wishes.min_p * kept[0]).sum())]
        return int(tokens[self._at(kept)])

    def _at(self, chances: torch.Tensor) -> int:
        """A place, drawn by its chance."""
        sums = chances.cumsum(-1, dtype=torch.float64)
        place = int(torch.searchsorted(sums, self._random.random() * float(sums[-1]), right=True))
        return min(place, len(chances) - 1)


def _likeliest(chances: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Chances in falling order with their tokens: as many as top_k allows, or as top_p surely needs."""
    size = len(chances)
    first = min(size, top_k if top_k > 0 else HEAD)
    kept, tokens = chances.topk(first)
    if top_k > 0 or first == size or float(kept.sum()) >= top_p:
        return kept, tokens
    kept, tokens = chances.sort(descending=True)
    return kept, tokens


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Log probabilities of a chosen token and of the likeliest ones, before any wish changed them."""

    chosen: float
    top: list[tuple[int, float]]


def likelihood(scores: torch.Tensor, token: int, top: int) -> Likelihood:
    """What `logprobs` and `top_logprobs` tell of a token."""
    logs = scores.log_softmax(-1)
    values, tokens = logs.topk(top) if top else (logs[:0], logs[:0])
    best = [(int(one), float(value)) for one, value in zip(tokens, values, strict=True)]
    return Likelihood(float(logs[token]), best)
