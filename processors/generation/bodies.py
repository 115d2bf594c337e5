"""Bodies too large to travel through every topic: read from `inference.requests` where the caller's words stand."""

from __future__ import annotations

import asyncio

from aiokafka import TopicPartition

from headrace.errors import ProviderError
from schemas.events import BodyRef
from topics.catalogue import REQUESTS
from topics.clients import LogReader
from topics.cluster import Cluster


class Bodies:
    """Fetches bodies by reference, one at a time: large ones are rare."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._reader: LogReader | None = None
        self._lock = asyncio.Lock()

    async def fetch(self, ref: BodyRef, *, timeout_s: float = 20.0) -> bytes:
        """The body at `ref`. Raises `ProviderError` when retention took it or the brokers do not answer."""
        async with self._lock:
            if self._reader is None:
                self._reader = LogReader(self._cluster, "worker-bodies")
                await self._reader.start()
            tp = TopicPartition(REQUESTS.name, ref.partition)
            consumer = self._reader.consumer
            consumer.assign([tp])
            consumer.seek(tp, ref.offset)
            try:
                record = await asyncio.wait_for(consumer.getone(tp), timeout_s)
            except TimeoutError:
                raise ProviderError("The request's body could not be read from Kafka in time; send it again.") from None
            self._reader.release()
            if record.offset != ref.offset or record.value is None:
                raise ProviderError("The request's body is older than the brokers keep; send it again.")
            return bytes(record.value)

    async def close(self) -> None:
        """Close the connection, if there is one."""
        if self._reader is not None:
            await self._reader.stop()
