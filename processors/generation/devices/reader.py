"""Reads all devices without ever holding up the event loop, however long a driver takes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from processors.generation.devices import host
from processors.generation.devices.nvml import Nvml
from processors.generation.devices.reading import Reading
from processors.generation.devices.single import Single

PATIENCE_S = 0.5
"""How long a reading may take before the previous one is reported as stale: below the heartbeat's second."""


class Devices:
    """The memory of this machine: its GPUs and its RAM. For one event loop."""

    def __init__(self, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.nvml = Nvml(clock, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._patience_s = patience_s
        self._gpus: Single[list[Reading]] = Single("gpus")
        self._ram: Single[Reading] = Single("ram")

    @property
    def complete(self) -> bool:
        """Whether the GPUs have answered once; until then nobody knows which there are."""
        return self._gpus.last is not None

    async def read(self, pids: Collection[int] = ()) -> list[Reading]:
        """Read every device: the GPUs in NVML's order, then RAM with what the processes `pids` hold of it.

        Takes `patience_s` seconds at most. What has not answered by then is reported as it was last, marked stale, or
        left out when it never answered. Raises `OSError` where the kernel's files on memory cannot be read.
        """
        asked = tuple(pids)
        gpus, ram = await asyncio.gather(
            self._gpus.latest(self.nvml.read, self._patience_s),
            self._ram.latest(lambda: host.read(asked), self._patience_s),
        )
        readings = [] if gpus is None else _marked(*gpus)
        return readings if ram is None else [*readings, *_marked([ram[0]], ram[1])]


def _marked(readings: list[Reading], fresh: bool) -> list[Reading]:
    return readings if fresh else [replace(one, stale=True) for one in readings]
