"""Going on with an answer that a lost attempt began: what is left of it, and stop texts across the seam. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from processors.generation.providers.base import Done, Finish, Piece, Text

_CAPS = ("max_tokens", "max_completion_tokens")


def remaining(body: Mapping[str, Any], tokens: int) -> dict[str, Any] | None:
    """The body whose cap on the completion is what `tokens` generated ones left of it; None where they left nothing."""
    caps = {name: body[name] - tokens for name in _CAPS if isinstance(body.get(name), int)}
    return {**body, **caps} if all(left > 0 for left in caps.values()) else None


def stops_of(body: Mapping[str, Any]) -> list[str]:
    """The stop texts of a body."""
    stop = body.get("stop")
    given = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return [text for text in given if isinstance(text, str) and text]


class Seam:
    """Watches for a stop text that begins in the text so far and ends in what comes.

    The engine that goes on looks for stop texts in what it generates itself. Pieces are held back while they may still
    complete one. What the caller has seen of it stays; so does what the engine gave before a stop text of its own that
    overlaps with it.
    """

    __slots__ = ("_held", "_new", "_rests")

    def __init__(self, emitted: str, stops: Sequence[str]) -> None:
        self._rests = [
            stop[cut:] for stop in stops for cut in range(1, min(len(stop), len(emitted) + 1))
            if emitted.endswith(stop[:cut])
        ]  # fmt: skip
        self._new = ""
        self._held: list[Piece] = []

    def feed(self, batch: list[Piece]) -> list[Piece]:
        """The pieces to give on; with `Finish` and `Done` at their end, nothing after them counts."""
        if not self._rests:
            return batch
        given: list[Piece] = []
        for piece in batch:
            if self._rests and isinstance(piece, Text):
                self._new += piece.text
                self._held.append(piece)
                if any(self._new.startswith(rest) for rest in self._rests):
                    return [Finish(0, "stop"), Done(None)]
                self._rests = [rest for rest in self._rests if rest.startswith(self._new)]
                if not self._rests:
                    given += self._released()
            else:
                given += [*self._released(), piece]
                self._rests = []
        return given

    def _released(self) -> list[Piece]:
        held, self._held = self._held, []
        return held
