"""A role's process: settings, logging, signals, the parent watch and metrics, around the role's own `run`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal

import structlog
import uvloop
from pydantic import ValidationError

from headrace import logs
from headrace.parent import watch_parent
from headrace.settings import Settings, settings
from headrace.telemetry import serve_metrics

log = structlog.get_logger(__name__)

ROLES: dict[str, str] = {
    "ingress": "ingress.role",
    "router": "processors.router.role",
    "scheduler": "processors.scheduler.role",
    "worker": "processors.generation.role",
    "metering": "processors.metering.role",
    "sink": "processors.sink.role",
    "control": "processors.control.role",
}
"""Role -> module with `async def run(settings, stop) -> None`, which returns after `stop` is set and raises to die."""


def run_role(role: str) -> int:
    """Run a role until a signal; returns the exit code of the process: 0 after a wish to stop, 1 after a failure."""
    try:
        conf = settings()
    except ValidationError as error:
        for problem in error.errors():
            name = "HEADRACE_" + "_".join(str(part) for part in problem["loc"]).upper()
            print(f"{name}: {problem['msg']} (got {problem['input']!r})", flush=True)
        return 2
    logs.configure(conf, role)
    with contextlib.suppress(KeyboardInterrupt):
        return uvloop.run(_run(role, conf))
    return 130


async def _run(role: str, conf: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    watch_parent()
    module = importlib.import_module(ROLES[role])
    metrics = asyncio.create_task(serve_metrics(conf, role))
    log.info("role_started", pid=os.getpid())
    try:
        await module.run(conf, stop)
    except Exception as error:
        log.error("role_failed", error=repr(error), exc_info=error)
        return 1
    finally:
        metrics.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await metrics
    log.info("role_stopped")
    return 0
