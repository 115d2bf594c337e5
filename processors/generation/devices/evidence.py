"""Whether memory that an engine held is free: decided on what devices show, never on a promise.

Silence is no proof. A device that fell off its bus, one that did not answer in time and a driver that lists no
processes all leave the answer at "still held".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from processors.generation.devices.reading import Reading

GIVEN_BACK = 0.9
"""Share of the bytes by which free memory must have risen; the rest allows for what others took meanwhile."""


def find(readings: Iterable[Reading], device: str) -> Reading | None:
    """What was read of a device just now; None when it is not there or its reading is an old one."""
    return next((one for one in readings if one.id == device and not one.stale), None)


def lists(readings: Iterable[Reading], device: str, pids: Collection[int]) -> bool:
    """Whether the device shows one of these processes by its id, or did when it last answered."""
    reading = next((one for one in readings if one.id == device), None)
    return reading is not None and reading.processes is not None and not reading.processes.keys().isdisjoint(pids)


def still_holding(readings: Iterable[Reading], device: str, pids: Collection[int], *, listed: bool) -> bool:
    """Whether these processes may still hold memory of the device; False only on evidence.

    RAM was given back when every process was looked for and is gone. A GPU's memory can outlive its process, so that
    the process must be gone from NVML's list. `listed` is whether that list ever showed them (`lists`, while they ran):
    in a container it may hold the host's process ids, and then it never shows ours and its silence proves nothing
    (use `given_back`).
    """
    reading = find(readings, device)
    if reading is None or reading.processes is None:
        return True
    if reading.kind == "ram":
        return any(reading.processes.get(pid) != 0 for pid in pids)
    return not listed or not reading.processes.keys().isdisjoint(pids)


def given_back(before: Reading, readings: Iterable[Reading], held: int) -> bool:
    """Whether the device's free memory rose by about `held` bytes since `before`, which was read just before an engine
    was stopped: the evidence where process ids say nothing, and a weaker one.

    `held` is the sum of all that we are giving back there, else the first engine's bytes would prove the second's.
    Whoever else takes memory meanwhile hides the rise; whoever gives some back can feign it.
    """
    reading = find(readings, before.id)
    return reading is not None and reading.free - before.free >= held * GIVEN_BACK
