"""Plays the GPUs and their driver: writes the file that the fake `libnvidia-ml.so.1` answers from.

A process sees these GPUs when it is started with the variables of `FakeNvml.env`; nothing else is needed.

The file has a line for each fact, fields separated by blanks:

    driver VERSION
    init CODE              what starting NVML answers; 0 is success
    hang 0|1               calls do not return while it is 1
    restarts N             each restart of the driver ends every session
    gpu UUID TOTAL FREE BUSY LISTS LOST LIFE NAME
    process UUID C|G PID BYTES

BUSY is a percentage, -1 where it is not supported; LISTS is 0 where processes cannot be listed; LOST is the code that
every call for this GPU answers, or 0; LIFE changes when it falls off the bus and when it comes back, so that sessions
that are older than that do not find it; a TOTAL of 0 is a GPU without memory of its own; BYTES of 2^64 - 1 are
"not available".
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

GPU_IS_LOST = 15
_SOURCE = Path(__file__).with_name("fake_nvml.c")
_UNKNOWN = 2**64 - 1


@dataclass
class Listing:
    """A process in a GPU's list; None bytes are "not available"."""

    pid: int
    bytes: int | None
    kind: str = "C"


@dataclass
class FakeGpu:
    """One GPU; change what you like, then `save`. Sizes are bytes."""

    uuid: str
    name: str
    total: int
    free: int
    busy: int | None = 0
    lists: bool = True
    lost: int = 0
    life: int = 0
    processes: list[Listing] = field(default_factory=list)

    def take(self, pid: int, size: int) -> None:
        """A process takes memory."""
        self.free -= size
        self.processes.append(Listing(pid, size))

    def give_back(self, pid: int) -> None:
        """A process's memory is free again, which may be long after its death."""
        self.free += sum(one.bytes or 0 for one in self.processes if one.pid == pid)
        self.processes = [one for one in self.processes if one.pid != pid]

    def fall_off_the_bus(self) -> None:
        """Every call for this GPU fails from now on."""
        self.lost = GPU_IS_LOST
        self.life += 1

    def come_back(self) -> None:
        """It is there again, for sessions that start from now on."""
        self.lost = 0
        self.life += 1


class FakeNvml:
    """The fake library, built in `directory`, and the state that it shows. Change its fields, then `save`."""

    def __init__(self, directory: Path) -> None:
        self.gpus: list[FakeGpu] = []
        self.driver = "575.57.08"
        self.init = 0
        self.hang = False
        self.restarts = 0
        self._state = directory / "state"
        self.env = {"LD_LIBRARY_PATH": str(build(directory)), "FAKE_NVML_STATE": str(self._state)}
        """What to add to a process's environment so that it sees these GPUs."""
        self.save()

    def add(self, total: int, name: str = "NVIDIA Fake 24GB") -> FakeGpu:
        """Plug in a GPU that is free as a whole. It is seen after `save`, by sessions that start then."""
        gpu = FakeGpu(f"GPU-{len(self.gpus):08x}-aaaa-bbbb-cccc-dddddddddddd", name, total, total)
        self.gpus.append(gpu)
        return gpu

    def save(self) -> None:
        """Put everything into force at once, for each call from now on."""
        lines = [f"driver {self.driver}", f"init {self.init}", f"hang {self.hang:d}", f"restarts {self.restarts}"]
        for gpu in self.gpus:
            busy = -1 if gpu.busy is None else gpu.busy
            facts = (gpu.uuid, gpu.total, gpu.free, busy, int(gpu.lists), gpu.lost, gpu.life, gpu.name)
            lines.append("gpu " + " ".join(map(str, facts)))
            for one in gpu.processes:
                size = _UNKNOWN if one.bytes is None else one.bytes
                lines.append(f"process {gpu.uuid} {one.kind} {one.pid} {size}")
        fresh = self._state.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n")
        fresh.replace(self._state)


def build(directory: Path) -> Path:
    """Compile the fake library into `directory`; skips the test where there is no C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the fake libnvidia-ml.so.1 with")
    library = directory / "libnvidia-ml.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([compiler, *flags, "-o", str(library), str(_SOURCE)], check=True)
    return directory
