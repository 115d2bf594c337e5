"""The sink: usage, the request log, lifecycle and leases become ClickHouse rows, at least once, effectively once.

Offsets are committed only after the rows are durable, and a row that comes again replaces itself. While ClickHouse is
away the sink neither reads on nor gives up; Kafka holds what is to come, and metering does not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from clickhouse_connect.driver.asyncclient import AsyncClient

from clickhouse import erasures
from clickhouse.client import connect, database_name
from clickhouse.errors import Away, code, is_data_error, sentence
from clickhouse.projection import Outcome, Projection
from clickhouse.rollups import Rollups
from clickhouse.rows import TOPICS
from headrace import metrics
from headrace.cancellation import end
from headrace.control_client import command
from headrace.erasure_log import ErasureLog
from headrace.settings import Settings
from processors.sink.batch import Batch, Limits
from schemas.control import Erasure
from topics.catalogue import CONTROL_COMMANDS, USAGE
from topics.clients import Producer, close
from topics.cluster import start_client
from topics.dead_letters import bury

log = structlog.get_logger(__name__)

ROLE = "sink"
GROUP = "headrace-sink"
POLL_S = 0.5
"""Longest wait for records, and so the longest wait before a wish to stop is seen."""
LAST_S = 2.0
"""How long a role that is to stop goes on with what it is at; brokers or ClickHouse may be away."""
FETCH_WAIT_MS = 400
FETCH_MIN_BYTES = 16 * 1024
"""The brokers answer a fetch with this much, or after that long: rows wait for company, not each for a fetch."""
ERASE_EVERY_S = 1.0
"""How often an idle sink looks for erasures; one that writes looks before each batch."""
ERASE_AGAIN_MS = 3_600_000
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
ROLL_UP_S = 15.0
ROLLED_AGAIN = timedelta(days=2)
MAX_POLL_INTERVAL_MS = 24 * 3_600_000
"""A batch may wait for ClickHouse for hours without the member being thrown out of its group; a process that hangs
is noticed by its heartbeats."""

T = TypeVar("T")


class Stopped(Exception):
    """The role is to stop while it waits for ClickHouse or the brokers; what is not committed will be read again."""


class _Rebalances(ConsumerRebalanceListener):  # type: ignore[misc]
    """Drops what was read and not committed, since the group will deliver it again."""

    def __init__(self) -> None:
        self.count = 0

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self.count += 1

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        log.info("sink_assigned", partitions=len(assigned))


class Sink:
    """One member of the sink's group."""

    def __init__(self, conf: Settings, stop: asyncio.Event, limits: Limits | None = None) -> None:
        self._conf = conf
        self._stop = stop
        self._limits = limits or Limits()
        self._database = database_name(conf)
        self._rebalances = _Rebalances()
        self._producer = Producer(conf.kafka, f"{ROLE}-{conf.instance}")
        self._client: AsyncClient | None = None
        self._erasures = ErasureLog(conf, ROLE)
        self._to_erase: list[Erasure] = []
        """Erasures that were asked for and are not yet seen to in the tables."""
        self._consumer = AIOKafkaConsumer(
            **conf.kafka.consumer_options(),
            client_id=f"{ROLE}-{conf.instance}",
            group_id=GROUP,
            group_instance_id=f"{GROUP}-{conf.instance}",
            session_timeout_ms=6000,
            heartbeat_interval_ms=1500,
            max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            fetch_max_wait_ms=FETCH_WAIT_MS,
            fetch_min_bytes=FETCH_MIN_BYTES,
        )

    async def run(self) -> None:
        """Read, write and commit until told to stop. Raises `KafkaError` on what only a new process can cure."""
        self._consumer.subscribe([topic.name for topic in TOPICS], listener=self._rebalances)
        async with self._producer, self._erasures:
            await start_client(self._conf.kafka, self._consumer)
            rolling = asyncio.create_task(self._roll_up())
            try:
                with contextlib.suppress(Stopped):
                    await self._work()
            finally:
                rolling.cancel()
                await asyncio.gather(rolling, return_exceptions=True)
                await close("sink", self._consumer.stop())
                if self._client is not None:
                    await self._client.close()

    async def _roll_up(self) -> None:
        """Add up the windows that are due, again and again; only the member that reads the first partition of usage."""
        first, fresh = TopicPartition(USAGE.name, 0), True
        while not self._stop.is_set():
            if first in self._consumer.assignment():
                try:
                    async with await connect(self._conf, timeout_s=600.0) as client:
                        rollups, now = Rollups(client, self._database), datetime.now(UTC)
                        if fresh:
                            # A sink of an earlier version, which touches nothing, may have written until now.
                            await rollups.touch_all(now, since=now - ROLLED_AGAIN)
                        await rollups.run(now)
                        fresh = False
                except Away as error:
                    log.warning("roll_up_failed", error=sentence(error), code=code(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), ROLL_UP_S)

    async def _work(self) -> None:
        now = asyncio.get_running_loop().time
        batch, seen = Batch(self._limits), self._rebalances.count
        await self._before_the_end(self._erase(at_start=True))
        looked = now()
        while not (self._stop.is_set() and not batch):
            due = batch.due_in(now())
            if due is None or (due > 0 and not self._stop.is_set()):
                wait = POLL_S if due is None else min(due, POLL_S)
                got = await self._consumer.getmany(timeout_ms=max(1, int(wait * 1000)), max_records=batch.room)
                if seen != self._rebalances.count:
                    batch, seen = Batch(self._limits), self._rebalances.count
                for records in got.values():
                    batch.add(records, now())
                if now() - looked >= ERASE_EVERY_S:
                    await self._before_the_end(self._erase())
                    looked = now()
                continue
            started = now()
            await self._before_the_end(self._flush(batch))
            batch = Batch(self._limits, last_flush_s=started)

    async def _before_the_end(self, step: Coroutine[None, None, None]) -> None:
        """Do a step, for `LAST_S` more when the role is to stop meanwhile. Raises `Stopped` when that was too short."""
        doing, stopping = asyncio.create_task(step), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((doing,), timeout=LAST_S)
            if not doing.done():
                raise Stopped
            doing.result()
        finally:
            await end(doing, stopping)

    async def _flush(self, batch: Batch) -> None:
        outcome = await self._until_durable(batch)
        for record, reason in [*batch.unreadable, *((item.source, why) for item, why in outcome.refused)]:
            metrics.SINK_REFUSED.labels(topic=record.topic).inc()
            await bury(self._producer, record, reason=reason, role=ROLE)
        read = batch.offsets()
        await self._commit(read)
        for view, rows in outcome.written.items():
            metrics.SINK_ROWS.labels(table=view).inc(rows)
        metrics.SINK_VOID.inc(outcome.void)
        oldest = batch.oldest_ms()
        if oldest is not None:
            metrics.SINK_DELAY_SECONDS.observe(max(0.0, time.time() - oldest / 1000))
        for partition in self._consumer.assignment():
            last = self._consumer.highwater(partition)
            if last is not None:
                lag = max(0, last - read.get(partition, last))
                metrics.SINK_LAG.labels(topic=partition.topic, partition=str(partition.partition)).set(lag)
        log.debug("sink_batch", rows=outcome.written, void=outcome.void, bytes=batch.bytes)

    async def _until_durable(self, batch: Batch) -> Outcome:
        async def write() -> Outcome:
            if self._client is None:
                self._client = await connect(self._conf)
            # Each time anew: what was asked to be erased while ClickHouse was away must not be written afterwards.
            self._to_erase += await self._erasures.read_on()
            with metrics.SINK_INSERT_SECONDS.time():
                projection = Projection(self._client, self._database, erasures=self._erasures.erasures)
                return await projection.write(batch.items)

        metrics.SINK_BATCH_ROWS.observe(len(batch))
        return await retry(write, self._stop)

    async def _erase(self, *, at_start: bool = False) -> None:
        """See to the erasures that came: in the tables, then by saying so, so that it is known.

        At the start those of the last hour are seen to once more: a predecessor may have written a batch that it had
        read before it knew of one, and died before it knew.
        """
        self._to_erase += await self._erasures.read_on()
        if at_start:
            since_ms = time.time_ns() // 1_000_000 - ERASE_AGAIN_MS
            self._to_erase = [
                one for one in self._to_erase if erasures.PROJECTION not in one.applied or one.asked_ms > since_ms
            ]
        if not self._to_erase:
            return

        async def erase() -> None:
            if self._client is None:
                self._client = await connect(self._conf)
            await erasures.apply(self._client, self._database, self._to_erase)

        await retry(erase, self._stop)
        for done in self._to_erase:
            if erasures.PROJECTION not in done.applied:
                told = msgspec.structs.replace(done, applied={erasures.PROJECTION: time.time_ns() // 1_000_000})
                sent = command(told, actor=f"{ROLE} {self._conf.instance}", reason="erased")
                await self._producer.send(
                    CONTROL_COMMANDS.name, msgspec.json.encode(sent), key=f"{sent.kind}/{sent.key}"
                )
            log.info("erased", subject=done.subject, asked_ms=done.asked_ms)
        self._to_erase = []

    async def _commit(self, offsets: dict[TopicPartition, int]) -> None:
        held = self._consumer.assignment()
        mine = {partition: offset for partition, offset in offsets.items() if partition in held}
        try:
            if mine:
                await self._consumer.commit(mine)
        except (CommitFailedError, IllegalStateError) as error:
            log.info("sink_commit_after_rebalance", error=repr(error))
        except KafkaError as error:
            if not error.retriable:
                raise
            # The next batch of these partitions commits for this one; until then a restart would read it again.
            log.warning("sink_commit_failed", error=repr(error))


async def retry(action: Callable[[], Awaitable[T]], stop: asyncio.Event) -> T:
    """Do `action` until ClickHouse lets it through, with growing pauses. Raises `Stopped` once `stop` is set."""
    pause = FIRST_PAUSE_S
    while True:
        try:
            return await action()
        except Away as error:
            if is_data_error(error):
                raise
            metrics.SINK_RETRIES.labels(code=str(code(error) or "unreachable")).inc()
            log.warning("sink_insert_failed", error=sentence(error), code=code(error), again_in_s=pause)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)
        if stop.is_set():
            raise Stopped
        pause = min(pause * 2, LONGEST_PAUSE_S)


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Run the sink until `stop` is set."""
    await Sink(settings, stop).run()
