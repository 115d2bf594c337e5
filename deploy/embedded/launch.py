"""One stack from nothing to ready and back: everything starts at once and waits for what it needs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.embedded import leftovers, probes, roles, stack
from deploy.embedded.infra import Infrastructure, StartFailed
from deploy.embedded.keys import admin_key, jwt_secret, make_ingress_secret
from deploy.embedded.ports import PortBook, is_free
from deploy.embedded.supervisor import OneShotFailed, Supervisor
from headrace import __version__

_READY_SECONDS = 180.0
_TELL_EVERY_SECONDS = 15.0
STOPPING = (signal.SIGTERM, signal.SIGINT)
"""Signals on which a stack stops in order."""


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What `headrace up` was asked for."""

    data_dir: Path
    host: str
    port: int
    """Of the first ingress; 0 takes a free one."""
    config: Path | None
    replicas: Mapping[str, int]
    """Processes of each role; empty runs Kafka, Valkey and ClickHouse alone, as tests of one role want them."""
    admin_key: str | None
    drain_seconds: float
    jwt_secret: str | None = None
    """What access tokens are signed with; None takes the one that the data directory keeps."""


def serve(options: StackOptions, *, ready: Callable[[str], None], report: Callable[[str], None]) -> int:
    """Run a stack until SIGTERM or SIGINT and return 0; `ready` gets the ingress' URL, `report` lines for a person.

    Raises StartFailed, stack.StackRunning.
    """
    data = options.data_dir.resolve()
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    (data / "logs").mkdir(exist_ok=True)
    with stack.StackLock(data):
        leftovers.end(stack.left_behind(data), report)
        if options.port and not is_free(options.host, options.port):
            raise StartFailed(
                f"port {options.port} of {options.host} is in use by another program: stop it, or pass another --port"
            )
        # A Ctrl-C before the stack handles it would end whatever is being set up in the middle: it waits until then.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            return asyncio.run(_Stack(replace(options, data_dir=data), ready, report).run())
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            stack.remove(data)


async def _all_or_first_error(*work: Coroutine[None, None, None]) -> None:
    """Run all at once; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Stack:
    def __init__(self, options: StackOptions, ready: Callable[[str], None], report: Callable[[str], None]) -> None:
        self._options = options
        self._announce = ready
        self._tell = report
        self._data = options.data_dir
        self._logs = options.data_dir / "logs"
        self._began = time.monotonic()
        self._signals = 0
        self._stop = asyncio.Event()
        self._admin_key, made = admin_key(self._data, options.admin_key)
        if made:
            report(f"admin key (shown once, kept in {self._data / 'admin.key'}): {self._admin_key}")
        make_ingress_secret(self._data)
        book = PortBook(self._data / "ports.json")
        first = options.port or book.port("ingress-1", options.host)
        more = range(2, options.replicas.get("ingress", 1) + 1)
        self._ingress_ports = [first, *(book.port(f"ingress-{index}", options.host) for index in more)]
        book.save()
        self._supervisor = Supervisor(self._logs, self._record, self._report)
        self._parts = Infrastructure(self._data, book, self._supervisor, self._report)
        self._endpoints = self._locate()

    async def run(self) -> int:
        """Start, wait for a signal, stop."""
        loop = asyncio.get_running_loop()
        for number in STOPPING:
            loop.add_signal_handler(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        self._supervisor.open()
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await stopping
            return 0
        except OneShotFailed as error:
            raise StartFailed(str(error)) from error
        finally:
            for task in (starting, stopping):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, StartFailed, OneShotFailed):
                    await task
            await self._shut_down()

    async def _start(self) -> None:
        """Everything at once: what needs another part waits for it by itself, so that no core idles."""
        await _all_or_first_error(self._parts.start_kafka(), self._parts.start_clickhouse(), self._start_roles())
        self._endpoints = replace(self._endpoints, ready=True)
        self._record()
        self._announce(self._endpoints.url)

    async def _start_roles(self) -> None:
        if not self._options.replicas:
            await self._parts.start_valkey()
            return
        await _all_or_first_error(self._parts.start_valkey(), self._supervisor.open_nursery())
        environment = self._environment()
        for role in roles.START_ORDER:
            for index in range(1, self._options.replicas[role] + 1):
                own = {"HEADRACE_PORT": str(self._ingress_ports[index - 1])} if role == "ingress" else {}
                if role == "worker":
                    own = roles.memory_shares(self._options.replicas[role])
                self._supervisor.start(
                    roles.role_spec(role, index, {**environment, **own}, self._options.drain_seconds)
                )
        await _all_or_first_error(self._prepare(), self._wait_ready())

    async def _prepare(self) -> None:
        workers = self._options.replicas["worker"]
        await self._supervisor.run_once(roles.prepare_spec(self._environment(), workers))
        self._report("topics, tables and configuration are in force")

    async def _wait_ready(self) -> None:
        telling = asyncio.create_task(self._tell_what_is_missing())
        found = probes.Health()
        try:
            for url in self._endpoints.ingress_urls:
                found = await self._health_of(url)
        finally:
            telling.cancel()
        for model, why in found.failed.items():
            self._report(f"model {model} is not served: {why} (it is tried again; logs are in {self._logs})")
        for part, why in found.waiting_for.items():
            self._report(f"{part} is not there yet: {why} (logs are in {self._logs})")

    async def _health_of(self, url: str) -> probes.Health:
        """How an ingress stands once nothing is on its way any more, or, if it serves, after a while."""
        found = probes.Health()

        async def complete() -> bool:
            nonlocal found
            found = await probes.health(url)
            return found.complete

        if not await probes.until(complete, _READY_SECONDS, pause=0.1) and not found.ready:
            raise StartFailed(f"{url}/health/ready is not 200 after {_READY_SECONDS:.0f} s: see {self._logs}")
        return found

    async def _tell_what_is_missing(self) -> None:
        """What the first ingress waits for, when the start takes long."""
        while True:
            await asyncio.sleep(_TELL_EVERY_SECONDS)
            found = await probes.health(self._endpoints.url)
            missing = found.waiting_for | {f"model {model}": why for model, why in found.failed.items()}
            if missing:
                reasons = "; ".join(f"{part}: {why}" for part, why in missing.items())
                self._report(f"waiting for {reasons} (logs are in {self._logs})")

    async def _shut_down(self) -> None:
        for role in roles.STOP_ORDER:
            await self._supervisor.stop(
                f"{role}-{index}" for index in range(1, self._options.replicas.get(role, 0) + 1)
            )
        await self._parts.stop()
        await self._supervisor.close()
        self._report("stopped")

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals == 1:
            self._report("stopping: running work may finish; once more to stop now")
        else:
            self._supervisor.hurry()

    def _locate(self) -> stack.Endpoints:
        shown = "127.0.0.1" if self._options.host in ("0.0.0.0", "::", "") else self._options.host
        shown = f"[{shown}]" if ":" in shown else shown
        urls = [f"http://{shown}:{port}" for port in self._ingress_ports]
        return stack.Endpoints(
            pid=os.getpid(),
            version=__version__,
            started_at=time.time(),
            data_dir=str(self._data),
            url=urls[0],
            host=self._options.host,
            port=self._ingress_ports[0],
            ingress_urls=urls,
            kafka_bootstrap=self._parts.kafka_bootstrap,
            redis_url=self._parts.redis_url,
            clickhouse_url=self._parts.clickhouse_url,
        )

    def _environment(self) -> dict[str, str]:
        own = {"HEADRACE_ADMIN_KEY": self._admin_key, "HEADRACE_HOST": self._options.host}
        own["HEADRACE_OPEN_PARTS"] = "kafka"  # The broker listens on the loopback address alone.
        own["HEADRACE_JWT_SECRET"] = self._options.jwt_secret or jwt_secret(self._data)
        if self._options.config:
            own["HEADRACE_CONFIG"] = str(self._options.config.resolve())
        return {**self._endpoints.environment(), **own}

    def _record(self) -> None:
        stack.write(replace(self._endpoints, children=self._supervisor.records()))

    def _report(self, line: str) -> None:
        self._tell(f"{time.monotonic() - self._began:5.1f} s  {line}")
