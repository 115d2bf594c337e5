"""A provider's circuit breaker: after enough failures it takes no work until the provider answers again. Pure.

Closed, it counts. Open, it waits for a pause and then wants one probe. A probe that is answered makes it half open:
work comes again, and the first outcome decides. The pause doubles with each time that it opens anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

CONSECUTIVE = 5
"""Failures in a row that open it."""
WINDOW_S = 30.0
MIN_OUTCOMES = 20
RATIO = 0.5
"""Or such a part of at least so many outcomes within the window."""
PAUSE_S = 2.0
MAX_PAUSE_S = 60.0


class State(StrEnum):
    """What it lets through."""

    CLOSED = "closed"
    OPEN = "open"
    """Nothing but a probe, when the pause is over."""
    HALF_OPEN = "half_open"
    """Everything, until the first outcome."""


@dataclass(slots=True)
class Breaker:
    """Times are monotonic seconds."""

    state: State = State.CLOSED
    reason: str = ""
    """The failure that opened it; empty while it is closed."""
    probe_at: float = 0.0
    """When it wants a probe, while it is open."""
    _row: int = 0
    _outcomes: deque[tuple[float, bool]] = field(default_factory=deque)
    """(when, whether it failed) within the window."""
    _pause_s: float = PAUSE_S

    def succeeded(self, now: float) -> None:
        """An answer came whole. One that began before it opened does not close it."""
        if self.state is State.HALF_OPEN:
            self._close()
        if self.state is State.CLOSED:
            self._row = 0
            self._count(now, failed=False)

    def failed(self, now: float, reason: str) -> None:
        """The provider failed. While it is open nothing more is learnt: these are answers that began before."""
        if self.state is State.HALF_OPEN:
            self._open(now, reason)
        elif self.state is State.CLOSED:
            self._row += 1
            self._count(now, failed=True)
            failures = sum(failed for _, failed in self._outcomes)
            total = len(self._outcomes)
            if self._row >= CONSECUTIVE or (total >= MIN_OUTCOMES and failures >= RATIO * total):
                self._open(now, reason)

    def probed(self, now: float, failure: str | None) -> None:
        """A probe was answered, or failed with `failure`."""
        if self.state is not State.OPEN:
            return
        if failure is None:
            self.state = State.HALF_OPEN
        else:
            self._open(now, failure)

    def _open(self, now: float, reason: str) -> None:
        self.state, self.reason = State.OPEN, reason
        self.probe_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self._row = 0
        self._outcomes.clear()

    def _close(self) -> None:
        self.state, self.reason = State.CLOSED, ""
        self._pause_s = PAUSE_S

    def _count(self, now: float, *, failed: bool) -> None:
        self._outcomes.append((now, failed))
        while self._outcomes and self._outcomes[0][0] <= now - WINDOW_S:
            self._outcomes.popleft()
