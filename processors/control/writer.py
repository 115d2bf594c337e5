"""The pen of the control topics: a transactional producer, so that Kafka itself refuses a writer that was replaced."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.structs import RecordMetadata

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


class _Batch(NamedTuple):
    """Records on their way to one topic."""

    places: list[int]
    """Where they stand among those that were to be written."""
    sent: asyncio.Future[RecordMetadata]


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
        kinds: dict[str, list[int]] = defaultdict(list)
        for place, write in enumerate(writes):
            kinds[write.kind].append(place)
        offsets = [0] * len(writes)
        async with self._inner.transaction():
            sent = [batch for kind, places in kinds.items() async for batch in self._send(kind, places, writes)]
            for batch, metadata in zip(sent, await asyncio.gather(*(batch.sent for batch in sent)), strict=True):
                for at, place in enumerate(batch.places):
                    offsets[place] = metadata.offset + at
        return offsets

    async def _send(self, kind: str, places: Sequence[int], writes: Sequence[Write]) -> AsyncIterator[_Batch]:
        """Send the writes of one kind, in batches of our own: a future for each record costs more than the record."""
        topic, batch, held = _WRITTEN[kind].name, self._inner.create_batch(), list[int]()
        for place in places:
            key, value = writes[place].key.encode(), writes[place].value
            if batch.append(timestamp=None, key=key, value=value) is None:
                yield _Batch(held, await self._inner.send_batch(batch, topic, partition=0))
                batch, held = self._inner.create_batch(), []
                batch.append(timestamp=None, key=key, value=value)  # the first is taken whatever its size
            held.append(place)
        yield _Batch(held, await self._inner.send_batch(batch, topic, partition=0))
