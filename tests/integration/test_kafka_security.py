"""Kafka that asks who we are: every kind of client over SASL and TLS, and clear words where we are not let in."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from processors.control.state import Write
from processors.control.writer import TOPICS, Writer
from tests.support.secure_kafka import PASSWORD, SecureKafka, secure_kafka
from tests.support.stacks import HEADRACE
from topics.agents import AgentRole, Message
from topics.apply import apply_all
from topics.catalogue import DEAD_LETTERS, REQUESTS
from topics.clients import LogReader, Producer, admin_client
from topics.cluster import AccessRefused
from topics.ready import wait_for_topics

PROTOCOLS = ("SASL_PLAINTEXT", "SASL_SSL", "SSL")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    with secure_kafka(tmp_path_factory.mktemp("secure")) as made:
        asyncio.run(apply_all(made.settings("SASL_SSL"), workers=["w1"]))
        yield made


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_what_is_written_is_read(broker: SecureKafka, protocol: str) -> None:
    conf, value = broker.settings(protocol), uuid.uuid4().bytes
    async with asyncio.timeout(20):
        await wait_for_topics(conf.kafka, [DEAD_LETTERS])
    async with Producer(conf.kafka, "test") as producer, LogReader(conf.kafka, "test") as reader:
        written = await producer.send(DEAD_LETTERS.name, value, partition=0)
        [partition] = reader.assign([DEAD_LETTERS], [0])
        reader.consumer.seek(partition, written.offset)
        assert [record.value async for record in reader.read_to_end([partition])] == [value]
    async with admin_client(conf.kafka, "test") as admin:
        assert DEAD_LETTERS.name in await admin.list_topics()


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_the_control_planes_writer_writes(broker: SecureKafka, protocol: str) -> None:
    writer = Writer(broker.settings(protocol).kafka, "test")
    await writer.start()
    try:
        assert len(await writer.write([Write(next(iter(TOPICS)), "key", b"{}")])) == 1
    finally:
        await writer.stop()


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_an_agent_handles_what_comes(broker: SecureKafka, protocol: str) -> None:
    conf, came, stop, value = broker.settings(protocol), asyncio.Event(), asyncio.Event(), uuid.uuid4().bytes

    async def handle(batch: list[Message]) -> None:
        if value in [message.value for message in batch]:
            came.set()

    role = AgentRole(conf, "test", REQUESTS, handle, group=f"test-{uuid.uuid4().hex}")
    running = asyncio.create_task(role.run(stop))
    try:
        async with Producer(conf.kafka, "test") as producer:
            await producer.send(REQUESTS.name, value, key="k")
        async with asyncio.timeout(30):
            await came.wait()
    finally:
        stop.set()
        await running


WRONG = [
    ("SASL_PLAINTEXT", {"sasl_password": "wrong"}, "does not let 'headrace' in .*HEADRACE_KAFKA_SASL_PASSWORD"),
    ("SASL_SSL", {"sasl_username": "stranger"}, "does not let 'stranger' in"),
    ("SASL_SSL", {"sasl_mechanism": "PLAIN"}, "PLAIN.*HEADRACE_KAFKA_SASL_MECHANISM"),
    ("SASL_SSL", {"ssl_cafile": ""}, "certificate verify failed.*HEADRACE_KAFKA_SSL_CAFILE"),
]


@pytest.mark.parametrize(("protocol", "changes", "says"), WRONG)
async def test_who_is_not_let_in_is_told_why_and_soon(
    broker: SecureKafka, protocol: str, changes: dict[str, str], says: str
) -> None:
    cluster = broker.settings(protocol, **changes).kafka
    began = time.monotonic()
    with pytest.raises(AccessRefused, match=says):
        await Producer(cluster, "test").start()
    with pytest.raises(AccessRefused, match=says):
        async with LogReader(cluster, "test"):
            pass
    with pytest.raises(AccessRefused, match=says):
        async with admin_client(cluster, "test"):
            pass
    with pytest.raises(AccessRefused, match=says):
        await wait_for_topics(cluster, [REQUESTS])
    assert time.monotonic() - began < 10


async def test_a_broker_whose_name_is_not_in_its_certificate_is_not_trusted(broker: SecureKafka) -> None:
    conf = broker.settings("SASL_SSL", bootstrap=f"localhost:{broker.ports['SASL_SSL']}")
    with pytest.raises(AccessRefused, match="Hostname mismatch"):
        await Producer(conf.kafka, "test").start()


async def test_a_certificate_file_that_is_none_is_named(broker: SecureKafka, tmp_path: Path) -> None:
    (tmp_path / "none.pem").write_text("none")
    with pytest.raises(AccessRefused, match=r"none\.pem"):
        Producer(broker.settings("SSL", ssl_certfile=str(tmp_path / "none.pem")).kafka, "test")
    locked = trustme.CA().issue_cert("client")
    locked.cert_chain_pems[0].write_to_path(tmp_path / "without-key.pem")
    with pytest.raises(AccessRefused, match=r"without-key\.pem"):
        Producer(broker.settings("SSL", ssl_certfile=str(tmp_path / "without-key.pem")).kafka, "test")


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"sasl_password": "wrong-pass-word"}, 1, "does not let 'headrace' in"),
        ({"sasl_username": ""}, 2, "needs HEADRACE_KAFKA_SASL_USERNAME"),
        ({"ssl_cafile": "/nowhere.pem"}, 2, "HEADRACE_KAFKA_SSL_CAFILE: Path does not point to a file"),
    ],
)
def test_a_role_that_is_not_let_in_ends_and_says_why(
    broker: SecureKafka, tmp_path: Path, changes: dict[str, str], code: int, says: str
) -> None:
    env = broker.environment("SASL_SSL", **changes) | {"HEADRACE_DATA_DIR": str(tmp_path)}
    ran = subprocess.run(
        [HEADRACE, "run", "router"], env={**os.environ, **env}, capture_output=True, text=True, timeout=30, check=False
    )
    said = ran.stdout + ran.stderr
    assert (ran.returncode, says in said) == (code, True), said
    assert PASSWORD not in said and "wrong-pass-word" not in said


def test_a_command_that_is_not_let_in_says_why_in_a_sentence(broker: SecureKafka, tmp_path: Path) -> None:
    elsewhere = {"HEADRACE_REDIS_URL": "redis://127.0.0.1:1/0", "HEADRACE_CLICKHOUSE_URL": "http://127.0.0.1:1"}
    env = broker.environment("SASL_SSL", sasl_password="wrong-pass-word") | elsewhere
    ran = subprocess.run(
        [HEADRACE, "ledger", "--data-dir", str(tmp_path)], env={**os.environ, **env},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: Kafka does not let 'headrace' in (SASL_SSL, SCRAM-SHA-512)"), ran.stderr
    assert len(ran.stderr.splitlines()) == 1 and "wrong-pass-word" not in ran.stdout + ran.stderr
