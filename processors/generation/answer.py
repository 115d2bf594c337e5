"""The answer that grows as pieces arrive: frames on the one side, the whole choices for the log on the other."""

from __future__ import annotations

import msgspec

from processors.generation.providers.base import Choices, Done, Finish, Piece, Text
from schemas.events import Usage
from topics import frames
from topics.fold import Fold


class Answer:
    """Folds a provider's pieces; gives the frames to send for each.

    It may go on from what earlier attempts had `emitted`: a text of `tokens` tokens, told in frames up to `after_seq`.
    """

    __slots__ = ("_emitted_tokens", "_fold", "attempt", "done", "rid", "seq", "tokens")

    def __init__(self, request_id: str, attempt: int, after_seq: int, emitted: str = "", tokens: int = 0) -> None:
        self.rid = bytes.fromhex(request_id)
        self.attempt = attempt
        self.seq = after_seq
        self.tokens = tokens
        """Completion tokens so far, of all attempts."""
        self.done: Done | None = None
        self._emitted_tokens = tokens
        self._fold = Fold()
        if emitted:
            self._fold.text(0, emitted)

    def add(self, piece: Piece) -> frames.Delta | None:
        """Take a piece; returns the frame that tells of it, None for the end."""
        if isinstance(piece, Text):
            self._fold.text(piece.index, piece.text)
            self.tokens += piece.tokens
            return self._delta(frames.Kind.TEXT, piece.index, piece.text, piece.tokens)
        if isinstance(piece, Finish):
            self._fold.finish(piece.index, piece.reason)
            return self._delta(frames.Kind.FINISH, piece.index, piece.reason, 0)
        if isinstance(piece, Choices):
            self._fold.raw(piece.json)
            self.tokens += piece.tokens
            return self._delta(frames.Kind.CHOICES, 0, piece.json.decode(), piece.tokens)
        self.done = piece
        return None

    def go_on(self) -> str:
        """Another engine goes on from here: the text so far, which counts as emitted."""
        self._emitted_tokens = self.tokens
        return self._fold.content()

    def recount(self, tokens: int) -> None:
        """What was emitted has `tokens` tokens at least: a piece can hold several, as parts of one letter do."""
        more = max(0, tokens - self._emitted_tokens)
        self.tokens += more
        self._emitted_tokens += more

    def only_text(self) -> str:
        """The answer so far, where it is one text and nothing else; else empty."""
        return self._fold.only_text()

    def _delta(self, kind: frames.Kind, index: int, data: str, tokens: int) -> frames.Delta:
        self.seq += 1
        return frames.Delta(self.rid, self.attempt, self.seq, kind, index, data, tokens)

    @property
    def plain(self) -> bool:
        """Whether it is nothing but text, which another attempt could go on from."""
        return self._fold.plain

    @property
    def finished(self) -> bool:
        """Whether a choice has its finish reason."""
        return self._fold.finished > 0

    @property
    def started(self) -> bool:
        """Whether anything was generated."""
        return bool(self._fold)

    def choices(self) -> msgspec.Raw:
        """The answer so far as OpenAI's `choices`; `NOTHING` when there is none."""
        return self._fold.choices()

    def usage(self, prompt_tokens: int) -> Usage:
        """What the provider reported; else the pieces counted, and `prompt_tokens`, marked as estimated.

        An attempt that goes on bills the caller's prompt once: what its provider took for prompt holds the text so far.
        `prompt_tokens` of 0 takes that text's tokens off what the provider reported.
        """
        said = self.done.usage if self.done is not None else None
        if said is None:
            return Usage(prompt_tokens=prompt_tokens, completion_tokens=self.tokens, estimated=True)
        emitted = self._emitted_tokens
        if not emitted:
            return said
        prompt = prompt_tokens or max(0, said.prompt_tokens - emitted)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=emitted + said.completion_tokens,
            cached_tokens=min(said.cached_tokens, prompt),
            reasoning_tokens=said.reasoning_tokens,
            estimated=True,
        )
