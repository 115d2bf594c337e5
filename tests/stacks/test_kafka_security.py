"""Kafka that asks who we are: every kind of client over SASL and TLS, and clear words where we are not let in."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trustme
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    TopicAuthorizationFailedError,
)
from confluent_kafka import Consumer as ConfluentConsumer
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import Message as Written
from confluent_kafka import Producer as ConfluentProducer
from confluent_kafka import TopicPartition as ConfluentPartition
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.exceptions import RedisError

from headrace.projection import Projection
from headrace.redis_client import connect
from headrace.settings import Settings
from processors.control.state import Write
from processors.control.writer import TOPICS, Writer
from schemas.control import App
from tests.support.secure_kafka import PASSWORD, SecureKafka, secure_kafka
from tests.support.stacks import HEADRACE
from tests.support.valkey import Valkey
from tests.support.waiting import until
from topics.access import access_of, group_prefix
from topics.access_apply import apply_access, new_password
from topics.agents import AgentRole, Message
from topics.apply import apply_all, ensure
from topics.catalogue import (
    CATALOGUE,
    DEAD_LETTERS,
    REQUESTS,
    Topic,
    answers_of,
)
from topics.clients import LogReader, Producer, admin_client
from topics.cluster import AccessRefused
from topics.ready import wait_for_topics

SECRET = "what ingresses and routers of the tests share"
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
    env |= {"HEADRACE_INGRESS_SECRET": SECRET}
    ran = subprocess.run(
        [HEADRACE, "run", "router"], env={**os.environ, **env}, capture_output=True, text=True, timeout=30, check=False
    )
    said = ran.stdout + ran.stderr
    assert (ran.returncode, says in said) == (code, True), said
    assert PASSWORD not in said and "wrong-pass-word" not in said


def test_a_role_without_the_secret_of_ingresses_ends_and_says_so(broker: SecureKafka, tmp_path: Path) -> None:
    for secret in ("", "too short"):
        env = broker.environment("SASL_SSL") | {"HEADRACE_DATA_DIR": str(tmp_path), "HEADRACE_INGRESS_SECRET": secret}
        ran = subprocess.run(
            [HEADRACE, "run", "router"], env={**os.environ, **env}, capture_output=True, text=True, timeout=30,
            check=False,
        )  # fmt: skip
        assert (ran.returncode, "Set HEADRACE_INGRESS_SECRET" in ran.stdout) == (2, True), ran.stdout + ran.stderr
        assert "too short" not in ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def shop(broker: SecureKafka) -> Settings:
    """The settings of an app's publishers, to whom `topics acls --apply` gave what they may do."""
    conf = broker.settings("SASL_SSL")
    apps = [App(name, name, publishers={"p": "k"}, producer_byte_rate=rate) for name, rate in RATES.items()]

    async def set_up() -> str:
        async with admin_client(conf.kafka, "test") as admin:
            for app in apps:
                await ensure(conf, answers_of(app.id))
                await apply_access(admin, access_of(app))
            return await new_password(admin, access_of(apps[0]))

    password = asyncio.run(set_up())
    return broker.settings("SASL_SSL", sasl_username=access_of(apps[0]).user, sasl_password=password)


RATES = {"shop": 100_000, "rival": None}
MINE = f"{group_prefix('shop')}1"


async def test_a_publisher_may_write_requests_and_read_its_answers(broker: SecureKafka, shop: Settings) -> None:
    value, theirs = uuid.uuid4().bytes, answers_of("shop")
    async with Producer(broker.settings("SASL_SSL").kafka, "test") as roles:
        await roles.send(theirs.name, value, key="k")
    async with asyncio.timeout(20), Producer(shop.kafka, "test") as producer:
        await producer.send(REQUESTS.name, value, key="k")
    async with asyncio.timeout(20), LogReader(shop.kafka, "test") as reader:
        assignment = reader.assign([theirs])
        await reader.consumer.seek_to_beginning(*assignment)
        assert value in [record.value async for record in reader.read_to_end(assignment)]
    consumer = AIOKafkaConsumer(
        theirs.name, **shop.kafka.options(), group_id=f"{group_prefix('shop')}1", auto_offset_reset="earliest"
    )
    async with asyncio.timeout(30):
        await consumer.start()
        try:
            assert (await consumer.getone()).value is not None
            await consumer.commit()
        finally:
            await consumer.stop()


def test_a_publisher_may_do_nothing_else(shop: Settings) -> None:
    own, others = answers_of("shop"), [answers_of("rival"), *(topic for topic in CATALOGUE if topic is not REQUESTS)]
    login: dict[str, str | int] = {
        "bootstrap.servers": shop.kafka_bootstrap,
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": shop.kafka.username or "",
        "sasl.password": shop.kafka.password or "",
        "ssl.ca.location": str(shop.kafka_ssl_cafile),
    }
    refusals: dict[str | None, int | None] = {}

    def told(error: KafkaError | None, message: Written) -> None:
        refusals[message.topic()] = error.code() if error is not None else None

    writer = ConfluentProducer(login | {"message.timeout.ms": 15_000})
    for topic in (own, *others):
        writer.produce(topic.name, b"x", partition=0, on_delivery=told)
    writer.flush(30)
    assert refusals == dict.fromkeys((topic.name for topic in (own, *others)), KafkaError.TOPIC_AUTHORIZATION_FAILED)

    def read(group: str, topic: Topic) -> int | None:
        """The error of the first record that a member of a group gets."""
        reader = ConfluentConsumer(login | {"group.id": group, "auto.offset.reset": "earliest"})
        try:
            if group == MINE:
                reader.assign([ConfluentPartition(topic.name, 0, 0)])
            else:
                reader.subscribe([topic.name])
            record = reader.poll(20)
            error = record.error() if record is not None else None
            return error.code() if error is not None else None
        finally:
            reader.close()

    assert read(MINE, REQUESTS) == KafkaError.TOPIC_AUTHORIZATION_FAILED
    for topic in others:  # who may read a topic sees it
        seen = writer.list_topics(topic.name, timeout=20).topics[topic.name].error
        assert seen is not None and seen.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED, topic.name
    for group in ("headrace-router", f"{group_prefix('rival')}1", "publisher/shop"):
        assert read(group, own) == KafkaError.GROUP_AUTHORIZATION_FAILED
    transactional = ConfluentProducer(login | {"transactional.id": "headrace-control"})
    with pytest.raises(KafkaException) as refused:
        transactional.init_transactions(20)
    assert refused.value.args[0].code() == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED


async def test_an_apps_quota_slows_it_down_and_an_app_without_publishers_is_shut_out(
    broker: SecureKafka, shop: Settings
) -> None:
    async with Producer(shop.kafka, "test") as producer:
        began = time.monotonic()
        for _ in range(4):
            await producer.send(REQUESTS.name, bytes(500_000), partition=0)
        assert time.monotonic() - began > 2, "2 MB at 100 kB/s"
    async with admin_client(broker.settings("SASL_SSL").kafka, "test") as admin:
        await apply_access(admin, access_of(App("shop", "shop")))

    async def shut_out() -> bool:
        try:
            async with asyncio.timeout(20), Producer(shop.kafka, "test", request_timeout_s=5) as producer:
                await producer.send(REQUESTS.name, b"x", partition=0)
        except (TopicAuthorizationFailedError, ClusterAuthorizationFailedError):
            return True
        return False

    await until(shut_out, "it may write no more", 30)


Headrace = Callable[..., str]


@pytest.fixture
async def headrace(broker: SecureKafka, tmp_path: Path) -> AsyncIterator[Headrace]:
    """Commands beside a control role of their own, which fail the test unless they succeed; what they printed."""
    valkey = Valkey(tmp_path)
    env = os.environ | broker.environment("SASL_SSL") | {
        "HEADRACE_REDIS_URL": valkey.url, "HEADRACE_CLICKHOUSE_URL": "http://127.0.0.1:1",
        "HEADRACE_DATA_DIR": str(tmp_path), "HEADRACE_INGRESS_SECRET": SECRET,
    }  # fmt: skip

    def run(*arguments: str) -> str:
        ran = subprocess.run([HEADRACE, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr + said.read_text()[-3000:]
        return ran.stdout

    valkey.start()
    said = tmp_path / "control.log"
    with said.open("ab") as log:
        role = await asyncio.create_subprocess_exec(HEADRACE, "run", "control", env=env, stdout=log, stderr=log)
    redis = connect(valkey.url)
    projection = Projection(redis)

    async def filled() -> bool:
        assert role.returncode is None, said.read_text()[-3000:]
        with contextlib.suppress(RedisError, OSError):
            return (await projection.state()).complete
        return False

    try:
        # The role may still be starting when a command has given up: that is no one's fault on a busy machine.
        await until(filled, "the control role has filled Redis", 60)
        yield run
    finally:
        await redis.aclose()
        if role.returncode is None:
            role.kill()
        await role.wait()
        valkey.kill()


async def test_an_operator_lets_publishers_in_and_shuts_them_out(broker: SecureKafka, headrace: Headrace) -> None:
    app = f"kiosk-{uuid.uuid4().hex[:8]}"
    key = base64.b64encode(Ed25519PrivateKey.generate().public_key().public_bytes_raw()).decode()
    headrace("apps", "create", app)
    headrace("apps", "update", app, "--publisher", f"p={key}")
    shown = headrace("topics", "acls", app)
    assert f"# {app}: publisher-{app}" in shown and "kafka-acls.sh" in shown, "nothing is set yet"
    *_, password = headrace("topics", "acls", app, "--apply", "--new-passwords").split()
    let_in = broker.settings("SASL_SSL", sasl_username=f"publisher-{app}", sasl_password=password)
    async with asyncio.timeout(20), Producer(let_in.kafka, "test") as producer:
        await producer.send(REQUESTS.name, b"x", partition=0)
    headrace("apps", "update", app, "--without-publisher", "p")
    assert headrace("topics", "acls", app, "--apply").strip() == f"{app}: publisher-{app} may do nothing"
    with pytest.raises((TopicAuthorizationFailedError, ClusterAuthorizationFailedError)):
        async with asyncio.timeout(20), Producer(let_in.kafka, "test", request_timeout_s=5) as producer:
            await producer.send(REQUESTS.name, b"x", partition=0)
    trail = [
        event for event in json.loads(headrace("audit", "list", "--kind", "access", "--json")) if event["key"] == app
    ]
    told = [(event["action"], event["detail"]["may"], event["detail"]["password"]) for event in trail]
    assert told == [("apply", "nothing", "kept"), ("apply", "publish", "new")]
    assert password not in json.dumps(trail)


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
