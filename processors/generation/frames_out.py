"""The frame writer: deltas of many requests go to Kafka in few records, the first of each request at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from aiokafka.structs import RecordMetadata

from headrace import metrics
from topics import frames
from topics.catalogue import frames_at
from topics.clients import Producer

log = structlog.get_logger(__name__)

FLUSH_S = 0.010
"""Deltas of streamed answers wait at most this long for company."""
BUSY_FLUSH_S = 0.020
"""The same while many arrive: a frame costs the brokers and both sides far more than a delta in it."""
BUSY_DELTAS_PER_S = 4000
"""What counts as many, on one partition."""
COARSE_FLUSH_S = 0.250
"""Deltas of answers that nobody watches arrive are only kept so that they can be metered after a crash."""
MAX_DELTAS = 4096


class FrameWriter:
    """Buffers deltas by reply partition and writes them in order. One writer serves a worker's whole process."""

    def __init__(self, producer: Producer, fail: Callable[[BaseException], None]) -> None:
        self._producer = producer
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._buffers: dict[int, list[frames.Delta]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._due: dict[int, float] = {}
        self._delays: dict[int, float] = {}
        self._last: dict[int, asyncio.Task[None]] = {}
        self._posting = asyncio.Lock()

    def add(self, partition: int, delta: frames.Delta, *, urgent: bool = False, coarse: bool = False) -> None:
        """Take a delta. `urgent` (the first of a streamed request) goes out at once, with all that waits beside it."""
        buffer = self._buffers.setdefault(partition, [])
        buffer.append(delta)
        if urgent or len(buffer) >= MAX_DELTAS:
            self._flush(partition)
        else:
            self._arm(partition, COARSE_FLUSH_S if coarse else self._delays.get(partition, FLUSH_S))

    def _arm(self, partition: int, delay: float) -> None:
        due = self._loop.time() + delay
        if (timer := self._timers.get(partition)) is not None:
            if self._due[partition] <= due:
                return
            timer.cancel()
        self._due[partition] = due
        self._timers[partition] = self._loop.call_at(due, self._flush, partition)

    def _flush(self, partition: int) -> None:
        if (timer := self._timers.pop(partition, None)) is not None:
            timer.cancel()
        deltas = self._buffers.pop(partition, None)
        if deltas:
            many = len(deltas) > BUSY_DELTAS_PER_S * self._delays.get(partition, FLUSH_S)
            self._delays[partition] = BUSY_FLUSH_S if many else FLUSH_S
            before = self._last.get(partition)
            self._last[partition] = self._loop.create_task(self._write(partition, deltas, before))

    async def _write(self, partition: int, deltas: list[frames.Delta], before: asyncio.Task[None] | None) -> None:
        topic, number = frames_at(partition)
        try:
            async with self._posting:  # fair, so records are posted in the order in which they were flushed
                sent: asyncio.Future[RecordMetadata] = await self._producer.post(
                    topic.name, frames.encode(deltas), partition=number
                )
            metrics.FRAMES.inc()
            await sent
            if before is not None and not before.done():
                await before
        except Exception as error:
            self._fail(error)
            raise

    async def settle(self, partition: int) -> None:
        """Return when all that was added for a partition is durable. Raises `KafkaError`."""
        self._flush(partition)
        if (last := self._last.get(partition)) is not None:
            await asyncio.shield(last)
