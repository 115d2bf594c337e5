"""A role's process: settings, logging, signals, the parent watch and metrics, around the role's own `run`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import signal

import structlog
import uvloop
from pydantic import ValidationError

from headrace import logs
from headrace.cancellation import end
from headrace.parent import watch_parent
from headrace.production import faults
from headrace.settings import NoIngressSecret, Settings, settings
from headrace.telemetry import serve_metrics
from topics.catalogue import CATALOGUE, worker_commands
from topics.ready import wait_for_topics

log = structlog.get_logger(__name__)

ROLES: dict[str, str] = {
    "ingress": "ingress.role",
    "router": "processors.router.role",
    "scheduler": "processors.scheduler.role",
    "worker": "processors.generation.role",
    "metering": "processors.metering.role",
    "answers": "processors.answers.role",
    "sink": "processors.sink.role",
    "control": "processors.control.role",
}
"""Role -> module with `async def run(settings, stop) -> None`, which returns after `stop` is set and raises to die."""

SEALED = ("ingress", "router", "control")
"""Roles that write or read the seals of requests."""


def run_role(role: str) -> int:
    """Run a role until a signal; returns the exit code of the process: 0 after a wish to stop, 1 after a failure."""
    try:
        conf = settings()
    except ValidationError as error:
        for problem in error.errors():
            if not problem["loc"]:  # Not of one variable; its input would be all of them, with passwords.
                print(problem["msg"].removeprefix("Value error, "), flush=True)
                continue
            name = "HEADRACE_" + "_".join(str(part) for part in problem["loc"]).upper()
            print(f"{name}: {problem['msg']} (got {problem['input']!r})", flush=True)
        return 2
    if refused := faults(conf, role):
        print("\n".join(refused), flush=True)
        return 2
    if role in SEALED:
        try:
            conf.seals  # noqa: B018 - said now, not after the brokers were waited for
        except NoIngressSecret as error:
            print(error, flush=True)
            return 2
    logs.configure(conf, role)
    with contextlib.suppress(KeyboardInterrupt):
        return uvloop.run(_run(role, conf))
    return 130


async def _topics_are_there(role: str, conf: Settings, stop: asyncio.Event) -> bool:
    """Wait for the brokers and the catalogue's topics; False when the wish to stop came first."""
    topics = [*CATALOGUE, *([worker_commands(conf.worker_id)] if role == "worker" else [])]
    waiting = asyncio.create_task(wait_for_topics(conf.kafka, topics))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
    there = waiting.done()
    await end(waiting, stopping)
    if there:
        waiting.result()
    return there and not stop.is_set()


async def _run(role: str, conf: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    watch_parent()
    module = importlib.import_module(ROLES[role])
    metrics = asyncio.create_task(serve_metrics(conf, role))
    # Modules live for ever, and requests leave no circles: full collections would only add pauses to streams, and so
    # would one of very many young objects.
    gc.freeze()
    gc.set_threshold(5_000, 100, 100)
    gc.enable()
    log.info("role_started", pid=os.getpid())
    try:
        if await _topics_are_there(role, conf, stop):
            await module.run(conf, stop)
    except Exception as error:
        log.error("role_failed", error=repr(error), exc_info=error)
        return 1
    finally:
        await end(metrics)
    log.info("role_stopped")
    return 0
