"""Topics on a real broker: created, amended, refused."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from headrace.settings import Settings
from topics import apply as topic_apply
from topics.apply import ApplyError, actual_topics, apply_all
from topics.catalogue import CATALOGUE, DAY_MS, HOUR_MS, Topic
from topics.clients import Producer


@pytest.fixture
async def admin(infra: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(bootstrap_servers=infra.kafka_bootstrap)
    await client.start()
    yield client
    await client.close()


@pytest.fixture
async def topic(admin: AIOKafkaAdminClient, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Topic]:
    """A catalogue of one topic that no other test has; it is not on the broker yet."""
    made = Topic(f"test.{uuid.uuid4().hex}", 2, "key", "A test's.", retention_ms=DAY_MS, append_time=True)
    monkeypatch.setattr(topic_apply, "CATALOGUE", (made,))
    yield made
    await admin.delete_topics([made.name])


def catalogue(monkeypatch: pytest.MonkeyPatch, *topics: Topic) -> None:
    monkeypatch.setattr(topic_apply, "CATALOGUE", topics)


async def test_the_whole_catalogue_is_applied_once(infra: Settings, admin: AIOKafkaAdminClient) -> None:
    worker = f"t{uuid.uuid4().hex[:8]}"
    done = await apply_all(infra, workers=[worker])
    assert f"created worker.{worker}.commands (1 partitions)" in done
    assert await apply_all(infra, workers=[worker]) == []
    found = await actual_topics(admin, {topic.name for topic in CATALOGUE})
    for wanted in CATALOGUE:
        assert found[wanted.name].partitions == wanted.partitions
        assert wanted.config().items() <= dict(found[wanted.name].config).items()
    await admin.delete_topics([f"worker.{worker}.commands"])


async def test_a_created_topic_takes_records_at_once(infra: Settings, topic: Topic) -> None:
    assert await apply_all(infra, workers=[]) == [f"created {topic.name} (2 partitions)"]
    async with Producer(infra.kafka, "test") as producer:
        for partition in range(topic.partitions):
            assert (await producer.send(topic.name, b"x", partition=partition)).offset == 0


async def test_an_amendment_leaves_what_others_have_set(
    infra: Settings, admin: AIOKafkaAdminClient, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    await apply_all(infra, workers=[])
    before = (await actual_topics(admin, {topic.name}))[topic.name]
    theirs = {**before.overrides, "compression.type": "zstd"}
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic.name, theirs)])
    catalogue(monkeypatch, dataclasses.replace(topic, retention_ms=2 * DAY_MS))
    (line,) = await apply_all(infra, workers=[])
    assert line.startswith(f"amended {topic.name} (retention.ms: {DAY_MS} -> {2 * DAY_MS}")
    after = (await actual_topics(admin, {topic.name}))[topic.name]
    assert after.overrides["compression.type"] == "zstd"
    assert after.config["retention.ms"] == str(2 * DAY_MS)
    assert await apply_all(infra, workers=[]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partitions": 3}, "partitions: have 2, want 3"),
        ({"partitions": 1}, "partitions: have 2, want 1"),
        ({"cleanup": "compact", "retention_ms": None}, "cleanup.policy: have delete, want compact"),
        ({"retention_ms": HOUR_MS}, f"retention.ms: have {DAY_MS}, want {HOUR_MS}; say --allow-shorter-retention"),
    ],
)
async def test_what_destroys_is_refused_and_nothing_is_changed(
    infra: Settings,
    admin: AIOKafkaAdminClient,
    topic: Topic,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    message: str,
) -> None:
    await apply_all(infra, workers=[])
    before = (await actual_topics(admin, {topic.name}))[topic.name]
    other = dataclasses.replace(topic, name=f"{topic.name}.other")
    catalogue(monkeypatch, dataclasses.replace(topic, **change), other)  # type: ignore[arg-type]
    with pytest.raises(ApplyError, match=f"topic {topic.name}: ") as refused:
        await apply_all(infra, workers=[])
    assert message in str(refused.value)
    assert await actual_topics(admin, {topic.name, other.name}) == {topic.name: before}


async def test_a_shorter_retention_can_be_allowed(
    infra: Settings, admin: AIOKafkaAdminClient, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    await apply_all(infra, workers=[])
    catalogue(monkeypatch, dataclasses.replace(topic, retention_ms=HOUR_MS))
    assert len(await apply_all(infra, workers=[], allow_shorter_retention=True)) == 1
    assert (await actual_topics(admin, {topic.name}))[topic.name].config["retention.ms"] == str(HOUR_MS)
