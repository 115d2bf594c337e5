"""Which records answer direct publishers, from their frames and their terminals: pure, one partition number at a time.

The log decides how a request ended; frames only tell its answer earlier, piece by piece. A result is given when the
chunks before it are, and what is not given yet can be made again from Kafka: `needed` says from which offsets on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from headrace.published_answers import Answer, Chunks, result
from schemas.events import Terminal
from schemas.ids import PublicId
from topics.catalogue import published_partition
from topics.frames import Delta, Kind, Opened, StreamView

LATE_MS = 5_000
"""How long a result waits for chunks that should stand before it, once all frames that there are have been read."""

_opened = msgspec.json.Decoder(Opened)


class Told(NamedTuple):
    """A record for an app."""

    app: str
    answer: Answer
    last: Terminal | None = None
    """The terminal, where this is the result."""
    missed: bool = False
    """Whether chunks are missing before it."""


@dataclass(slots=True)
class _Stream:
    """A request whose chunks are wanted."""

    app: str
    chunks: Chunks
    view: StreamView
    offset: int
    """Of the frame that opened it."""


@dataclass(slots=True)
class _Held:
    """A terminal whose chunks are not all there."""

    terminal: Terminal
    offset: int
    """Its place in the log."""
    late_ms: int


class Delivery:
    """The requests of one partition number of `inference.log` and of `inference.published`."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._held: dict[str, _Held] = {}

    def frame(self, delta: Delta, offset: int, *, decided: bool) -> list[Told]:
        """Take a frame; `decided` says whether the log is known to hold its request's terminal.

        Raises `msgspec.MsgspecError` on an opening that is none.
        """
        request_id = delta.rid.hex()
        if delta.kind == Kind.OPENED:
            if request_id not in self._streams and (not decided or request_id in self._held):
                opened = _opened.decode(delta.data)
                public = PublicId(request_id, published_partition(request_id), opened.created_ms)
                chunks = Chunks(public, opened.model)
                self._streams[request_id] = _Stream(opened.tenant, chunks, StreamView(), offset)
            return []
        stream = self._streams.get(request_id)
        if stream is None or delta.kind == Kind.TERMINAL or not stream.view.accept(delta):
            return []
        return [Told(stream.app, stream.chunks.of(delta)), *self._settle(request_id)]

    def ended(self, terminal: Terminal, offset: int, now_ms: int) -> list[Told]:
        """Take a request's deciding terminal, from `offset` of the log."""
        if not terminal.stream or terminal.last_seq == 0:
            return [self._end(terminal)]
        self._held[terminal.request_id] = _Held(terminal, offset, now_ms + LATE_MS)
        return self._settle(terminal.request_id)

    def _settle(self, request_id: str) -> list[Told]:
        held, stream = self._held.get(request_id), self._streams.get(request_id)
        if held is None or stream is None or stream.view.seq < held.terminal.last_seq:
            return []
        return [self._end(held.terminal)]

    def late(self, now_ms: int, *, caught_up: bool) -> list[Told]:
        """Results whose missing chunks do not come; `caught_up` says whether all frames that there are were read."""
        if not caught_up:
            for held in self._held.values():
                held.late_ms = max(held.late_ms, now_ms + LATE_MS)
            return []
        return [self._end(held.terminal, missed=True) for held in list(self._held.values()) if now_ms > held.late_ms]

    def _end(self, terminal: Terminal, *, missed: bool = False) -> Told:
        self._held.pop(terminal.request_id, None)
        self._streams.pop(terminal.request_id, None)
        return Told(terminal.tenant, result(terminal), terminal, missed)

    def needed(self, log_next: int, frames_next: int) -> tuple[int, int]:
        """The offsets of log and frames from which a successor must read, given those that come next here."""
        log = min((held.offset for held in self._held.values()), default=log_next)
        frames = min((stream.offset for stream in self._streams.values()), default=frames_next)
        return min(log, log_next), min(frames, frames_next)
