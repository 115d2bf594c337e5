"""Kafka clients as every role builds them: an idempotent producer, and readers of whole logs without a group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, NamedTuple

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, KafkaTimeoutError
from aiokafka.structs import RecordMetadata

from headrace.cancellation import end
from topics import tolerant_records
from topics.catalogue import MAX_MESSAGE_BYTES, Topic
from topics.cluster import Cluster, pace, start_client
from topics.record import Record

log = structlog.get_logger(__name__)

tolerant_records.install()


LATER_S = 0.1
"""How long a record that nobody waits for may be kept for company."""


MAX_BATCH = 500
"""Records that a reader of a whole log holds decoded, at most."""
POLL_MS = 1000
CLOSE_S = 3.0
STALLED_S = 60.0
"""How long a reader waits for what must come, since it is in the log: it outlasts the start of a broker, and the 40 s
after which the client gives a question up that nobody answers."""


async def close(client: str, closing: Coroutine[Any, Any, None]) -> None:
    """Await the end of a Kafka client, for `CLOSE_S` at most: it would wait long for brokers that are away.

    The client suppresses cancellations while it closes, so that one is not enough to end that.
    """
    task = asyncio.create_task(closing)
    try:
        await asyncio.wait((task,), timeout=CLOSE_S)
        if task.done():
            task.result()
        else:
            log.warning("client_not_closed_in_order", client=client)
    finally:
        await end(task)


class _Later(NamedTuple):
    topic: str
    value: bytes | None
    key: str | None
    partition: int | None


def _log_loss(sent: asyncio.Future[RecordMetadata]) -> None:
    if not sent.cancelled() and (error := sent.exception()) is not None:
        log.warning("record_lost", error=repr(error))


class Producer:
    """An idempotent producer with `acks=all`. `send` returns when the brokers have acknowledged.

    An unacknowledged write raises `aiokafka.errors.KafkaError`; an agent then ends its process, so that the event is
    delivered again.
    """

    def __init__(self, cluster: Cluster, client_id: str, *, request_timeout_s: float = 15.0) -> None:
        self._cluster = cluster
        self._inner = AIOKafkaProducer(
            **cluster.options(),
            client_id=client_id,
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            max_request_size=MAX_MESSAGE_BYTES + 1024 * 1024,
            max_batch_size=1024 * 1024,
            request_timeout_ms=int(request_timeout_s * 1000),
        )

        self._later: list[_Later] = []
        self._flusher: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Connect. Raises as `start_client` does."""
        await start_client(self._cluster, self._inner)

    async def stop(self) -> None:
        """Send what is buffered, then close."""
        await close("producer", self._finish())

    async def _finish(self) -> None:
        if self._flusher is not None:
            self._flusher.cancel()
            await self._flush_later()
        await self._inner.stop()

    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> RecordMetadata:
        """Write one record and wait until it is durable."""
        return await (await self.post(topic, value, key=key, partition=partition, headers=headers))

    async def post(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> asyncio.Future[RecordMetadata]:
        """Put one record into the send buffer; the future resolves when it is durable."""
        future: asyncio.Future[RecordMetadata] = await self._inner.send(
            topic,
            value,
            key=key.encode() if key is not None else None,
            partition=partition,
            headers=list(headers),
        )
        return future

    def post_later(
        self, topic: str, value: bytes | None, *, key: str | None = None, partition: int | None = None
    ) -> None:
        """Write a record within `LATER_S`, beside others, for what nobody waits for and a crash may lose.

        A request to the brokers costs much more than a record in it. A failure is logged.
        """
        self._later.append(_Later(topic, value, key, partition))
        if self._flusher is None:
            loop = asyncio.get_running_loop()
            self._flusher = loop.call_later(LATER_S, lambda: loop.create_task(self._flush_later()))

    async def _flush_later(self) -> None:
        records, self._later, self._flusher = self._later, [], None
        try:
            for record in records:
                sent = await self.post(record.topic, record.value, key=record.key, partition=record.partition)
                sent.add_done_callback(_log_loss)
        except KafkaError as error:
            log.warning("records_lost", count=len(records), error=repr(error))

    async def __aenter__(self) -> Producer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


@asynccontextmanager
async def admin_client(cluster: Cluster, client_id: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """A client for topics and groups, for the length of a `with`. Raises as `start_client` does."""
    admin = AIOKafkaAdminClient(**cluster.options(), client_id=client_id)
    try:
        await start_client(cluster, admin)
        yield admin
    finally:
        await close("admin", admin.close())


def make_consumer(
    cluster: Cluster,
    client_id: str,
    *,
    max_wait_ms: int = 1000,
    committed: bool = False,
    fetch_bytes: int = MAX_MESSAGE_BYTES,
) -> AIOKafkaConsumer:
    """A consumer without a group, to be assigned by hand; `committed` passes over what transactions took back."""
    consumer = AIOKafkaConsumer(
        **cluster.consumer_options(),
        client_id=client_id,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=max_wait_ms,
        max_partition_fetch_bytes=fetch_bytes,
        isolation_level="read_committed" if committed else "read_uncommitted",
    )
    pace(consumer)
    return consumer


class LogReader:
    """Reads topics from chosen positions, without a group: for tails, warm-ups, look-ups and rebuilds.

    What reads to an end that is known raises `KafkaTimeoutError` when nothing has moved for `stalled_s` seconds: the
    client itself asks again for ever, and says nothing.
    """

    def __init__(
        self,
        cluster: Cluster,
        client_id: str,
        *,
        max_wait_ms: int = 100,
        committed: bool = False,
        fetch_bytes: int = MAX_MESSAGE_BYTES,
        stalled_s: float = STALLED_S,
    ) -> None:
        """`max_wait_ms` is how long an idle fetch stays with the brokers; a new assignment waits for it to return.

        `fetch_bytes` bounds what is fetched of a partition at a time; a larger record comes whole all the same.
        """
        self._cluster = cluster
        self._stalled_s = stalled_s
        self.consumer = make_consumer(
            cluster, client_id, max_wait_ms=max_wait_ms, committed=committed, fetch_bytes=fetch_bytes
        )

    async def start(self) -> None:
        """Connect. Raises as `start_client` does."""
        await start_client(self._cluster, self.consumer)

    async def stop(self) -> None:
        """Close."""
        await close("reader", self.consumer.stop())

    async def __aenter__(self) -> LogReader:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def assign(self, topics: Iterable[Topic], partitions: Iterable[int] | None = None) -> list[TopicPartition]:
        """Assign all (or the named) partitions of some topics, as many as the catalogue says."""
        wanted = None if partitions is None else set(partitions)
        assignment = [
            TopicPartition(topic.name, partition)
            for topic in topics
            for partition in range(topic.partitions)
            if wanted is None or partition in wanted
        ]
        self.consumer.assign(assignment)
        return assignment

    async def ends(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """The ends of these partitions, of which none is read.

        They are assigned for that: the client asks for the metadata of what it is assigned at once, and of other
        topics one after the other, a tenth of a second each.
        """
        if self.consumer.assignment() != set(partitions):
            self.consumer.assign(list(partitions))
            self.consumer.pause(*partitions)
        ends: dict[TopicPartition, int] = await self.consumer.end_offsets(list(partitions))
        return ends

    def release(self) -> None:
        """Give the assignment up: an idle reader asks the brokers for nothing."""
        self.consumer.unsubscribe()

    async def seek_to_time(self, assignment: Sequence[TopicPartition], since_ms: int) -> None:
        """Position each partition at its first record of `since_ms` (Unix ms) or later; at its end if there is none."""
        # Negative times have meanings of their own in the protocol, and this client asks again and again.
        found = await self.consumer.offsets_for_times(dict.fromkeys(assignment, max(0, since_ms)))
        ends = await self.consumer.end_offsets(list(assignment))
        for partition in assignment:
            at = found.get(partition)
            self.consumer.seek(partition, at.offset if at is not None else ends[partition])

    async def read_to_end(
        self, assignment: Sequence[TopicPartition], ends: Mapping[TopicPartition, int] | None = None
    ) -> AsyncIterator[Record]:
        """Every record from the current positions to before `ends`, or the ends as they are now; then stand there."""
        async for records in self.batches_to_end(assignment, ends):
            for record in records:
                yield record

    async def batches_to_end(
        self, assignment: Sequence[TopicPartition], ends: Mapping[TopicPartition, int] | None = None
    ) -> AsyncIterator[list[Record]]:
        """The same as lists of at most `MAX_BATCH` records of one partition, for those who write them somewhere."""
        if ends is None:
            ends = await self.consumer.end_offsets(list(assignment))
        open_ = [at for at in assignment if await self.position(at) < ends[at]]
        while open_:
            for at, records in (await self.more(open_)).items():
                yield [record for record in records if record.offset < ends[at]]
            for at in list(open_):
                if await self.position(at) >= ends[at]:
                    open_.remove(at)
                    # A fetch may have gone past the end as it was: the next call begins where this one ended.
                    self.consumer.seek(at, ends[at])

    async def position(self, partition: TopicPartition) -> int:
        """The offset of what comes next of an assigned partition. Raises `KafkaTimeoutError`."""
        async with self._patience(partition):
            return int(await self.consumer.position(partition))

    async def more(
        self, partitions: Sequence[TopicPartition], *, max_records: int = MAX_BATCH
    ) -> dict[TopicPartition, list[Record]]:
        """What comes next of some partitions that are known to have more; waits until it is there.

        Empty when a position went on without a record: marks of transactions, and what was taken back, have offsets
        too. Raises `KafkaTimeoutError`.
        """
        async with self._patience(*partitions):
            before = [await self.consumer.position(at) for at in partitions]
            while True:
                found: dict[TopicPartition, list[Record]] = await self.consumer.getmany(
                    *partitions, timeout_ms=POLL_MS, max_records=max_records
                )
                if found or [await self.consumer.position(at) for at in partitions] != before:
                    return found

    @asynccontextmanager
    async def _patience(self, *partitions: TopicPartition) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._stalled_s):
                yield
        except TimeoutError as error:
            names = ", ".join(sorted({f"{at.topic}/{at.partition}" for at in partitions}))
            raise KafkaTimeoutError(f"nothing moved in {self._stalled_s:g} s though there is more: {names}") from error
