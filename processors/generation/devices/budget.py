"""How many bytes of a device our models may take together, held steady against small changes."""

from __future__ import annotations

from processors.generation.devices.reading import Reading

SHRINK = 0.01
"""A budget follows at once when it falls by more than this share: beyond it, models would be granted memory that
somebody else holds. What lies below is the coming and going of desktops and drivers, and the reserve covers it."""
GROW = 0.05
"""It follows upwards only by more than this share. A rise is in no hurry, and one that is taken back a second later has
by then begun a load that must be undone; a heartbeat that changes nothing also spares the scheduler a new plan."""


def budget(reading: Reading, ours: int, reserve: int, cap: int | None = None) -> int:
    """Bytes that our models may take together: what is free and what they hold, less the reserve; never negative.

    `ours` is what our own engines hold there now, so that what others hold makes it smaller and what we hold does not.
    `cap` is an operator's limit.
    """
    most = min(reading.total, reading.free + ours) - reserve
    return max(0, most if cap is None else min(most, cap))


class Steady:
    """A budget that does not flap: it keeps its last value until the measured one differs enough.

    One for each device. It may thus promise up to `SHRINK` more than was measured, which the reserve must cover, and up
    to `GROW` less.
    """

    def __init__(self) -> None:
        self._last: int | None = None

    def follow(self, measured: int) -> int:
        """The budget to report, after `measured` bytes were found."""
        last = self._last
        if last is None or measured < last * (1 - SHRINK) or measured > last * (1 + GROW):
            self._last = measured
            return measured
        return last
