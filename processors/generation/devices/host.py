"""The machine's RAM as a device: what this process may use of it, and what given processes hold."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from processors.generation.devices.cgroups import FILES, Limit, limit, memory_groups
from processors.generation.devices.reading import RAM, Reading


@dataclass(frozen=True, slots=True)
class Machine:
    """Physical memory, and what of it could be taken without swapping, in bytes."""

    total: int
    free: int


def machine(meminfo: str) -> Machine:
    """What `/proc/meminfo` says. Its `MemAvailable` counts file cache as free, also the model files that engines map;
    those are in use, and so all that is mapped is taken off."""
    lines = (line.partition(":") for line in meminfo.splitlines())
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in lines}
    return Machine(sizes["MemTotal"], max(0, sizes["MemAvailable"] - sizes.get("Mapped", 0)))


def ram(machine: Machine, limits: Iterable[Limit], processes: Mapping[int, int | None]) -> Reading:
    """RAM as this process may use it: the tightest of the machine and of every control group above the process.

    A group's siblings count: free is the least that any level has left.
    """
    limits = list(limits)
    total = min([machine.total, *(one.bytes for one in limits)])
    free = min([total, machine.free, *(max(0, one.bytes - one.used) for one in limits)])
    return Reading(RAM, "ram", "RAM", total, total - free, free, processes)


def read(pids: Collection[int] = ()) -> Reading:
    """Read the RAM now, with what these processes hold. It takes a few file reads, and one of each process's children.

    Held is the resident set of a process and of all its children. A mapped model file counts in it as far as it is in
    memory, and counts again in each process that maps it, as it does in the leases of two engines on one file. PSS
    would split such pages, but it makes the kernel walk every page of tens of gigabytes.
    """
    return ram(_machine(), _limits(), {pid: resident(pid) for pid in pids})


def resident(pid: int) -> int | None:
    """Resident bytes of a process and all its children; 0 when it is gone or a zombie, None when it may not be read."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
        return sum(_resident(process) for process in family)
    except psutil.NoSuchProcess:
        return 0
    except psutil.AccessDenied:
        return None


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _machine() -> Machine:
    if sys.platform != "linux":
        memory = psutil.virtual_memory()
        return Machine(memory.total, memory.available)
    return machine(Path("/proc/meminfo").read_text())


def _limits() -> list[Limit]:
    if sys.platform != "linux":
        return []
    own = Path("/proc/self")
    groups = memory_groups((own / "cgroup").read_text(), (own / "mountinfo").read_text())
    found = (limit(group.version, _files(Path(group.directory), group.version)) for group in groups)
    return [one for one in found if one is not None]


def _files(directory: Path, version: int) -> dict[str, str]:
    """The group's files. A group without the memory controller, or one that is being removed, lacks some."""
    texts: dict[str, str] = {}
    for name in FILES[version]:
        try:
            texts[name] = (directory / name).read_text()
        except OSError:
            continue
    return texts
