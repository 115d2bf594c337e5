"""The answers role: reads `inference.log` and `inference.published`, writes `replies.<app>`. Tokens pass, so no Faust.

Both topics have as many partitions, a request is on the same number of both, and the range assignor gives a member the
same numbers of both. Offsets are committed after what was made of the records before them is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, UnknownMemberIdError

from headrace import metrics
from headrace.cancellation import end
from headrace.settings import Settings
from processors.answers.delivery import Delivery, Told
from schemas.events import AttemptOpened, Terminal
from topics import frames
from topics.agents import SESSION_TIMEOUT_S
from topics.answers import AnswerWriter
from topics.catalogue import LOG, MAX_MESSAGE_BYTES, PUBLISHED, is_published
from topics.clients import Producer, close
from topics.cluster import start_client
from topics.dead_letters import bury
from topics.log_memory import LogMemory
from topics.outcomes import now_ms
from topics.record import Record

log = structlog.get_logger(__name__)

GROUP = "headrace-answers"
MAX_RECORDS = 500
COMMIT_EVERY_S = 0.5
IDLE_MS = 500


class _Head(msgspec.Struct, tag_field="type", tag="terminal"):
    """The part of a terminal that tells whether it is one of ours."""

    request_id: str
    reply_partition: int = 0


_head = msgspec.json.Decoder(_Head | AttemptOpened)
_terminal = msgspec.json.Decoder(Terminal)


class Answers(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """One member of the group, with a `Delivery` for each partition number that it has."""

    def __init__(self, settings: Settings, producer: Producer) -> None:
        self._settings = settings
        self._producer = producer
        self._writer = AnswerWriter(settings, producer)
        self._memory = LogMemory(settings.kafka, "answers-warm-up")
        self._deliveries: dict[int, Delivery] = {}
        self._next: dict[TopicPartition, int] = {}
        """Offset after the last record that was handled."""
        self._committed: dict[TopicPartition, int] = {}
        self._busy = asyncio.Lock()
        self._consumer = AIOKafkaConsumer(
            **settings.kafka.consumer_options(),
            client_id=settings.instance,
            group_id=GROUP,
            group_instance_id=f"{GROUP}-{settings.instance}",
            partition_assignment_strategy=(RangePartitionAssignor,),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=int(SESSION_TIMEOUT_S * 1000),
            heartbeat_interval_ms=1500,
            max_partition_fetch_bytes=MAX_MESSAGE_BYTES,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Answer until `stop` is set. Raises `KafkaError` and `ApplyError`."""
        self._consumer.subscribe([LOG.name, PUBLISHED.name], listener=self)
        await start_client(self._settings.kafka, self._consumer)
        working = asyncio.create_task(self._work())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            await end(working, stopping)
            await close("answers", self._consumer.stop())

    async def _work(self) -> None:
        clock = asyncio.get_running_loop().time
        committed_at = clock()
        while True:
            # Held while records are fetched, too: no partition can be taken from us between fetching and handling.
            async with self._busy:
                batches = await self._consumer.getmany(timeout_ms=IDLE_MS, max_records=MAX_RECORDS)
                await self._begin()
                told: list[Told] = []
                for tp, records in batches.items():
                    told += await self._take(tp, records)
                await self._tell([*told, *self._late()])
                if clock() - committed_at >= COMMIT_EVERY_S:
                    committed_at = clock()
                    await self._commit()
            await asyncio.sleep(0)

    # --- records ----------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Note where we begin in partitions that are new to us."""
        new = self._consumer.assignment() - self._next.keys()
        if new:
            log.info("answers_assigned", partitions=len(new))
        for tp in new:
            self._deliveries.setdefault(tp.partition, Delivery())
            committed = await self._consumer.committed(tp)
            if committed is None:
                committed = (await self._consumer.beginning_offsets([tp]))[tp]
            self._next[tp] = committed

    async def _take(self, tp: TopicPartition, records: Sequence[Record]) -> list[Told]:
        delivery = self._deliveries[tp.partition]
        told: list[Told] = []
        for record in records:
            try:
                if tp.topic == LOG.name:
                    told += await self._log(delivery, record)
                else:
                    told += await self._frames(delivery, record)
            except msgspec.MsgspecError as error:
                if tp.topic == LOG.name:  # Metering buries what cannot be read in the log.
                    log.error(
                        "unreadable", topic=tp.topic, partition=tp.partition, offset=record.offset, error=str(error)
                    )
                else:
                    await bury(self._producer, record, reason=str(error), role="answers")
            self._next[tp] = record.offset + 1
        return told

    async def _log(self, delivery: Delivery, record: Record) -> list[Told]:
        value = record.value or b""
        head = _head.decode(value)
        if isinstance(head, _Head) and not is_published(head.reply_partition):
            return []
        whole = head if isinstance(head, AttemptOpened) else _terminal.decode(value)
        decided = await self._memory.apply(whole, record.partition, record.offset, record.timestamp)
        return delivery.ended(decided, record.offset, now_ms()) if decided is not None else []

    async def _frames(self, delivery: Delivery, record: Record) -> list[Told]:
        upto = self._next[TopicPartition(LOG.name, record.partition)]
        view = await self._memory.view(record.partition, upto, record.timestamp)
        told: list[Told] = []
        for delta in frames.decode(record.value or b""):
            told += delivery.frame(delta, record.offset, decided=view.decided(delta.rid.hex()))
        return told

    def _late(self) -> list[Told]:
        told: list[Told] = []
        for number, delivery in self._deliveries.items():
            tp = TopicPartition(PUBLISHED.name, number)
            ends = self._consumer.highwater(tp) if tp in self._consumer.assignment() else None
            told += delivery.late(now_ms(), caught_up=ends is not None and self._next.get(tp, 0) >= ends)
        return told

    async def _tell(self, told: Iterable[Told]) -> None:
        """Write records, in order; returns when all are durable."""
        waits = []
        for one in told:
            waits.append(await self._writer.post(one.app, *one.answer))
            if one.last is None:
                metrics.CHUNKS.inc()
            else:
                metrics.ANSWERS.labels(status=one.last.status.value).inc()
            if one.missed:
                metrics.CHUNKS_MISSED.inc()
                log.error("chunks_missed", request_id=one.answer.request_id, app=one.app)
        await asyncio.gather(*waits)

    # --- partitions -------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        """Commit from where on a successor must read."""
        offsets: dict[TopicPartition, int] = {}
        for number, delivery in self._deliveries.items():
            pair = TopicPartition(LOG.name, number), TopicPartition(PUBLISHED.name, number)
            if all(tp in self._next for tp in pair):
                offsets |= zip(pair, delivery.needed(*(self._next[tp] for tp in pair)), strict=True)
        changed = {tp: offset for tp, offset in offsets.items() if self._committed.get(tp) != offset}
        if not changed:
            return
        try:
            await self._consumer.commit(changed)
        except (CommitFailedError, IllegalStateError, UnknownMemberIdError) as error:
            log.warning("not_committed", error=repr(error))  # The group moved on: what is lost is answered again.
        else:
            self._committed |= changed

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Commit, and forget what others will go on with."""
        async with self._busy:
            await self._commit()
            self._deliveries.clear()
            self._next.clear()
            self._committed.clear()
            self._memory.drop(frozenset(tp.partition for tp in revoked))

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Nothing yet: `_begin` looks at what we have."""


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """The role's life. Raises what ended it."""
    async with Producer(settings.kafka, settings.instance) as producer:
        await Answers(settings, producer).run(stop)
