"""Taking a pool: a new term, and the live set as the topics hold it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import structlog
from aiokafka import TopicPartition

from headrace.errors import DeadlineExceeded
from processors.scheduler.runner import waiting_request
from processors.scheduler.state import Running, Stray
from schemas.events import LiveRequest, PoolStatus, PoolTerm, PoolWishes, Routed, Status, Terminal, Timings
from topics.catalogue import LIVE, POOL_STATUS, POOL_TERMS, ROUTED, worker_commands
from topics.clients import LogReader, Producer
from topics.cluster import Cluster
from topics.outcomes import now_ms
from topics.record import Record

log = structlog.get_logger(__name__)

_live = msgspec.json.Decoder(LiveRequest)
_routed = msgspec.json.Decoder(Routed)
_status = msgspec.json.Decoder(PoolStatus)


class _Named(msgspec.Struct):
    request_id: str


class _Command(msgspec.Struct):
    """Of a command to a worker, to whom it gives what."""

    type: str = ""
    boot: str = ""
    attempt: int = 0
    epoch: int = 0
    request: _Named | None = None


_command = msgspec.json.Decoder(_Command)

STATUS_KEPT_MS = 300_000
"""What operators asked is forgotten when a pool had no scheduler for longer."""
GIVEN_MS = 30_000
"""A scheduler writes down to whom it gave a request at the same time as it tells the worker. This long before its last
sign of life it is sure to have done so."""


@dataclass(slots=True)
class LiveSet:
    """What `scheduler.live` holds of some partitions."""

    requests: list[LiveRequest] = field(default_factory=list)
    """Requests without a tombstone."""
    finished: dict[str, int] = field(default_factory=dict)
    """Requests whose tombstone is still there (a day), and when that was written (Unix ms)."""


async def take_term(producer: Producer, pool: str, instance: str) -> int:
    """Append this scheduler's claim; its offset is the term. Raises `KafkaError`."""
    claim = PoolTerm(pool, instance, now_ms())
    written = await producer.send(POOL_TERMS.name, msgspec.json.encode(claim), key=pool)
    return int(written.offset)


async def read_live(reader: LogReader, partitions: Iterable[int]) -> LiveSet:
    """Read partitions of `scheduler.live` whole."""
    assignment = reader.assign([LIVE], partitions)
    await reader.consumer.seek_to_beginning(*assignment)
    return live_of([record async for record in reader.read_to_end(assignment)])


def live_of(records: Iterable[Record]) -> LiveSet:
    """What records of `scheduler.live` say, in the order of their offsets.

    A scheduler that had lost its pool may have had records under way: they come late, with an earlier term.
    """
    last: dict[str, LiveRequest | int] = {}
    for record in records:
        if record.key is None:
            continue
        request_id = record.key.decode()
        if record.value is None:
            last[request_id] = record.timestamp
            continue
        written, known = _live.decode(record.value), last.get(request_id)
        if not isinstance(known, LiveRequest) or written.term >= known.term:
            last[request_id] = written
    found = LiveSet()
    for request_id, live in last.items():
        if isinstance(live, int):
            found.finished[request_id] = live
        else:
            found.requests.append(live)
    return found


async def read_routed(reader: LogReader, live: list[LiveRequest]) -> dict[str, Routed]:
    """The routed records of live requests of one partition, by id; one that retention took is missing."""
    found: dict[str, Routed] = {}
    if not live:
        return found
    tp = TopicPartition(ROUTED.name, live[0].routed_partition)
    reader.consumer.assign([tp])
    oldest = (await reader.consumer.beginning_offsets([tp]))[tp]
    for request in sorted(live, key=lambda known: known.routed_offset):
        if request.routed_offset < oldest:
            continue
        reader.consumer.seek(tp, request.routed_offset)
        for record in (await reader.more([tp], max_records=1)).get(tp, ()):
            if record.offset == request.routed_offset:  # Retention may take it while we read.
                found[request.request_id] = _routed.decode(record.value or b"")
    return found


async def read_status(reader: LogReader, pool: str, now_ms: int) -> tuple[PoolWishes, int | None]:
    """What operators asked of a pool, by its last status, and when a scheduler that had taken it was last alive."""
    assignment = reader.assign([POOL_STATUS])
    await reader.seek_to_time(assignment, now_ms - STATUS_KEPT_MS)
    last: PoolStatus | None = None
    alive_ms = None
    async for record in reader.read_to_end(assignment):
        if record.key == pool.encode() and record.value is not None:
            status = _status.decode(record.value)
            if last is None or status.term >= last.term:
                last = status
            if status.taken:
                alive_ms = max(status.at_ms, alive_ms or 0)
    return (last.wishes if last is not None else PoolWishes()), alive_ms


async def read_given(reader: LogReader, workers: Iterable[str], since_ms: int) -> dict[tuple[str, int], Stray]:
    """(request, attempt) -> the worker that was told to run it, by all commands since a time (Unix ms)."""
    given: dict[tuple[str, int], Stray] = {}
    names = {worker_commands(worker).name: worker for worker in workers}
    if names:
        assignment = reader.assign([worker_commands(worker) for worker in names.values()])
        await reader.seek_to_time(assignment, since_ms)
        async for record in reader.read_to_end(assignment):
            try:
                command = _command.decode(record.value or b"{}")
            except msgspec.MsgspecError:
                continue  # its worker buries it
            if command.type == "generate" and command.request is not None:
                at = Stray(names[record.topic], command.boot, command.epoch)
                given[command.request.request_id, command.attempt] = at
    return given


async def oldest_live_ms(cluster: Cluster) -> int | None:
    """When the oldest request without a terminal was accepted (Unix ms), over all pools; None when there is none."""
    async with LogReader(cluster, "scheduler-oldest") as reader:
        live = await read_live(reader, range(LIVE.partitions))
    return min((request.accepted_ms for request in live.requests), default=None)


def forgotten(live: LiveRequest) -> Terminal:
    """The end of a request whose routed record is older than the brokers keep: nobody can answer it any more."""
    late = DeadlineExceeded("The request waited longer than its record is kept; send it again.")
    return Terminal(
        request_id=live.request_id,
        tenant=live.tenant,
        attempt=max(1, live.attempt),
        epoch=live.epoch,
        status=Status.EXPIRED,
        model=live.model,
        pool=live.pool,
        worker=live.worker,
        reply_partition=live.reply_partition,
        error=late.info(),
        timings=Timings(accepted_ms=live.accepted_ms, finished_ms=now_ms()),
    )


def restored(live: LiveRequest, routed: Routed) -> Running:
    """A live request that had been assigned, as the policy keeps it."""
    request = waiting_request(routed, live.accepted_ms)
    request.attempt = live.attempt
    return Running(request, live.worker, live.boot, live.epoch, began_ms=now_ms())
