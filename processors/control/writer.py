"""The pen of the control topics: a transactional producer, so that Kafka itself refuses a writer that was replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiokafka import AIOKafkaProducer

from processors.control.state import Write
from topics.catalogue import AUDIT_EVENTS, AUDIT_HEADS, CONTROL_PRICES, CONTROL_RECORDS, Topic
from topics.clients import close
from topics.cluster import Cluster, start_client

TOPICS: dict[str, Topic] = CONTROL_RECORDS | {"prices": CONTROL_PRICES}
"""The compacted topic of each kind of record that the control processor writes."""
AUDIT_TOPICS: dict[str, Topic] = {"audit": AUDIT_EVENTS, "audit_heads": AUDIT_HEADS}
"""Where the same transactions say who did what."""
_WRITTEN = TOPICS | AUDIT_TOPICS
TRANSACTIONAL_ID = "headrace-control"
"""One for the whole cluster: whoever starts with it last is the writer, and every earlier one is fenced."""
TRANSACTION_TIMEOUT_MS = 10_000
BATCH_BYTES = 512 * 1024
"""Records of a topic that are sent at once; the client waits for one batch before it sends the next."""


class Writer:
    """Writes records in transactions: all of a batch or none."""

    def __init__(self, cluster: Cluster, client_id: str) -> None:
        self._cluster = cluster
        self._inner = AIOKafkaProducer(
            **cluster.options(),
            client_id=client_id,
            acks="all",
            enable_idempotence=True,
            transactional_id=TRANSACTIONAL_ID,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            request_timeout_ms=15_000,
            max_batch_size=BATCH_BYTES,
        )

    async def start(self) -> None:
        """Become the writer: ends what an earlier one left open, and fences it."""
        await start_client(self._cluster, self._inner)

    async def stop(self) -> None:
        """Close. A transaction that was left open is ended by the next writer."""
        await close("control", self._inner.stop())

    async def write(self, writes: Sequence[Write]) -> list[int]:
        """Write records durably, all or none; their offsets, in order.

        Raises `ProducerFenced` when another writer has begun, other `KafkaError` when the brokers did not acknowledge.
        """
        if not writes:
            return []
        async with self._inner.transaction():
            futures = [
                await self._inner.send(_WRITTEN[write.kind].name, write.value, key=write.key.encode(), partition=0)
                for write in writes
            ]
            acknowledged = await asyncio.gather(*futures)
        return [metadata.offset for metadata in acknowledged]
