"""A timer wheel: one timer of the event loop serves any number of streams.

Thousands of `call_later` handles cost a heap operation and an allocation a token; here a token costs one list append,
and all that is due in a tick is written in one wake of the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

TICK_NS = 1_000_000
"""Width of a slot in nanoseconds: how late a timer may fire at most on an idle loop, and the finest that libuv has."""


class Due(Protocol):
    """Something that the wheel can wake."""

    def fire(self, now: int) -> int:
        """Do what is due at `now` (CLOCK_MONOTONIC, nanoseconds); return when to be woken next, or 0 for never."""


class Wheel:
    """Wakes its entries at their times, many in one tick. Costs nothing while it is empty."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._loop = loop
        self._clock = clock
        self._slots: dict[int, list[Due]] = {}
        self._last = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, entry: Due, due: int) -> None:
        """Wake `entry` at `due` (CLOCK_MONOTONIC, nanoseconds), rounded up to a tick."""
        if self._timer is None:
            self._last = self._clock() // TICK_NS
            self._timer = self._loop.call_later(TICK_NS / 1e9, self.tick)
        slot = max(-(-due // TICK_NS), self._last + 1)
        entries = self._slots.get(slot)
        if entries is None:
            self._slots[slot] = [entry]
        else:
            entries.append(entry)

    def tick(self) -> None:
        """Fire every entry whose slot has come, then arm the timer again if any entry is left."""
        current = self._clock() // TICK_NS
        slots, clock = self._slots, self._clock
        try:
            for slot in range(self._last + 1, current + 1):
                entries = slots.pop(slot, None)
                self._last = slot
                if entries is None:
                    continue
                for entry in entries:
                    again = entry.fire(clock())
                    if again:
                        self.add(entry, again)
        finally:
            self._timer = self._loop.call_later(TICK_NS / 1e9, self.tick) if slots else None
