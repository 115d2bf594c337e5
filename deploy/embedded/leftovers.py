"""Children of a stack that ended without order, where the kernel did not end them with it (no Linux)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil

from deploy.embedded.stack import Endpoints

_CLOCK_SLACK = 5.0
"""Seconds by which a process' start may differ from the record; a process id used again starts later."""


def end(record: Endpoints | None, report: Callable[[str], None]) -> None:
    """Kill what the record of a dead stack names and still runs."""
    for name, child in (record.children if record else {}).items():
        if child.pid is None:
            continue
        try:
            process = psutil.Process(child.pid)
            if abs(process.create_time() - child.started_at) > _CLOCK_SLACK:
                continue
            report(f"{name} (process {child.pid}) was left behind by an earlier stack and is ended")
            os.killpg(child.pid, signal.SIGKILL)
            process.wait(10)
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
