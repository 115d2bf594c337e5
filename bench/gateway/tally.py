"""What the upstream saw, by request id: tries, tokens sent, and how each try ended (`GET /stats`).

Fault tests read it to see that a cancellation reached the engine and that nothing was generated twice.
"""

from __future__ import annotations

import time

import msgspec

KEPT_IDS = 100_000
"""Ids kept before the oldest are forgotten; totals are never forgotten."""
KEPT_TRIES = 32
"""First tries kept of one id; `requests` and `tokens` count all of them."""

RUNNING = "running"


class Try(msgspec.Struct, kw_only=True):
    """One request as it arrived. Times are CLOCK_MONOTONIC nanoseconds."""

    number: int
    received_ns: int
    tokens: int = 0
    """Tokens of each choice written to the socket so far."""
    outcome: str = RUNNING
    """running | hanging | finished | disconnected | died | refused | failed:<status>."""
    ended_ns: int | None = None
    body: str | None = None
    """The request body as it arrived, when its spec says `keep_body`."""


class Entry(msgspec.Struct, kw_only=True):
    """All tries that carried one id."""

    requests: int = 0
    tokens: int = 0
    disconnects: int = 0
    tries: list[Try] = []


class Stats(msgspec.Struct, kw_only=True):
    """Totals since start or reset, and the entry of each id. The answer of `GET /stats`."""

    requests: int = 0
    active: int = 0
    finished: int = 0
    disconnects: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    """User and system time of the upstream's process since it started."""
    ids: dict[str, Entry] = msgspec.field(default_factory=dict)

    def begin(self, request_id: str, now: int) -> Try:
        """Count a request that arrived at `now`; requests without an id are in the totals only."""
        self.requests += 1
        self.active += 1
        if not request_id:
            return Try(number=1, received_ns=now)
        entry = self.ids.get(request_id)
        if entry is None:
            if len(self.ids) >= KEPT_IDS:
                del self.ids[next(iter(self.ids))]
            entry = self.ids[request_id] = Entry()
        entry.requests += 1
        attempt = Try(number=entry.requests, received_ns=now)
        if len(entry.tries) < KEPT_TRIES:
            entry.tries.append(attempt)
        return attempt

    def end(self, request_id: str, attempt: Try, outcome: str, now: int) -> None:
        """Close a try; a second close of the same try changes nothing."""
        if attempt.ended_ns is not None:
            return
        attempt.outcome = outcome
        attempt.ended_ns = now
        self.active -= 1
        self.tokens += attempt.tokens
        self.finished += outcome == "finished"
        self.disconnects += outcome == "disconnected"
        entry = self.ids.get(request_id)
        if entry is not None:
            entry.tokens += attempt.tokens
            entry.disconnects += outcome == "disconnected"

    def render(self, only: str | None = None) -> bytes:
        """JSON of everything, or with the entry of one id only (absent when it was never seen)."""
        shown = (
            self
            if only is None
            else msgspec.structs.replace(self, ids={only: self.ids[only]} if only in self.ids else {})
        )
        shown.cpu_seconds = time.process_time()
        return msgspec.json.encode(shown)
