"""Readers of whole logs while their broker is away: patient, quiet, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiokafka.errors import KafkaTimeoutError

from deploy.embedded.ports import PortBook
from headrace.settings import Settings
from tests.support.broker import Broker
from topics.apply import ensure
from topics.catalogue import DEAD_LETTERS, REPLIES
from topics.clients import LogReader, Producer
from topics.cluster import ASK_AGAIN_S

WRITTEN = [b"one", b"two", b"three"]


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    made = Broker(tmp_path, PortBook(tmp_path / "ports.json"))
    try:
        made.start()
        await made.answer()
        yield made
    finally:
        made.kill()


async def test_a_read_that_does_not_move_ends_and_goes_on_when_the_broker_is_back(
    broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    conf = Settings(data_dir=tmp_path, instance="test", kafka_bootstrap=broker.bootstrap)
    await ensure(conf, DEAD_LETTERS)
    await ensure(conf, REPLIES)
    cluster = conf.kafka
    async with Producer(cluster, "test") as producer:
        for value in WRITTEN:
            await producer.send(DEAD_LETTERS.name, value, partition=0)
    async with LogReader(cluster, "test", stalled_s=2) as reader:
        [partition] = reader.assign([DEAD_LETTERS], [0])
        await reader.consumer.seek_to_beginning(partition)
        assert [record.value async for record in reader.read_to_end([partition])] == WRITTEN
        reader.consumer.seek(partition, 1)
        broker.kill()
        with pytest.raises(KafkaTimeoutError, match=r"nothing moved in 2 s .*dead.letters/0"):
            async with asyncio.timeout(30):
                await reader.more([partition])
        caplog.clear()
        reader.assign([REPLIES], [0])  # The client asks where that is, and nobody answers.
        await asyncio.sleep(20 * ASK_AGAIN_S)
        asked = [record for record in caplog.records if "Unable to update metadata" in record.message]
        assert 1 <= len(asked) <= 25, f"{len(asked)} questions in {20 * ASK_AGAIN_S:g} s"
        [partition] = reader.assign([DEAD_LETTERS], [0])
        reader.consumer.seek(partition, 1)
        broker.start()
        await broker.answer()
        assert [record.value async for record in reader.read_to_end([partition])] == WRITTEN[1:]
