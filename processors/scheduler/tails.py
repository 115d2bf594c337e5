"""What a scheduler reads beside its own stream: the log, cancellations, heartbeats and wishes, whole, without a group.

Faust does not co-partition these with `inference.routed`, so each scheduler reads them all and keeps what concerns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog
from aiokafka import TopicPartition

from schemas.events import Cancellation, IngressStatus, PoolCommand, Usage, WorkerStatus
from topics.catalogue import CANCELLATIONS, INGRESS_STATUS, LOG, POOL_COMMANDS, POOL_TERMS, WORKER_STATUS
from topics.clients import LogReader
from topics.cluster import Cluster
from topics.record import Record
from topics.request_log import LogView

GATHER_S = 0.005
"""A slot is found free this much later; under load many terminals share a fetch then."""

log = structlog.get_logger(__name__)


class Ended(msgspec.Struct, tag_field="type", tag="terminal"):
    """The part of a terminal that scheduling needs."""

    request_id: str
    attempt: int
    usage: Usage = msgspec.field(default_factory=Usage)


class _Opened(msgspec.Struct, tag_field="type", tag="attempt_opened"):
    request_id: str
    attempt: int


_head = msgspec.json.Decoder(Ended | _Opened)
_cancellation = msgspec.json.Decoder(Cancellation)
_status = msgspec.json.Decoder(WorkerStatus)
_ingress = msgspec.json.Decoder(IngressStatus)
_wish = msgspec.json.Decoder(PoolCommand)


class Tails:
    """One consumer over the topics. Handlers are awaited in partition order."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        on_terminal: Callable[[Ended], Awaitable[None]],
        on_opened: Callable[[str, int], Awaitable[None]],
        on_cancellation: Callable[[Cancellation], Awaitable[None]],
        on_heartbeat: Callable[[WorkerStatus], Awaitable[None]],
        on_ingress: Callable[[IngressStatus], None],
        on_unreadable: Callable[[Record, str], Awaitable[None]],
        on_term: Callable[[str, int], Awaitable[None]],
        on_wish: Callable[[PoolCommand, int, int], Awaitable[None]],
    ) -> None:
        self._reader = LogReader(cluster, "scheduler-tails", max_wait_ms=1000)
        self._asker = LogReader(cluster, "scheduler-ends")
        """Asks for ends: on the connection of the tails a question waits for the fetch before it."""
        self._on_terminal = on_terminal
        self._on_opened = on_opened
        self._on_cancellation = on_cancellation
        self._on_heartbeat = on_heartbeat
        self._on_ingress = on_ingress
        self._on_unreadable = on_unreadable
        self._on_term = on_term
        self._on_wish = on_wish
        self.view = LogView()
        """What the log says of attempts and terminals, as far as it has been read."""
        self._position: dict[TopicPartition, int] = {}
        self._moved = asyncio.Condition()

    async def start(self, since_ms: int, wishes_since_ms: int) -> None:
        """Position the log and the cancellations at `since_ms`, the wishes at `wishes_since_ms` (Unix ms).

        Heartbeats and terms are read from their beginning.
        """
        await asyncio.gather(self._reader.start(), self._asker.start())
        assignment = self._reader.assign([LOG, CANCELLATIONS, POOL_COMMANDS, WORKER_STATUS, INGRESS_STATUS, POOL_TERMS])
        dated = [tp for tp in assignment if tp.topic in (LOG.name, CANCELLATIONS.name)]
        await self._reader.seek_to_time(dated, since_ms)
        wishes = [tp for tp in assignment if tp.topic == POOL_COMMANDS.name]
        await self._reader.seek_to_time(wishes, wishes_since_ms)
        whole = [tp for tp in assignment if tp not in dated and tp not in wishes]
        await self._reader.consumer.seek_to_beginning(*whole)
        for tp in assignment:
            self._position[tp] = await self._reader.position(tp)
        await self._asker.ends(assignment)  # It knows the brokers by the time that somebody waits for its answer.

    async def stop(self) -> None:
        """Close."""
        await asyncio.gather(self._reader.stop(), self._asker.stop())

    async def run(self) -> None:
        """Read for ever. Raises what a handler raises."""
        consumer = self._reader.consumer
        while True:
            batches = await consumer.getmany(timeout_ms=5000, max_records=500)
            for tp, records in batches.items():
                for record in records:
                    await self._one(record)
                self._position[tp] = records[-1].offset + 1
            if batches:
                async with self._moved:
                    self._moved.notify_all()
                await asyncio.sleep(GATHER_S)

    async def reached(self, positions: dict[TopicPartition, int]) -> None:
        """Return when every partition has been read up to (not including) the given offsets."""
        async with self._moved:
            await self._moved.wait_for(
                lambda: all(self._position.get(tp, 0) >= offset for tp, offset in positions.items())
            )

    async def caught_up(self) -> None:
        """Return when all has been read that there is now. Raises `KafkaError` when no broker answers."""
        await self.reached(await self._asker.ends(list(self._position)))

    async def _one(self, record: Record) -> None:
        if record.value is None:
            return
        try:
            if record.topic == LOG.name:
                await self._log_record(_head.decode(record.value))
            elif record.topic == CANCELLATIONS.name:
                await self._on_cancellation(_cancellation.decode(record.value))
            elif record.topic == POOL_COMMANDS.name:
                await self._on_wish(_wish.decode(record.value), record.offset, record.timestamp)
            elif record.topic == INGRESS_STATUS.name:
                self._on_ingress(_ingress.decode(record.value))
            elif record.topic == POOL_TERMS.name:
                await self._on_term((record.key or b"").decode(), record.offset)
            else:
                await self._on_heartbeat(_status.decode(record.value))
        except msgspec.MsgspecError as error:
            log.error(
                "unreadable", topic=record.topic, partition=record.partition, offset=record.offset, error=str(error)
            )
            if record.topic != LOG.name:  # Metering buries what cannot be read there.
                await self._on_unreadable(record, str(error))

    async def _log_record(self, head: Ended | _Opened) -> None:
        if isinstance(head, _Opened):
            self.view.opened(head.request_id, head.attempt)
            await self._on_opened(head.request_id, head.attempt)
        elif self.view.ended(head.request_id, head.attempt):
            await self._on_terminal(head)
