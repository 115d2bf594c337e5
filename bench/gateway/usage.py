"""CPU and memory of a process tree, as a whole and by role."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath
from types import TracebackType
from typing import Self

import msgspec
import psutil

PERIOD = 0.5
"""Seconds between two looks at the tree; what a process uses between its last look and its end is not seen."""
MIB = 1024 * 1024


class Usage(msgspec.Struct, kw_only=True):
    """What a process tree used over a time. Memory is MiB."""

    seconds: float
    cpu_seconds: float
    cpu_by_role: dict[str, float]
    rss_peak: float
    """Highest sum of resident sizes; pages that processes share count in each of them."""
    rss_by_role: dict[str, float]
    """Resident sizes at the end."""
    pss: float | None = None
    """Sum of proportional sizes at the end, shared pages counted once; None where the system does not tell."""


class StolenTime:
    """How much of all cores' time a hypervisor gave to other machines while a block ran; `share` holds it after."""

    def __enter__(self) -> Self:
        self.share = 0.0
        self._began = time.monotonic()
        self._before = _stolen_seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        capacity = (time.monotonic() - self._began) * (psutil.cpu_count() or 1)
        self.share = round((_stolen_seconds() - self._before) / capacity, 4) if capacity else 0.0


def _stolen_seconds() -> float:
    """Since the machine's start, over all cores; 0 where the system does not tell."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def role_of(command: Sequence[str]) -> str:
    """A short name for what a command line runs: Headrace's role, the store behind it, or the program's own name."""
    for at, word in enumerate(command):
        if PurePath(word).name in ("headrace", "headrace.cli"):
            rest = [argument for argument in command[at + 1 :] if not argument.startswith("-")]
            return rest[1] if len(rest) > 1 and rest[0] == "run" else "supervisor"
    text = " ".join(command).lower()
    for mark, role in (("kafka.kafka", "kafka"), ("valkey", "redis"), ("redis-server", "redis")):
        if mark in text:
            return role
    if "chdb" in text or "clickhouse" in text:
        return "clickhouse"
    return PurePath(command[0]).name if command else "unknown"


class Meter:
    """Watches the trees under some process ids from a thread while a block runs; `usage` holds the result after it."""

    def __init__(self, roots: Sequence[int], *, settle: float = 1.0) -> None:
        self._roots = roots
        self._settle = settle
        self._stop = threading.Event()
        self._first: dict[tuple[int, float], float] = {}
        self._last: dict[tuple[int, float], float] = {}
        self._roles: dict[tuple[int, float], str] = {}
        self._peak = 0.0
        self.usage: Usage | None = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._look(first=True)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._stop.wait(self._settle)
        self._stop.set()
        self._thread.join()
        processes = self._look()
        self.usage = self._summary(processes)

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD):
            self._look()

    def _tree(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for root in self._roots:
            try:
                process = psutil.Process(root)
                found += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found

    def _look(self, *, first: bool = False) -> list[psutil.Process]:
        """Note CPU time and memory of every process; one that is new since the start has used all of its CPU in it."""
        processes = self._tree()
        resident = 0.0
        for process in processes:
            try:
                with process.oneshot():
                    key = (process.pid, process.create_time())
                    times = process.cpu_times()
                    resident += process.memory_info().rss
                    if key not in self._roles:
                        self._roles[key] = role_of(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            self._last[key] = times.user + times.system
            self._first.setdefault(key, self._last[key] if first else 0.0)
        self._peak = max(self._peak, resident)
        return processes

    def _summary(self, processes: Sequence[psutil.Process]) -> Usage:
        cpu: dict[str, float] = defaultdict(float)
        for key, last in self._last.items():
            cpu[self._roles[key]] += last - self._first[key]
        seconds = time.monotonic() - self._started
        resident: dict[str, float] = defaultdict(float)
        proportional: float | None = 0.0
        for process in processes:
            try:
                key = (process.pid, process.create_time())
                resident[self._roles[key]] += process.memory_info().rss / MIB
                if proportional is not None:
                    proportional += process.memory_full_info().pss / MIB
            except psutil.NoSuchProcess:
                continue
            except (psutil.AccessDenied, AttributeError):
                proportional = None
        return Usage(
            seconds=round(seconds, 2),
            cpu_seconds=round(sum(cpu.values()), 3),
            cpu_by_role={role: round(value, 3) for role, value in sorted(cpu.items(), key=lambda item: -item[1])},
            rss_peak=round(self._peak / MIB, 1),
            rss_by_role={role: round(value, 1) for role, value in sorted(resident.items(), key=lambda item: -item[1])},
            pss=None if proportional is None else round(proportional, 1),
        )
