"""Frames of the dead: what lost attempts had sent, read up to the fence that ends their say."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import structlog
from aiokafka import TopicPartition

from topics import frames
from topics.catalogue import frames_at
from topics.clients import LogReader
from topics.cluster import Cluster
from topics.fold import Fold

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Sent:
    """What callers may have seen of a request, over all its attempts."""

    last_seq: int = 0
    tokens: int = 0
    first_ms: int = 0
    """When the first of it was written, by the broker's clock."""
    answer: Fold = field(default_factory=Fold)

    @property
    def empty(self) -> bool:
        """Whether nothing was sent, so that another attempt may start from the beginning."""
        return self.last_seq == 0

    def add(self, delta: frames.Delta, at_ms: int) -> None:
        """Take a frame that counts."""
        self.first_ms = self.first_ms or at_ms
        self.last_seq = delta.seq
        self.tokens += delta.tokens
        self.answer.delta(delta)


async def sent_frames(cluster: Cluster, partition: int, wanted: dict[str, int], since_ms: int) -> dict[str, Sent]:
    """What each request of `wanted` (id -> offset of its fence) had sent on a reply partition, in one pass.

    Frames before the fence count, later ones do not. `since_ms` (Unix ms) is when the oldest of them was accepted.
    """
    found = {bytes.fromhex(request_id): Sent() for request_id in wanted}
    views = {rid: frames.StreamView() for rid in found}
    fences = {bytes.fromhex(request_id): offset for request_id, offset in wanted.items()}
    topic, number = frames_at(partition)
    tp = TopicPartition(topic.name, number)
    async with LogReader(cluster, "scheduler-recovery") as reader:
        reader.assign([topic], [number])
        await reader.seek_to_time([tp], since_ms)
        async for record in reader.read_to_end([tp]):
            try:
                deltas = frames.decode(record.value or b"")
            except msgspec.MsgspecError:
                log.error("unreadable", topic=topic.name, partition=number, offset=record.offset)
                continue
            for delta in deltas:
                view = views.get(delta.rid)
                if view is not None and record.offset < fences[delta.rid] and view.accept(delta):
                    found[delta.rid].add(delta, record.timestamp)
    return {rid.hex(): sent for rid, sent in found.items()}
