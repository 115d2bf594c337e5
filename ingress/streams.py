"""One caller's stream inside the ingress: a bounded buffer between the reply reader and the caller's connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from topics.frames import Delta, Kind, StreamView

MERGE_BYTES = 64 * 1024
"""With more than this waiting, neighbouring text deltas are joined."""
DROP_BYTES = 1024 * 1024
"""With more than this waiting after joining, the caller is dropped; it may resume."""
OVERHEAD_BYTES = 64
"""What a waiting delta costs beside its data."""


class Stream:
    """Deltas of one request on their way to one caller. Not thread-safe; all on one loop."""

    __slots__ = (
        "_drained",
        "_loop",
        "_merge_at",
        "_size",
        "_waiter",
        "_waiting_since",
        "abort",
        "dropped",
        "model",
        "moved",
        "pending",
        "rid",
        "view",
        "writing_since",
    )

    def __init__(self, rid: bytes, view: StreamView | None = None) -> None:
        self.rid = rid
        self.view = view if view is not None else StreamView()
        self.pending: list[Delta] = []
        self.dropped = False
        """Whether the caller read too slowly; nothing more is buffered."""
        self.moved: str | None = None
        """JSON of `frames.Moved`, when this request's frames are on another partition."""
        self.model = ""
        """Id of the model that serves, as soon as the router has told it; it tells where that is not the one named."""
        self.writing_since = 0.0
        """Loop time since when a write to the caller waits; 0 while none does."""
        self.abort: Callable[[], None] = lambda: None
        """Cuts the caller's connection."""
        self._size = 0
        self._merge_at = MERGE_BYTES
        self._waiter: asyncio.Future[None] | None = None
        self._waiting_since = 0.0
        self._drained: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    def push(self, delta: Delta) -> None:
        """Take a delta from the reply reader. Never blocks: a slow caller delays nobody else."""
        if delta.kind == Kind.MOVED:
            self.moved = delta.data
            self.wake()
            return
        if delta.kind == Kind.MODEL:
            self.model = delta.data
            return
        if self.dropped or not self.view.accept(delta):
            return
        self.pending.append(delta)
        self._size += len(delta.data) + OVERHEAD_BYTES
        if self._size > self._merge_at and delta.kind != Kind.TERMINAL:
            self._merge()
        self.wake()

    def _merge(self) -> None:
        self.pending = merged(self.pending)
        self._size = sum(len(kept.data) + OVERHEAD_BYTES for kept in self.pending)
        # Twice as much before the next time, so that joining costs no more than what is joined.
        self._merge_at = min(max(MERGE_BYTES, 2 * self._size), DROP_BYTES)
        if self._size > DROP_BYTES:
            self.dropped = True
            self.pending = []

    def wake(self) -> None:
        """Let `take` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def look(self, now: float, silence_s: float, write_timeout_s: float) -> None:
        """Let `take` return when it has waited for `silence_s`; cut a caller that a write waits for too long.

        One sweep over all streams costs less than timers for each token.
        """
        if self.writing_since and (self.dropped or now - self.writing_since > write_timeout_s):
            self.dropped = True
            self.abort()
        if self._waiter is not None and now - self._waiting_since >= silence_s:
            self.wake()

    async def take(self) -> list[Delta]:
        """All deltas that wait, as soon as there are any; an empty list after a wake or a drop."""
        if not self.pending and not self.dropped and self.moved is None:
            self._waiter = self._loop.create_future()
            self._waiting_since = self._loop.time()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken = self.pending
        self.clear()
        return taken

    def clear(self) -> None:
        """Let nothing wait."""
        self.pending = []
        self._size = 0
        self._merge_at = MERGE_BYTES
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    async def room(self) -> None:
        """Return when little waits: for whoever feeds this stream alone, from a past that may be long."""
        while self._size > MERGE_BYTES and not self.dropped:
            drained = self._drained = self._loop.create_future()
            try:
                await drained
            finally:
                if self._drained is drained:
                    self._drained = None


def merged(deltas: list[Delta]) -> list[Delta]:
    """Neighbouring text deltas of one attempt and choice joined into one, which has the last one's `seq`."""
    joined: list[Delta] = []
    parts: list[str] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.kind == delta.kind == Kind.TEXT
            and (last.attempt, last.index) == (delta.attempt, delta.index)
        ):
            parts.append(delta.data)
            joined[-1] = Delta(
                delta.rid, delta.attempt, delta.seq, Kind.TEXT, delta.index, "", last.tokens + delta.tokens
            )
            continue
        if parts:
            joined[-1].data = "".join(parts)
        parts = [delta.data] if delta.kind == Kind.TEXT else []
        joined.append(delta)
    if parts:
        joined[-1].data = "".join(parts)
    return joined
