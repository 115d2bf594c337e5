"""The embedded stack's real parts: they start, keep their data, come back after a kill, and never outlive the stack."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import clickhouse_connect
import psutil
import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from deploy.embedded import probes, stack
from headrace.doctor import examine

LARGE = 16 * 1024 * 1024
"""Bytes of the largest result."""


class Stack:
    """Kafka, Valkey and ClickHouse on a data directory, as `python -m deploy.embedded` runs them."""

    def __init__(self, data: Path) -> None:
        self.data = data
        argv = [sys.executable, "-m", "deploy.embedded", "--data-dir", str(data)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.env: dict[str, str] = json.loads(line)
        self.bootstrap = self.env["HEADRACE_KAFKA_BOOTSTRAP"]

    def child(self, name: str) -> int:
        found = stack.discover(self.data)
        assert found is not None
        pid = found.children[name].pid
        return pid or 0

    def restarts(self, name: str) -> int:
        found = stack.discover(self.data)
        assert found is not None
        return found.children[name].restarts

    def pids(self) -> list[int]:
        return [process.pid for process in psutil.Process(self.process.pid).children(recursive=True)]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        _, self.errors = self.process.communicate(timeout=60)
        return self.process.returncode


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that happens in another process."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def producer(bootstrap: str) -> AsyncIterator[AIOKafkaProducer]:
    client = AIOKafkaProducer(
        bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, max_request_size=LARGE + 1024 * 1024
    )
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def create_topic(bootstrap: str, name: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()


async def read_all(bootstrap: str, topic: str, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", max_partition_fetch_bytes=LARGE * 2
    )
    await consumer.start()
    try:
        async with asyncio.timeout(30):
            return [(await consumer.getone()).value for _ in range(count)]
    finally:
        await consumer.stop()


def clickhouse(env: dict[str, str]) -> clickhouse_connect.driver.Client:
    return clickhouse_connect.get_client(dsn=env["HEADRACE_CLICKHOUSE_URL"])


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Stack]:
    started = Stack(tmp_path / "data, one")
    yield started
    if started.process.poll() is None:
        assert started.stop() == 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One for the tests that change nothing."""
    started = Stack(tmp_path_factory.mktemp("shared"))
    yield started
    assert started.stop() == 0


async def test_every_part_works_and_keeps_its_data_over_kills_and_new_ports(running: Stack) -> None:
    await create_topic(running.bootstrap, "kept")
    async with producer(running.bootstrap) as client:
        await client.send_and_wait("kept", b"x" * LARGE)
        for number in range(20):
            await client.send_and_wait("kept", str(number).encode())
    expected = [b"x" * LARGE, *(str(number).encode() for number in range(20))]
    assert await read_all(running.bootstrap, "kept", 21) == expected
    redis.Redis.from_url(running.env["HEADRACE_REDIS_URL"]).set("kept", "yes")
    table = clickhouse(running.env)
    table.command("CREATE TABLE kept (a UInt64) ENGINE = MergeTree ORDER BY a")
    table.insert("kept", [[1], [2]], column_names=["a"])

    # Each part is killed: the supervisor starts it again, at the same place.
    for name in ("kafka", "valkey", "clickhouse"):
        killed = running.child(name)
        os.kill(killed, signal.SIGKILL)
        await until(lambda name=name, killed=killed: running.child(name) not in (0, killed))
        assert running.restarts(name) == 1
    assert await probes.until(lambda: probes.kafka_answers(running.bootstrap), 30)
    assert await probes.until(lambda: probes.valkey_answers(running.env["HEADRACE_REDIS_URL"]), 30)
    ping = f"http://{running.env['HEADRACE_CLICKHOUSE_URL'].rpartition('@')[2]}/ping"
    assert await probes.until(lambda: probes.http_answers(ping), 30)
    assert await read_all(running.bootstrap, "kept", 21) == expected

    # The whole stack is stopped and started with other ports.
    assert running.stop() == 0
    (running.data / "ports.json").unlink()
    again = Stack(running.data)
    try:
        assert again.bootstrap != running.bootstrap
        assert await read_all(again.bootstrap, "kept", 21) == expected
        assert redis.Redis.from_url(again.env["HEADRACE_REDIS_URL"]).get("kept") == b"yes"
        assert clickhouse(again.env).query("SELECT sum(a) FROM kept").result_rows == [(3,)]
        async with producer(again.bootstrap) as client:
            await client.send_and_wait("kept", b"last")
        assert (await read_all(again.bootstrap, "kept", 22))[-1] == b"last"
    finally:
        assert again.stop() == 0


async def test_no_child_outlives_a_killed_stack_and_the_next_start_works(running: Stack) -> None:
    children = running.pids()
    assert len(children) == 3
    running.process.kill()
    running.process.wait()
    await until(lambda: not any(map(psutil.pid_exists, children)))
    assert stack.discover(running.data) is None, "the record of a dead stack must not be believed"
    again = Stack(running.data)
    assert await probes.kafka_answers(again.bootstrap)
    assert again.bootstrap == running.bootstrap, "ports are kept while they are free"
    assert again.stop() == 0


async def test_a_stop_in_order_leaves_nothing_behind(running: Stack) -> None:
    children = running.pids()
    assert running.stop() == 0
    assert not any(map(psutil.pid_exists, children))
    assert not (running.data / stack.STACK_FILE).exists()
    assert "killed" not in running.errors


def test_a_second_stack_on_the_same_data_is_refused(shared: Stack) -> None:
    argv = [sys.executable, "-m", "deploy.embedded", "--data-dir", str(shared.data)]
    second = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 1
    assert f"process {shared.process.pid}" in second.stderr
    assert asyncio.run(probes.kafka_answers(shared.bootstrap))


async def test_everything_listens_on_loopback_with_passwords(shared: Stack) -> None:
    for pid in shared.pids():
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1")
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(shared.env["HEADRACE_REDIS_URL"].replace(":", ":x", 2).replace(":x//", "://", 1)).ping()
    for secret in shared.env["HEADRACE_REDIS_URL"], shared.env["HEADRACE_CLICKHOUSE_URL"]:
        password = secret.rpartition("@")[0].rpartition(":")[2]
        assert not any(password in " ".join(psutil.Process(pid).cmdline()) for pid in shared.pids())


async def test_the_idle_parts_are_small(shared: Stack) -> None:
    processes = [psutil.Process(pid) for pid in shared.pids()]
    resident = sum(process.memory_info().rss for process in processes)
    assert resident < 550 * 1024 * 1024

    def busy() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    await asyncio.sleep(3)
    before, began = busy(), time.monotonic()
    await asyncio.sleep(5)
    assert (busy() - before) / (time.monotonic() - began) < 0.08


def test_doctor_sees_the_running_parts_and_a_dead_one(shared: Stack) -> None:
    found = {finding.what: finding for finding in examine(shared.data)}
    assert all(found[part].good for part in ("kafka", "valkey", "clickhouse", "Java"))
    os.kill(shared.child("valkey"), signal.SIGSTOP)
    try:
        assert not {finding.what: finding for finding in examine(shared.data)}["valkey"].good
    finally:
        os.kill(shared.child("valkey"), signal.SIGCONT)
