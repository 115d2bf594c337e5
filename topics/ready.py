"""Waiting until the brokers have what a role needs, so that roles may be started before them, in any order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import structlog
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from topics.catalogue import Topic
from topics.clients import LogReader

log = structlog.get_logger(__name__)

POLL_S = 0.1
SAY_AFTER_S = 10.0


async def wait_for_topics(bootstrap: str, topics: Iterable[Topic]) -> None:
    """Return when every partition of these topics has a leader; says in the log what it waits for, if it takes long."""
    wanted = {topic.name: topic.partitions for topic in topics}
    loop = asyncio.get_running_loop()
    say_at = loop.time() + SAY_AFTER_S
    while waiting := await _missing(bootstrap, wanted) or await _leaderless(bootstrap, wanted):
        if loop.time() >= say_at:
            log.warning("waiting_for_kafka", bootstrap=bootstrap, missing=waiting, hint="run `headrace topics apply`")
            say_at = loop.time() + SAY_AFTER_S
        await asyncio.sleep(POLL_S)


async def _missing(bootstrap: str, wanted: dict[str, int]) -> list[str]:
    """What is not there yet: topics, or the brokers."""
    if not await _listens(bootstrap):
        return ["any broker"]
    client = AIOKafkaClient(bootstrap_servers=bootstrap, client_id="headrace-ready")
    try:
        await client.bootstrap()
        cluster = await client.fetch_all_metadata()
    except (KafkaError, OSError) as error:
        return [f"an answer ({error!r})"]
    finally:
        await client.close()
    led = {name: len(cluster.available_partitions_for_topic(name) or ()) for name in wanted}
    return sorted(name for name, partitions in wanted.items() if led[name] < partitions)


async def _leaderless(bootstrap: str, wanted: dict[str, int]) -> list[str]:
    """A started broker is named as leader before it acts as one; asking it for the ends of the logs tells."""
    partitions = [TopicPartition(name, number) for name, count in wanted.items() for number in range(count)]
    try:
        async with LogReader(bootstrap, "headrace-ready") as reader, asyncio.timeout(SAY_AFTER_S):
            await reader.consumer.end_offsets(partitions)
    except (KafkaError, OSError, TimeoutError) as error:
        return [f"leaders that act ({error!r})"]
    return []


async def _listens(bootstrap: str) -> bool:
    """Whether any broker takes a connection; the client would log each refusal as an error."""
    for address in bootstrap.split(","):
        host, _, port = address.strip().rpartition(":")
        with contextlib.suppress(OSError, ValueError):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            return True
    return False
