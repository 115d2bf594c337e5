"""Kafka, Valkey and ClickHouse of a stack: how each is started, and where it is found."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from deploy.embedded import aot, java, probes, valkey
from deploy.embedded.child import GIVES_WAY, ChildSpec
from deploy.embedded.kafka import Kafka
from deploy.embedded.ports import PortBook
from deploy.embedded.supervisor import Supervisor

_PART_SECONDS = 60.0
_NAMES = ("clickhouse", "valkey", "kafka")


class StartFailed(Exception):
    """The stack cannot start; the text says why and what to do."""


class Infrastructure:
    """The three parts that roles need; each start returns when the part answers, or raises StartFailed."""

    def __init__(self, data: Path, book: PortBook, supervisor: Supervisor, report: Callable[[str], None]) -> None:
        self._data = data
        self._supervisor = supervisor
        self._report = report
        self._ports = {name: book.port(name) for name in ("kafka", "kafka-controller", "valkey", "clickhouse")}
        book.save()
        # Loopback is open to everyone on the machine, and to web pages; Kafka's protocol at least is not HTTP.
        self._valkey_password = secrets.token_urlsafe(24)
        self._clickhouse_password = secrets.token_urlsafe(24)
        self.kafka_bootstrap = f"127.0.0.1:{self._ports['kafka']}"
        self.redis_url = f"redis://:{self._valkey_password}@127.0.0.1:{self._ports['valkey']}/0"
        self.clickhouse_url = f"http://default:{self._clickhouse_password}@127.0.0.1:{self._ports['clickhouse']}"

    async def start_kafka(self) -> None:
        """Fetch what is missing, format on the first start, run the broker."""
        jars = java.cached_jars()
        if not jars:
            self._report(f"fetching Apache Kafka {java.KAFKA_VERSION} from Maven Central (once, 44 MB)")
            await self._supervisor.run_once(ChildSpec("kafka-fetch", (sys.executable, "-m", "deploy.embedded.java")))
            jars = java.cached_jars()
        try:
            runtime = java.java()
        except java.JavaError as error:
            raise StartFailed(str(error)) from error
        kafka = Kafka(self._data, self._ports["kafka"], self._ports["kafka-controller"])
        flags = aot.flags(runtime)
        if to_format := kafka.format_spec(runtime, jars, *flags):
            await self._supervisor.run_once(to_format)
            kafka.formatted()
        self._supervisor.start(kafka.spec(runtime, jars, *flags))
        await self._answers("kafka", partial(probes.kafka_answers, self.kafka_bootstrap))

    async def start_valkey(self) -> None:
        """Run Valkey."""
        self._supervisor.start(valkey.prepare(self._data, self._ports["valkey"], self._valkey_password))
        await self._answers("valkey", partial(probes.valkey_answers, self.redis_url))

    async def start_clickhouse(self) -> None:
        """Run ClickHouse's engine behind its HTTP protocol."""
        module = ("-m", "deploy.embedded.clickhouse_server")
        where = ("--data", str(self._data / "clickhouse"), "--port", str(self._ports["clickhouse"]))
        secret = {"HEADRACE_CLICKHOUSE_PASSWORD": self._clickhouse_password, "MALLOC_ARENA_MAX": "2"}
        # Its merges take every core for a moment, and tokens must not wait for analytics.
        self._supervisor.start(ChildSpec("clickhouse", (sys.executable, *module, *where), env=secret, nice=GIVES_WAY))
        ping = f"http://127.0.0.1:{self._ports['clickhouse']}/ping"
        await self._answers("clickhouse", partial(probes.http_answers, ping))

    async def stop(self) -> None:
        """Stop all three."""
        await self._supervisor.stop(_NAMES)

    async def _answers(self, name: str, probe: Callable[[], Awaitable[bool]]) -> None:
        if not await probes.until(probe, _PART_SECONDS):
            raise StartFailed(
                f"{name} does not answer after {_PART_SECONDS:.0f} s: see {self._data / 'logs' / name}.log"
            )
        self._report(f"{name} answers")
