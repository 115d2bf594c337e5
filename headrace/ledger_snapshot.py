"""Reads what the ledger needs from Kafka, at one snapshot of `inference.requests`."""

from __future__ import annotations

import asyncio
import time

import msgspec
import structlog
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError

from headrace.ledger import Ledger, Tally
from headrace.settings import Settings
from schemas.events import UsageEvent
from topics import request_log
from topics.catalogue import DEAD_LETTERS, LOG, REQUESTS, USAGE, Topic
from topics.clients import LogReader, admin_client
from topics.cluster import Cluster
from topics.dead_letters import NOT_ACCEPTED, describe
from topics.record import Record

log = structlog.get_logger(__name__)

METERING_GROUP = "headrace-metering"
CLOCK_SKEW_MS = 60_000
"""Producers stamp usage events and dead letters by their own clocks."""
RECHECK_S = 0.25
COORDINATOR_S = 20.0
"""How long the brokers may take to name a group's coordinator: in a new cluster they first make its topic."""

_usage = msgspec.json.Decoder(UsageEvent)


async def take(conf: Settings, *, wait_s: float = 15.0) -> Ledger:
    """The ledger of the requests that Kafka holds now; waits up to `wait_s` for metering to catch up.

    Raises `KafkaError` when the brokers are away.
    """
    async with LogReader(conf.kafka, "ledger", max_wait_ms=100) as reader:
        tally = Tally()
        oldest_ms = await _requests(reader, tally)
        if oldest_ms is None:
            return tally.close(_now_ms())
        since = oldest_ms - CLOCK_SKEW_MS
        ends = await _log(reader, tally, since)
        await _dead_letters(reader, tally, since)
        lag = await _usage_events(reader, tally, since, conf.kafka, ends, wait_s)
        return tally.close(_now_ms(), metering_lag=lag)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def _requests(reader: LogReader, tally: Tally) -> int | None:
    assignment = reader.assign([REQUESTS])
    await reader.consumer.seek_to_beginning(*assignment)
    oldest: int | None = None
    async for record in reader.read_to_end(assignment):
        tally.request(record.partition, record.offset, record.timestamp, record.headers)
        oldest = record.timestamp if oldest is None else min(oldest, record.timestamp)
    return oldest


async def _assign_since(reader: LogReader, topic: Topic, since_ms: int) -> list[TopicPartition]:
    assignment = reader.assign([topic])
    await reader.seek_to_time(assignment, since_ms)
    return assignment


async def _log(reader: LogReader, tally: Tally, since_ms: int) -> dict[TopicPartition, int]:
    assignment = await _assign_since(reader, LOG, since_ms)
    ends: dict[TopicPartition, int] = await reader.consumer.end_offsets(assignment)
    async for record in reader.read_to_end(assignment):
        try:
            tally.log(request_log.decode(record.value or b""))
        except msgspec.MsgspecError as error:
            log.warning("ledger_unreadable", topic=LOG.name, offset=record.offset, error=str(error))
    return ends


async def _dead_letters(reader: LogReader, tally: Tally, since_ms: int) -> None:
    assignment = await _assign_since(reader, DEAD_LETTERS, since_ms)
    async for record in reader.read_to_end(assignment):
        try:
            letter, _, _ = describe(record.headers)
        except ValueError as error:
            log.warning("ledger_unreadable", topic=DEAD_LETTERS.name, offset=record.offset, error=str(error))
            continue
        if letter.source_topic == REQUESTS.name:
            accepted = not letter.reason.startswith(NOT_ACCEPTED)
            tally.dead_letter(letter.partition, letter.offset, accepted=accepted)


async def _usage_events(
    reader: LogReader, tally: Tally, since_ms: int, cluster: Cluster, log_ends: dict[TopicPartition, int], wait_s: float
) -> int:
    """Read usage until every terminal has its own, or metering has nothing left to do; returns metering's lag."""
    assignment = await _assign_since(reader, USAGE, since_ms)
    give_up = asyncio.get_running_loop().time() + wait_s
    async with admin_client(cluster, "ledger") as admin:
        while True:
            lag = await _lag(admin, log_ends)
            async for record in reader.read_to_end(assignment):
                _count_usage(tally, record)
            if not lag or not tally.without_usage() or asyncio.get_running_loop().time() >= give_up:
                return lag
            await asyncio.sleep(RECHECK_S)


def _count_usage(tally: Tally, record: Record) -> None:
    try:
        tally.usage(_usage.decode(record.value or b""))
    except msgspec.MsgspecError as error:
        log.warning("ledger_unreadable", topic=USAGE.name, offset=record.offset, error=str(error))


async def _lag(admin: AIOKafkaAdminClient, ends: dict[TopicPartition, int]) -> int:
    """Records before `ends` that metering has not committed; a group that never committed lags by all of them."""
    give_up = asyncio.get_running_loop().time() + COORDINATOR_S
    while True:
        try:
            found = await admin.list_consumer_group_offsets(METERING_GROUP, partitions=list(ends))
            break
        except (GroupCoordinatorNotAvailableError, NotCoordinatorForGroupError):
            if asyncio.get_running_loop().time() >= give_up:
                raise
            await asyncio.sleep(RECHECK_S)
    return sum(max(0, end - max(0, found[partition].offset)) for partition, end in ends.items() if partition in found)
