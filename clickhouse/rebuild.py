"""Rebuilds the tables from Kafka beside the live ones, then exchanges them; right while sinks run.

A copy of each table is filled from the first record that Kafka holds. What Kafka no longer holds is carried over from
the live rows. After the exchange, the records that sinks wrote into the old tables in the meantime are read from Kafka
once more; rows that come twice replace themselves. A rebuild that was killed is run again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog
from aiokafka import TopicPartition
from clickhouse_connect.driver.asyncclient import AsyncClient

from clickhouse.client import INSERT_SETTINGS, connect, database_name
from clickhouse.erasures import PROJECTION, apply
from clickhouse.migrate import migrate
from clickhouse.projection import Projection
from clickhouse.rollups import Rollups
from clickhouse.rows import TOPICS, Item, Unreadable, read
from clickhouse.tables import AUDIT_EVENTS, EVENTS, LEASE_EVENTS, REQUESTS, USAGE, Table
from headrace.erasure_log import ErasureLog
from headrace.settings import Settings
from topics.catalogue import AUDIT_EVENTS as AUDIT_TOPIC
from topics.catalogue import EVENTS as EVENTS_TOPIC
from topics.catalogue import LEASES, LOG, Topic
from topics.catalogue import USAGE as USAGE_TOPIC
from topics.clients import LogReader
from topics.record import Record

log = structlog.get_logger(__name__)

BATCH_ROWS = 50_000
BATCH_BYTES = 16 * 1024 * 1024
LEFTOVER_AFTER_MS = 24 * 3_600_000
"""Copies older than this were left by a rebuild that died."""
UNTIMED = {"max_execution_time": 0}
_SUFFIX = "_rebuild_"

_COPIED: tuple[tuple[Table, Topic], ...] = (
    (REQUESTS, LOG),
    (EVENTS, EVENTS_TOPIC),
    (USAGE, USAGE_TOPIC),
    (LEASE_EVENTS, LEASES),
    (AUDIT_EVENTS, AUDIT_TOPIC),
)

Progress = Callable[[int, int], None]
"""Called with (records read, records to read)."""
Offsets = Mapping[TopicPartition, int]


@dataclass(slots=True)
class Report:
    """What a rebuild did."""

    records: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    """Rows written from Kafka by view; a record that was read twice counts twice."""
    carried: Counter[str] = field(default_factory=Counter)
    """Rows older than Kafka's retention, carried over, by view."""
    refused: int = 0
    """Records that can be no row; the sink has dead-lettered them."""


async def rebuild(conf: Settings, *, from_scratch: bool = False, progress: Progress | None = None) -> Report:
    """Rebuild all tables but `request_attempts`, which only grows; `from_scratch` forgets what Kafka has not.

    Raises `KafkaError` or `ClickHouseError` when one of them is away; the live tables are then as they were, unless
    the exchange had begun.
    """
    await asyncio.to_thread(migrate, conf)
    database = database_name(conf)
    suffix = f"{_SUFFIX}{time.time_ns() // 1_000_000}"
    client = await connect(conf, timeout_s=3600.0)
    try:
        async with (
            LogReader(conf.kafka, "rebuild", max_wait_ms=100, committed=True) as reader,
            ErasureLog(conf, "rebuild") as erased,
        ):
            work = _Rebuild(client, database, suffix, reader, erased, progress)
            await work.run(from_scratch=from_scratch)
            return work.report
    finally:
        await client.close()


class _Rebuild:
    def __init__(
        self,
        client: AsyncClient,
        database: str,
        suffix: str,
        reader: LogReader,
        erased: ErasureLog,
        progress: Progress | None,
    ) -> None:
        self._erased = erased
        self._client = client
        self._database = database
        self._suffix = suffix
        self._reader = reader
        self._progress = progress
        self._assignment = reader.assign(TOPICS)
        self._to_read = 0
        self.report = Report()

    async def run(self, *, from_scratch: bool) -> None:
        await self._drop_leftovers()
        for table, _ in _COPIED:
            await self._client.command(f"CREATE TABLE {self._copy(table)} AS {self._live(table)}")
        await self._reader.consumer.seek_to_beginning(*self._assignment)
        await self._erased.read_on()
        held = self._erased.erasures
        await self._fill(Projection(self._client, self._database, suffix=self._suffix, erasures=held))
        if not from_scratch:
            begins = await self._reader.consumer.beginning_offsets(self._assignment)
            for table, topic in _COPIED:
                await self._carry_over(table, topic, begins)
        for table, _ in _COPIED:
            await self._client.command(f"EXCHANGE TABLES {self._live(table)} AND {self._copy(table)}")
        # What was asked to be erased meanwhile, sinks may have erased in the tables that are now the old ones.
        unsure = [one for one in held.values() if PROJECTION not in one.applied]
        await apply(self._client, self._database, [*unsure, *await self._erased.read_on()])
        await self._fill(Projection(self._client, self._database, erasures=self._erased.erasures))
        await Rollups(self._client, self._database).touch_all(datetime.now(UTC))
        for table, _ in _COPIED:
            await self._client.command(f"DROP TABLE {self._copy(table)} SYNC")

    def _live(self, table: Table) -> str:
        return f"{self._database}.{table.name}"

    def _copy(self, table: Table) -> str:
        return f"{self._database}.{table.name}{self._suffix}"

    async def _fill(self, projection: Projection) -> None:
        """Write every record from the current positions to the ends as they are now, and stand at those ends."""
        ends = await self._measure()
        items: list[Item] = []
        size = 0
        async for record in self._reader.read_to_end(self._assignment, ends):
            self.report.records += 1
            try:
                items.append(read(record))
            except Unreadable as error:
                self._refuse(record, str(error))
            size += len(record.value or b"")
            if len(items) >= BATCH_ROWS or size >= BATCH_BYTES:
                await self._write(projection, items)
                items, size = [], 0
        await self._write(projection, items)

    async def _measure(self) -> Offsets:
        ends: dict[TopicPartition, int] = await self._reader.consumer.end_offsets(self._assignment)
        for partition, end in ends.items():
            self._to_read += max(0, end - await self._reader.position(partition))
        return ends

    async def _write(self, projection: Projection, items: list[Item]) -> None:
        outcome = await projection.write(items)
        self.report.rows.update(outcome.written)
        for item, reason in outcome.refused:
            self._refuse(item.source, reason)
        if self._progress is not None:
            self._progress(self.report.records, max(self._to_read, self.report.records))

    def _refuse(self, record: Record, reason: str) -> None:
        self.report.refused += 1
        log.warning(
            "rebuild_refused", topic=record.topic, partition=record.partition, offset=record.offset, reason=reason
        )

    async def _carry_over(self, table: Table, topic: Topic, begins: Offsets) -> None:
        """Copy the rows whose records Kafka had already deleted."""
        if "compact" in topic.cleanup:  # It deletes between others, and offsets do not tell.
            place = "kafka_partition, kafka_offset"
            gone = f"({place}) NOT IN (SELECT {place} FROM {self._copy(table)})"  # noqa: S608
        else:
            gone = " OR ".join(
                f"(kafka_partition = {partition.partition} AND kafka_offset < {begin})"
                for partition, begin in begins.items()
                if partition.topic == topic.name and begin > 0
            )
        if not gone:
            return
        columns = ", ".join(table.names)
        old = f"FROM {self._live(table)} FINAL WHERE {gone}"
        count = await self._client.query(f"SELECT count() {old}")
        await self._client.command(
            f"INSERT INTO {self._copy(table)} ({columns}) SELECT {columns} {old}",
            settings={**INSERT_SETTINGS, **UNTIMED},
        )
        self.report.carried[table.view] += int(count.result_rows[0][0])

    async def _drop_leftovers(self) -> None:
        found = await self._client.query(
            "SELECT name FROM system.tables WHERE database = %(database)s", parameters={"database": self._database}
        )
        now = int(self._suffix.removeprefix(_SUFFIX))
        for (name,) in found.result_rows:
            _, mark, made = str(name).rpartition(_SUFFIX)
            if mark and made.isdigit() and now - int(made) > LEFTOVER_AFTER_MS:
                await self._client.command(f"DROP TABLE IF EXISTS {self._database}.{name} SYNC")
                log.info("rebuild_leftover_dropped", table=name)
