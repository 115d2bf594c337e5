"""From tokens to text that may be sent: whole characters only, and nothing of a stop text. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet one."""


class Detokenizer:
    """Text of a growing list of tokens.

    A token is decoded together with those before it, since decoders join tokens (a space at a word's beginning, the
    bytes of one character). The method is that of text-generation-inference and vLLM.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._shown_from = 0
        """First token of the text that was decoded last."""
        self._read_to = 0
        """Tokens whose text has been given out."""

    def add(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        self._tokens.append(token)
        return self._take(held=True)

    def rest(self) -> str:
        """What is left at the end, bytes that never became a character included."""
        return self._take(held=False)

    def _take(self, *, held: bool) -> str:
        before = self._decode(self._tokens[self._shown_from : self._read_to])
        now = self._decode(self._tokens[self._shown_from :])
        if len(now) <= len(before) or (held and now.endswith(REPLACEMENT)):
            return ""
        self._shown_from, self._read_to = self._read_to, len(self._tokens)
        return now[len(before) :]


class Stops:
    """Holds text back for as long as it may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Text that may be sent, and whether a stop text has come; what is behind it is dropped."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            sent, self._held = self._held[: min(found)], ""
            return sent, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent, False

    def rest(self) -> str:
        """What was held back, at the end of an answer that no stop text ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
