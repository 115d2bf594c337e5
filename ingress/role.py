"""The ingress's process: uvicorn around the application, and a drain that lets open streams end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import structlog
import uvicorn

from headrace.settings import Settings
from ingress.app import DirectSend, make_app
from ingress.services import Services

log = structlog.get_logger(__name__)

KEEP_ALIVE_S = 75
BACKLOG = 2048
BREAK_OFF_S = 2.0


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the role's process has them."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """The role's life. Raises what a reader of Kafka raised, or `RuntimeError` when the port cannot be bound."""
    services = Services(settings)
    await services.start()
    proxies = settings.trusted_proxies
    config = uvicorn.Config(
        DirectSend(make_app(services)),
        host=settings.host,
        port=settings.port,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies or None,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_timeout) + 5,
        backlog=BACKLOG,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve())
    stopping = asyncio.create_task(stop.wait())
    ends: set[asyncio.Future[Any]] = {serving, stopping, services.failed}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if services.failed.done():
            services.failed.result()
        if not stop.is_set():
            serving.result()
            raise RuntimeError(f"cannot serve on {settings.host}:{settings.port}")
        await _drain(services, server, settings.drain_timeout)
    finally:
        stopping.cancel()
        server.should_exit = True
        services.stopping.set()
        await asyncio.gather(serving, stopping, return_exceptions=True)
        await services.stop()


async def _drain(services: Services, server: uvicorn.Server, timeout_s: float) -> None:
    """Take no new connections, let answers end for `timeout_s`, then end the rest and say how to resume them."""
    server.should_exit = True
    services.stopping.set()
    await _answered(server, timeout_s)
    services.drain()
    await _answered(server, BREAK_OFF_S)


async def _answered(server: uvicorn.Server, timeout_s: float) -> None:
    tasks = set(server.server_state.tasks)
    if tasks:
        await asyncio.wait(tasks, timeout=timeout_s)
