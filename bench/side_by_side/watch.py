"""Watches a server's processes: how many engines it started, what they have resident, and the CPU that they use."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import psutil

from bench.side_by_side.figures import Machine

PERIOD_S = 0.1
"""An engine lives for longer."""
MARKS = ("llama_child", "runner")
"""Words in the command line of an engine: Headrace's child of llama.cpp, Ollama's runner."""
IDLE_CORES = 0.05
"""CPU that engines use while nobody asks them."""
IDLE_FOR_S = 0.5
BUSY_AT_MOST_S = 20.0


class Watch:
    """Watches the trees under some processes while a block runs; `machine` holds the result after it."""

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = roots
        self._engines: set[tuple[int, float]] = set()
        """Process id and start of every engine seen."""
        self._before = 0
        self._stop = threading.Event()
        self.machine = Machine(loads=0, engines_peak=0, all_peak=0)

    def __enter__(self) -> Self:
        self._look()
        self._before = len(self._engines)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._look()

    def _look(self) -> None:
        engines = everything = 0
        for process in tree(self._roots):
            try:
                key, resident = (process.pid, process.create_time()), process.memory_info().rss
                # A child that is not yet what it is to be still has its parent's command line: only a yes is kept.
                if key not in self._engines and is_engine(process.cmdline()):
                    self._engines.add(key)
            except psutil.Error:
                continue
            everything += resident
            engines += resident * (key in self._engines)
        found = self.machine
        found.engines_peak, found.all_peak = max(found.engines_peak, engines), max(found.all_peak, everything)
        found.loads = len(self._engines) - self._before


def tree(roots: Sequence[int]) -> list[psutil.Process]:
    """The processes with these ids, and all below them."""
    found: list[psutil.Process] = []
    for root in roots:
        try:
            process = psutil.Process(root)
            found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return found


def is_engine(command: Sequence[str]) -> bool:
    """Whether a command line is that of an engine."""
    return any(mark in word for word in command for mark in MARKS)


def engines_cpu(roots: Sequence[int]) -> float:
    """CPU seconds that the engines of these trees have used so far."""
    total = 0.0
    for process in tree(roots):
        try:
            if is_engine(process.cmdline()):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue
    return total


def busy_after(roots: Sequence[int]) -> float:
    """CPU seconds that the engines use from now until they do nothing for `IDLE_FOR_S`."""
    begin = last = engines_cpu(roots)
    deadline, pause = time.monotonic() + BUSY_AT_MOST_S, threading.Event()
    while time.monotonic() < deadline:
        pause.wait(IDLE_FOR_S)
        now = engines_cpu(roots)
        if now - last < IDLE_CORES * IDLE_FOR_S:
            return last - begin
        last = now
    return last - begin
