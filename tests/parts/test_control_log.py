"""Replaying control topics while they are written: what a replay claims to hold, it holds."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from headrace.control_log import CommittedReader, Replay
from headrace.settings import Settings
from schemas.control import App
from topics.catalogue import Topic

ROUNDS = 4
LookUp = Callable[[list[TopicPartition]], Awaitable[dict[TopicPartition, int]]]


@pytest.fixture
async def topic(infra: Settings) -> AsyncIterator[Topic]:
    """A control topic of this test's own."""
    made = Topic(f"test.{uuid.uuid4().hex}", 1, "id", "A test's.", schema=App, cleanup="compact")
    admin = AIOKafkaAdminClient(bootstrap_servers=infra.kafka_bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(made.name, 1, 1)])
    yield made
    await admin.delete_topics([made.name])
    await admin.close()


@pytest.fixture
async def writer(infra: Settings) -> AsyncIterator[AIOKafkaProducer]:
    made = AIOKafkaProducer(bootstrap_servers=infra.kafka_bootstrap, transactional_id=f"test-{uuid.uuid4().hex}")
    await made.start()
    yield made
    await made.stop()


async def write(writer: AIOKafkaProducer, topic: Topic, number: int) -> tuple[int, str]:
    name = f"app-{number}"
    metadata = await writer.send_and_wait(topic.name, msgspec.json.encode(App(name, name)), key=name.encode())
    return metadata.offset, name


async def read_up_to(replay: Replay, topic: Topic, offset: int) -> None:
    """Read on until `offset` was read: a commit is visible a moment after it was acknowledged."""
    async with asyncio.timeout(10):
        await replay.read_on()
        while replay.offsets[topic.name] <= offset:
            await replay.read_on()


async def test_records_that_come_while_the_end_is_looked_up_are_not_passed_over(
    infra: Settings, topic: Topic, writer: AIOKafkaProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[int, str] = {}

    async def put(number: int) -> None:
        async with writer.transaction():
            offset, name = await write(writer, topic, number)
        written[offset] = name
        async with CommittedReader(infra.kafka, "test") as other:
            await read_up_to(Replay(other, {"apps": topic}), topic, offset)

    await put(0)
    for number in range(1, ROUNDS):
        async with CommittedReader(infra.kafka, "test") as reader:
            look_up = reader.consumer.end_offsets

            async def look_up_and_write(
                partitions: list[TopicPartition],
                consumer: AIOKafkaConsumer = reader.consumer,
                look_up: LookUp = look_up,
                number: int = number,
            ) -> dict[TopicPartition, int]:
                ends = await look_up(partitions)
                await put(number)
                await consumer.seek_to_beginning(*partitions)  # Forget what was fetched early: fetch both at once.
                return ends

            monkeypatch.setattr(reader.consumer, "end_offsets", look_up_and_write)
            replay = Replay(reader, {"apps": topic})
            await replay.read_on()
            claimed = {name for offset, name in written.items() if offset < replay.offsets[topic.name]}
            assert replay.records["apps"].keys() == claimed


async def test_a_transaction_that_was_not_committed_is_not_replayed(
    infra: Settings, topic: Topic, writer: AIOKafkaProducer
) -> None:
    async with CommittedReader(infra.kafka, "test") as reader:
        replay = Replay(reader, {"apps": topic})
        async with writer.transaction():
            first, _ = await write(writer, topic, 1)
        await read_up_to(replay, topic, first)
        await writer.begin_transaction()
        offset, _ = await write(writer, topic, 2)
        await replay.read_on()
        assert (list(replay.records["apps"]), replay.offsets[topic.name]) == (["app-1"], offset)
        await writer.abort_transaction()
        async with writer.transaction():
            third, _ = await write(writer, topic, 3)
        await read_up_to(replay, topic, third)
        assert list(replay.records["apps"]) == ["app-1", "app-3"]


async def test_a_record_that_is_damaged_counts_as_deleted(
    infra: Settings, topic: Topic, writer: AIOKafkaProducer
) -> None:
    async with writer.transaction():
        await write(writer, topic, 1)
        await write(writer, topic, 2)
        damaged = await writer.send_and_wait(topic.name, b'{"id": 5}', key=b"app-1")
    async with CommittedReader(infra.kafka, "test") as reader:
        replay = Replay(reader, {"apps": topic})
        await read_up_to(replay, topic, damaged.offset)
        assert list(replay.records["apps"]) == ["app-2"]
