"""The reply reader: one partition of `inference.replies`, whose deltas go to the streams of this ingress's callers."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncGenerator
from typing import NamedTuple

import msgspec
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from headrace import metrics
from ingress.streams import Stream
from topics import frames
from topics.catalogue import REPLIES
from topics.clients import LogReader, Producer, close, make_consumer
from topics.cluster import Cluster
from topics.dead_letters import bury
from topics.record import Record

log = structlog.get_logger(__name__)

SILENCE_S = 5.0
"""After so much silence a stream is woken, so that it can look for its result elsewhere, or say that it waits."""
SWEEP_S = 0.5
WRITE_TIMEOUT_S = 30.0
"""A caller that takes nothing for this long is cut off."""


def own_partition(instance: str) -> int:
    """The reply partition that an instance reads. Instances may share one: each ignores what is not its own."""
    return zlib.crc32(instance.encode()) % REPLIES.partitions


class ReplyReader:
    """Reads this instance's partition from its end on, and hands each delta to the streams that wait for it."""

    def __init__(self, cluster: Cluster, instance: str, producer: Producer) -> None:
        self.partition = own_partition(instance)
        self.ready = False
        """Whether the end of the partition is known: answers to requests published from now on will be seen."""
        self._producer = producer
        self._burying: set[asyncio.Task[None]] = set()
        self._consumer = make_consumer(cluster, f"{instance}-replies")
        self._streams: dict[bytes, list[Stream]] = {}
        self._open: set[Stream] = set()

    def opened(self, stream: Stream) -> None:
        """A caller waits on this stream, wherever its deltas come from."""
        self._open.add(stream)
        metrics.OPEN_STREAMS.set(len(self._open))

    def closed(self, stream: Stream) -> None:
        """The caller is gone, or has its answer."""
        self._open.discard(stream)
        metrics.OPEN_STREAMS.set(len(self._open))

    def attach(self, stream: Stream) -> None:
        """Give a stream its deltas from now on."""
        self._streams.setdefault(stream.rid, []).append(stream)

    def detach(self, stream: Stream) -> None:
        """Stop giving."""
        streams = self._streams.get(stream.rid, [])
        if stream in streams:
            streams.remove(stream)
        if not streams:
            self._streams.pop(stream.rid, None)

    async def sweep(self) -> None:
        """Wake the streams that nothing came for, and cut the callers that take nothing, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = loop.time()
            for stream in list(self._open):
                stream.look(now, SILENCE_S, WRITE_TIMEOUT_S)

    def wake_all(self) -> None:
        """Let every stream look at the state of the process."""
        for stream in self._open:
            stream.wake()

    async def run(self) -> None:
        """Read for ever. Raises `KafkaError` where the client gives up."""
        await self._consumer.start()
        try:
            tp = TopicPartition(REPLIES.name, self.partition)
            self._consumer.assign([tp])
            self._consumer.seek(tp, (await self._consumer.end_offsets([tp]))[tp])
            self.ready = True
            while True:
                batches = await self._consumer.getmany(timeout_ms=5000)
                for records in batches.values():
                    for record in records:
                        self._dispatch(record)
                if batches:
                    metrics.REPLY_LAG.set(max(0, (self._consumer.highwater(tp) or 0) - records[-1].offset - 1))
                    # Callers write between two batches, so that a full broker buffer cannot starve them.
                    await asyncio.sleep(0)
        finally:
            self.ready = False
            await close("replies", self._consumer.stop())

    def _dispatch(self, record: Record) -> None:
        try:
            deltas = frames.decode(record.value or b"")
        except msgspec.MsgspecError as error:
            # Not awaited: nobody's tokens wait for a dead letter.
            task = asyncio.create_task(self._bury(record, str(error)))
            self._burying.add(task)
            task.add_done_callback(self._burying.discard)
            return
        streams = self._streams
        for delta in deltas:
            waiting = streams.get(delta.rid)
            if waiting is not None:
                for stream in waiting:
                    stream.push(delta)

    async def _bury(self, record: Record, reason: str) -> None:
        try:
            await bury(self._producer, record, reason=reason, role="ingress")
        except KafkaError as error:
            log.error("not_buried", topic=REPLIES.name, offset=record.offset, reason=reason, error=repr(error))


class Replayed(NamedTuple):
    """A piece of a partition's past."""

    deltas: list[frames.Delta]
    caught_up: bool
    """Whether all that stood in the partition when the replay began has been read."""


async def replay(cluster: Cluster, partition: int, since_ms: int, rid: bytes) -> AsyncGenerator[Replayed, None]:
    """A request's deltas from a partition's past, then from its present, for ever; in batches, fences included.

    `since_ms` is Unix ms at or before the first of them. Deltas come as they are written, unjudged. Raises
    `KafkaError`.
    """
    tp = TopicPartition(REPLIES.name, partition)
    async with LogReader(cluster, "ingress-resume") as reader:
        reader.assign([REPLIES], [partition])
        end = (await reader.consumer.end_offsets([tp]))[tp]
        await reader.seek_to_time([tp], since_ms)
        while True:
            batches = await reader.consumer.getmany(timeout_ms=1000)
            found: list[frames.Delta] = []
            for records in batches.values():
                for record in records:
                    if rid in (record.value or b""):
                        with contextlib.suppress(msgspec.MsgspecError):  # Who reads the partition buries it.
                            found += [delta for delta in frames.decode(record.value) if delta.rid == rid]
            yield Replayed(found, await reader.position(tp) >= end)
