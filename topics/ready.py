"""Waiting until the brokers have what a role needs, so that roles may be started before them, in any order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from topics.catalogue import Topic
from topics.clients import LogReader
from topics.cluster import Cluster, knock

log = structlog.get_logger(__name__)

POLL_S = 0.1
SAY_AFTER_S = 10.0


async def wait_for_topics(cluster: Cluster, topics: Iterable[Topic]) -> None:
    """Return when every partition of these topics has a leader; says in the log what it waits for, if it takes long.

    Raises `AccessRefused` when the brokers are there and do not let us in.
    """
    wanted = {topic.name: topic.partitions for topic in topics}
    loop = asyncio.get_running_loop()
    say_at = loop.time() + SAY_AFTER_S
    while waiting := await _missing(cluster, wanted) or await _leaderless(cluster, wanted):
        if loop.time() >= say_at:
            log.warning(
                "waiting_for_kafka", bootstrap=cluster.bootstrap, security=cluster.protocol, missing=waiting,
                hint="run `headrace topics apply`",
            )  # fmt: skip
            say_at = loop.time() + SAY_AFTER_S
        await asyncio.sleep(POLL_S)


async def _missing(cluster: Cluster, wanted: dict[str, int]) -> list[str]:
    """What is not there yet: topics, or the brokers."""
    if (reason := await knock(cluster)) is not None:
        return [f"any broker ({reason})"]
    client = AIOKafkaClient(**cluster.options(), client_id="headrace-ready")
    try:
        await client.bootstrap()
        metadata = await client.fetch_all_metadata()
    except (KafkaError, OSError) as error:
        return [f"an answer ({error!r})"]
    finally:
        await client.close()
    led = {name: len(metadata.available_partitions_for_topic(name) or ()) for name in wanted}
    return sorted(name for name, partitions in wanted.items() if led[name] < partitions)


async def _leaderless(cluster: Cluster, wanted: dict[str, int]) -> list[str]:
    """A started broker is named as leader before it acts as one; asking it for the ends of the logs tells."""
    partitions = [TopicPartition(name, number) for name, count in wanted.items() for number in range(count)]
    try:
        async with LogReader(cluster, "headrace-ready") as reader, asyncio.timeout(SAY_AFTER_S):
            await reader.ends(partitions)
    except (KafkaError, OSError, TimeoutError) as error:
        return [f"leaders that act ({error!r})"]
    return []
