"""Taking a pool: a new term, and the live set as the topics hold it."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import structlog
from aiokafka import TopicPartition

from processors.scheduler.state import Request, Running
from schemas.events import LiveRequest, PoolTerm, Routed
from topics.catalogue import LIVE, POOL_TERMS, ROUTED
from topics.clients import LogReader, Producer
from topics.outcomes import now_ms

log = structlog.get_logger(__name__)

_live = msgspec.json.Decoder(LiveRequest)
_routed = msgspec.json.Decoder(Routed)


@dataclass(slots=True)
class LiveSet:
    """What `scheduler.live` holds of one partition."""

    requests: list[LiveRequest] = field(default_factory=list)
    """Requests without a tombstone."""
    finished: set[str] = field(default_factory=set)
    """Requests whose tombstone is still there (a day)."""


async def take_term(producer: Producer, pool: str, instance: str) -> int:
    """Append this scheduler's claim; its offset is the term. Raises `KafkaError`."""
    claim = PoolTerm(pool, instance, now_ms())
    written = await producer.send(POOL_TERMS.name, msgspec.json.encode(claim), key=pool)
    return int(written.offset)


async def read_live(reader: LogReader, partition: int) -> LiveSet:
    """Read a partition of `scheduler.live` whole."""
    last: dict[str, LiveRequest | None] = {}
    assignment = reader.assign([LIVE], [partition])
    await reader.consumer.seek_to_beginning(*assignment)
    async for record in reader.read_to_end(assignment):
        if record.key is not None:
            last[record.key.decode()] = _live.decode(record.value) if record.value is not None else None
    found = LiveSet()
    for request_id, live in last.items():
        if live is None:
            found.finished.add(request_id)
        else:
            found.requests.append(live)
    return found


async def read_routed(reader: LogReader, live: list[LiveRequest]) -> dict[str, Routed]:
    """The routed records of live requests, by id; one that retention took is missing."""
    found: dict[str, Routed] = {}
    for request in sorted(live, key=lambda known: known.routed_offset):
        tp = TopicPartition(ROUTED.name, request.routed_partition)
        if reader.consumer.assignment() != {tp}:
            reader.consumer.assign([tp])
        reader.consumer.seek(tp, request.routed_offset)
        record = await reader.consumer.getone(tp)
        if record.offset != request.routed_offset or record.value is None:
            log.error("routed_record_gone", request_id=request.request_id, offset=request.routed_offset)
            continue
        found[request.request_id] = _routed.decode(record.value)
    return found


def restored(live: LiveRequest, routed: Routed) -> Running:
    """A live request that had been assigned, as the policy keeps it."""
    request = Request(live.request_id, live.tenant, live.model, live.accepted_ms, routed.deadline_ms, live.attempt)
    return Running(request, live.worker, live.boot, live.epoch)
