"""Memory limits of the control groups that a process is in: from the kernel's text files to numbers. No I/O.

The formats are those of proc(5), and of cgroup-v1/memory.rst and cgroup-v2.rst in the kernel's documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

FILES: Mapping[int, tuple[str, ...]] = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
    2: ("memory.max", "memory.high", "memory.current", "memory.stat"),
}
"""What to read in a group's directory, by the version of its hierarchy."""
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Group:
    """A control group's directory, in a hierarchy of version 1 or 2."""

    directory: PurePosixPath
    version: int


@dataclass(frozen=True, slots=True)
class Limit:
    """A group's limit, and what counts towards it and cannot be dropped, in bytes."""

    bytes: int
    used: int


def memory_groups(membership: str, mounts: str) -> list[Group]:
    """The groups that may limit a process's memory, each with all its ancestors that can be seen.

    `membership` is the text of `/proc/PID/cgroup` and `mounts` that of `/proc/PID/mountinfo`. Both hierarchies may be
    mounted at once; files that a group lacks say which one controls memory.
    """
    paths: dict[int, str] = {}
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    groups: list[Group] = []
    for line in mounts.splitlines():
        mount, _, source = line.partition(" - ")
        root, point = (_unescaped(field) for field in mount.split()[3:5])
        kind, _, options = source.split(" ", 2)
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "memory" in options.split(",") else 0
        if version in paths:
            groups += [Group(directory, version) for directory in _upwards(paths[version], root, PurePosixPath(point))]
    return groups


def limit(version: int, files: Mapping[str, str]) -> Limit | None:
    """What a group's files say; None where it has no limit. Files that it lacks are left out of `files`.

    `memory.high` counts as a limit like `memory.max`: above it a group is slowed down until it is of no use. File
    cache that nobody maps, on the list that the kernel drops first, is not counted as used. A model file that an
    engine maps lies in that cache too, and is in use.
    """
    names, usage, prefix = FILES[version][:-2], FILES[version][-2], "total_" if version == 1 else ""
    said = [int(files[name]) for name in names if files.get(name, "max").strip() != "max"]
    if not said or usage not in files:
        return None
    lines = (line.partition(" ") for line in files.get("memory.stat", "").splitlines())
    stat = {key: int(value) for key, _, value in lines}
    inactive, active = (stat.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))
    mapped = stat.get("total_mapped_file" if version == 1 else "file_mapped", 0)
    droppable = max(0, min(inactive, inactive + active - mapped))
    return Limit(min(said), max(0, int(files[usage]) - droppable))


def _upwards(path: str, root: str, point: PurePosixPath) -> list[PurePosixPath]:
    """Directories from a process's group up to the mount point; the point alone when the group lies outside of it."""
    try:
        inside = PurePosixPath(path).relative_to(root)
    except ValueError:
        return [point]
    if ".." in inside.parts:
        return [point]
    directory = point / inside
    return [directory, *(parent for parent in directory.parents if parent.is_relative_to(point))]


def _unescaped(field: str) -> str:
    return _ESCAPED.sub(lambda code: chr(int(code[1], 8)), field)
