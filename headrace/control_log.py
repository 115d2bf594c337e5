"""The control topics in Kafka, read whole: what the control processor starts from and what a rebuild restores."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import structlog
from aiokafka import TopicPartition

from headrace.settings import Settings
from schemas import control
from schemas.audit import AuditHead
from schemas.control import RECORDS, Price
from topics.catalogue import CONTROL_RECORDS, Topic
from topics.clients import LogReader
from topics.cluster import Cluster
from topics.record import Record

log = structlog.get_logger(__name__)

_TYPES: dict[str, type[control.Record | Price | AuditHead]] = {**RECORDS, "prices": Price, "audit_heads": AuditHead}


class CommittedReader(LogReader):
    """A log reader that sees only committed transactions; the control processor writes in transactions."""

    def __init__(self, cluster: Cluster, client_id: str) -> None:
        super().__init__(cluster, client_id, committed=True)


class Replay:
    """The newest record of each key, by kind, and how far each topic was read."""

    def __init__(self, reader: LogReader, topics: Mapping[str, Topic] = CONTROL_RECORDS) -> None:
        self._reader = reader
        self._topics = topics
        self._kinds = {topic.name: kind for kind, topic in topics.items()}
        self._assignment: list[TopicPartition] = []
        self.records: dict[str, dict[str, bytes]] = {kind: {} for kind in topics}
        self.offsets: dict[str, int] = dict.fromkeys(self._kinds, 0)
        """Next offset of each topic, past the marks that end transactions."""

    async def read_on(self) -> int:
        """Read to the ends as they are now; the number of records read. Between two calls nothing is fetched."""
        consumer = self._reader.consumer
        if not self._assignment:
            self._assignment = self._reader.assign(self._topics.values())
            await consumer.seek_to_beginning(*self._assignment)
        ends = await consumer.end_offsets(self._assignment)
        count = 0
        while behind := [at for at in self._assignment if await self._reader.position(at) < ends[at]]:
            consumer.resume(*behind)
            # What came after the ends is taken too, and not only passed over: the positions must be true.
            for records in (await self._reader.more(behind)).values():
                for record in records:
                    self._take(record)
                    count += 1
        # A fetch that waits would hold up the next question for the ends: a broker answers one connection in order.
        consumer.pause(*self._assignment)
        for at in self._assignment:
            self.offsets[at.topic] = await self._reader.position(at)
        return count

    def _take(self, record: Record) -> None:
        held, key = self.records[self._kinds[record.topic]], (record.key or b"").decode()
        if record.value is not None and self._readable(record):
            held[key] = record.value
        else:
            held.pop(key, None)

    def _readable(self, record: Record) -> bool:
        """Whether a record is what its topic should carry; one that is not counts as a deletion.

        Only the control processor may write these topics, so that this is damage. To keep an older record instead
        would make the result depend on how far the broker has compacted.
        """
        try:
            msgspec.json.decode(record.value or b"", type=_TYPES[self._kinds[record.topic]])
        except msgspec.DecodeError as error:
            log.error("control_record_unreadable", topic=record.topic, offset=record.offset, error=str(error))
            return False
        return True


async def replay_control(settings: Settings, topics: Mapping[str, Topic] = CONTROL_RECORDS) -> Replay:
    """Read the control topics from their beginnings to their ends as they are now."""
    async with CommittedReader(settings.kafka, f"control-replay-{settings.instance}") as reader:
        replay = Replay(reader, topics)
        await replay.read_on()
    return replay


async def end_offsets(settings: Settings, topics: Mapping[str, Topic] = CONTROL_RECORDS) -> dict[str, int]:
    """The end offset of each control topic's only partition, with transactions that are still open."""
    async with LogReader(settings.kafka, f"control-ends-{settings.instance}") as reader:
        found = await reader.consumer.end_offsets(reader.assign(topics.values()))
    return {partition.topic: offset for partition, offset in found.items()}
