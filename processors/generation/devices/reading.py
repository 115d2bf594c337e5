"""What was read of one device's memory, and what given processes hold of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

RAM = "ram"
"""Id of the machine's memory as a device."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One device at one moment. Sizes are bytes; `used + free == total`."""

    id: str
    """The GPU's UUID as NVML has it, stable across restarts and the order of slots; or `ram`."""
    kind: Literal["gpu", "ram"]
    name: str
    total: int
    used: int
    free: int
    processes: Mapping[int, int | None] | None
    """Bytes by process id; None bytes where the driver does not say how many, None in all where it lists nobody.

    A GPU lists every process on it, by ids as the driver counts them. RAM has those that were asked for, each with its
    children; 0 says that the process was looked for and is gone.
    """
    index: int | None = None
    """The GPU's place in NVML's order, which a reboot may change."""
    utilisation: float | None = None
    """Share of the last moments in which the GPU computed, 0 to 1; None where the driver does not tell."""
    stale: bool = False
    """The device did not answer in time, and this is what it said before."""


def held(reading: Reading, pids: Collection[int]) -> int | None:
    """Bytes that these processes hold on the device; None where the driver does not say."""
    if reading.processes is None:
        return None
    total = 0
    for pid in set(pids) & reading.processes.keys():
        size = reading.processes[pid]
        if size is None:
            return None
        total += size
    return total
