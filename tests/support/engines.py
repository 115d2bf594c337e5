"""The engine processes of a stack's workers, and how any process is stopped in the middle of what it does."""

from __future__ import annotations

from collections.abc import Iterable

import psutil

from tests.support.waiting import until


def engines(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of the processes that are a llama.cpp child."""
    found = []
    for process in processes:
        try:
            if "llama_child" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


async def freeze(process: psutil.Process) -> None:
    """SIGSTOP; returns once no thread of it runs any more: the signal is sent long before that."""
    process.suspend()

    def stands() -> bool:
        return all(psutil.Process(thread.id).status() == psutil.STATUS_STOPPED for thread in process.threads())

    await until(stands, f"process {process.pid} has stopped", 5)
