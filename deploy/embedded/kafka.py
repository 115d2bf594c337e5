"""Apache Kafka as one small broker of its own (KRaft, loopback only) in a stack's data directory."""

from __future__ import annotations

import base64
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.embedded.child import ChildSpec

MAX_MESSAGE = 18 * 1024 * 1024
"""Bytes of the largest record batch: a 16 MiB result, its headers, and the wrap of a dead letter."""

_LOG_DIR, _FRESH_DIR = "log", "log.fresh"
_SETTINGS, _FORMAT_SETTINGS = "server.properties", "format.properties"

_JVM = (
    "-Xms64m",
    "-Xmx320m",
    "-Xmn32m",
    "-Xss512k",
    "-XX:+UseSerialGC",
    "-XX:-UsePerfData",
    "-XX:MaxDirectMemorySize=96m",
    "-Djdk.nio.maxCachedBufferSize=262144",
    "-Djava.awt.headless=true",
    "-Dfile.encoding=UTF-8",
)
"""Small: about 190 MB resident. Without a limit on cached buffers each I/O thread keeps one as large as the largest
record."""

_LOG4J = """\
status=WARN
shutdownHook=disable
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d{ISO8601} %-5p %c{1} %m%n
logger.config.name=org.apache.kafka.common.config
logger.config.level=WARN
rootLogger.level=INFO
rootLogger.appenderRef.out.ref=out
"""
"""The broker logs to its standard output, which the supervisor keeps and bounds as it does for every child."""


PROXIED = "HEADRACE_KAFKA_PROXIED"
"""Environment variable `PORT:ADVERTISED`: one more listener on loopback at PORT, whose clients are told to come to
ADVERTISED, where a proxy stands that forwards to PORT. It is for cutting a part off from Kafka, and for looking at what
goes over the wire."""


def proxied_properties(port: int, advertised: int, listeners: str, advertised_listeners: str) -> dict[str, str]:
    """What such a listener adds to, or changes in, the broker's settings."""
    return {
        "listeners": f"{listeners},PROXIED://127.0.0.1:{port}",
        "advertised.listeners": f"{advertised_listeners},PROXIED://127.0.0.1:{advertised}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
    }


def broker_properties(log_dir: str, port: int, controller_port: int) -> dict[str, str]:
    """The broker's settings; `log_dir` is a name in its working directory, since Kafka splits paths at commas.

    The quorum is a fixed list, not the kind kept in the log: that would keep the controller's first port for ever.
    """
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "log.dir": log_dir,
        "auto.create.topics.enable": "false",
        # One node: nothing to replicate to.
        "default.replication.factor": "1",
        "min.insync.replicas": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "5",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "5",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "5",
        # A stack that was off for a month still knows what it had read.
        "offsets.retention.minutes": "5256000",
        # Groups settle and recover fast.
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
        # A killed broker may not register again before its old session has ended (9 s by default).
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "1000",
        # Sizes: one large record must pass, many at once must not fill the heap.
        "message.max.bytes": str(MAX_MESSAGE),
        "replica.fetch.max.bytes": str(MAX_MESSAGE + 1024 * 1024),
        "replica.fetch.response.max.bytes": str(MAX_MESSAGE + 1024 * 1024),
        "socket.request.max.bytes": str(2 * MAX_MESSAGE + 4 * 1024 * 1024),
        "queued.max.request.bytes": str(64 * 1024 * 1024),
        "log.segment.bytes": str(256 * 1024 * 1024),
        "log.index.size.max.bytes": str(2 * 1024 * 1024),
        "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
        "log.cleaner.io.buffer.size": str(256 * 1024),
        "log.retention.check.interval.ms": "60000",
        # Few threads, few timers.
        "num.network.threads": "2",
        "num.io.threads": "4",
        "background.threads": "2",
        "num.recovery.threads.per.data.dir": "2",
        "log.cleaner.threads": "1",
        "metadata.max.idle.interval.ms": "0",
    }


def render_properties(properties: Mapping[str, str]) -> str:
    """A Java properties file, of values without backslashes."""
    return "".join(f"{name}={value}\n" for name, value in properties.items())


class Kafka:
    """The files of one broker under the data directory, and how to run it."""

    def __init__(self, data: Path, port: int, controller_port: int) -> None:
        self._home = data / "kafka"
        self._ports = (port, controller_port)

    def format_spec(self, java: Path, jars: Sequence[Path], *flags: str) -> ChildSpec | None:
        """Write the settings, and say how to format the log directory; None when that was done at an earlier start.

        It is formatted beside its place, so that a start that was cut short leaves no half of one.
        """
        self._home.mkdir(parents=True, exist_ok=True)
        (self._home / "log4j2.properties").write_text(_LOG4J)
        self._write(_SETTINGS, _LOG_DIR)
        if (self._home / _LOG_DIR).exists():
            return None
        shutil.rmtree(self._home / _FRESH_DIR, ignore_errors=True)
        self._write(_FORMAT_SETTINGS, _FRESH_DIR)
        cluster = _cluster_id()
        tool = ("kafka.tools.StorageTool", "format", "-t", cluster, "-c", _FORMAT_SETTINGS)
        return ChildSpec("kafka-format", (*java_command(java, jars, *flags), *tool), cwd=self._home)

    def formatted(self) -> None:
        """Put the freshly formatted directory in its place."""
        (self._home / _FRESH_DIR).rename(self._home / _LOG_DIR)

    def spec(self, java: Path, jars: Sequence[Path], *flags: str) -> ChildSpec:
        """How to run the broker; `flags` are for the JVM."""
        argv = (*java_command(java, jars, *flags), "kafka.Kafka", _SETTINGS)
        # glibc keeps a heap for each of 80 threads otherwise.
        return ChildSpec("kafka", argv, env={"MALLOC_ARENA_MAX": "2"}, stop_seconds=20.0, cwd=self._home)

    def _write(self, name: str, log_dir: str) -> None:
        properties = broker_properties(log_dir, *self._ports)
        if proxied := os.environ.get(PROXIED):
            own, advertised = map(int, proxied.split(":"))
            properties |= proxied_properties(
                own, advertised, properties["listeners"], properties["advertised.listeners"]
            )
        (self._home / name).write_text(render_properties(properties))


def _cluster_id() -> str:
    """A random id in Kafka's form. None begins with a dash, which the tool would take for an option."""
    while True:
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not cluster.startswith("-"):
            return cluster


def live_shortly() -> None:
    """Have the brokers that this process starts do without the optimizing compiler, unless its environment has options.

    For those that live for minutes: with it a broker takes 10 s of CPU in place of 5 until a whole stack is ready, and
    goes on for minutes; in the long run that compiler saves it a third.
    """
    os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")


def java_command(java: Path, jars: Sequence[Path], *flags: str) -> tuple[str, ...]:
    """The JVM with the settings of a small broker and Kafka's class path; the main class is to follow."""
    classpath = ":".join(str(jar) for jar in jars)
    return (str(java), *_JVM, *flags, "-Dlog4j2.configurationFile=log4j2.properties", "-cp", classpath)
