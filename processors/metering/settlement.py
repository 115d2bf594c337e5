"""Settlement: the deciding terminals of the log charge what they came to, and give back what was reserved.

A projection of `inference.log` into Redis, which keeps how far it is: a terminal counts once however often it is read,
and what Redis missed while it was away comes when it is back. It reads the log itself, beside the metering agent: that
one waits for company, and for its own writes, while somebody may be waiting for the place of a request that has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

import msgspec
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from headrace import metrics
from headrace.errors import Unavailable
from headrace.limits.charge import charge
from headrace.limits.limiter import Limiter, Settled
from headrace.settings import Settings
from processors.metering.forgetful import Forgetful
from schemas.ids import is_idempotent
from topics import request_log
from topics.catalogue import DAY_MS, LOG
from topics.clients import LogReader
from topics.log_memory import LONGEST_REQUEST_MS, warm
from topics.record import Record

log = structlog.get_logger(__name__)

RETRY_S = 0.25
FETCH_WAIT_MS = 500
REAP_EVERY_S = 5.0
REAP_AFTER_MS = 30_000
"""How long a reservation is bound before anybody asks the log whether its request has ended. The log decides."""
REAP_AT_ONCE = 1000
SEARCHES = 10
"""Requests that are looked for in the old log in one round."""


class Settlement:
    """Settles the partitions that this member of the metering group has."""

    def __init__(self, settings: Settings, limiter: Limiter) -> None:
        self._settings = settings
        self._limiter = limiter
        self._partitions: frozenset[int] = frozenset()
        self._changed = asyncio.Event()
        self._views: dict[int, Forgetful] = {}

    def gained(self, partitions: frozenset[int]) -> None:
        """These are ours from now on."""
        self._partitions |= partitions
        self._changed.set()

    def lost(self, partitions: frozenset[int]) -> None:
        """Another settles these; that both may do so for a moment is harmless, since each offset counts once."""
        self._partitions -= partitions
        for partition in partitions:
            self._views.pop(partition, None)
        self._changed.set()

    async def run(self) -> None:
        """Settle for ever."""
        while True:
            try:
                await self._follow()
            except (Unavailable, KafkaError) as error:
                log.warning("settlement_waits", error=repr(error))
                await asyncio.sleep(RETRY_S)

    async def _follow(self) -> None:
        """Settle until the partitions change, or Redis is made anew."""
        self._changed.clear()
        if not self._partitions:
            await self._changed.wait()
            return
        state = await self._limiter.state()
        if not state.whole:
            raise Unavailable("Redis is being filled.")
        async with LogReader(self._settings.kafka, "metering-settlement", max_wait_ms=FETCH_WAIT_MS) as reader:
            assignment = reader.assign([LOG], self._partitions)
            claimed = {tp: state.offsets.get(tp.partition, 0) for tp in assignment}
            await self._seek(reader, claimed)
            # A view that has seen more than Redis has settled would take what comes again for settled.
            self._views = {at: view for at, view in self._views.items() if view.position == state.offsets.get(at)}
            reap_at = asyncio.get_running_loop().time()
            while not self._changed.is_set():
                batches = await reader.consumer.getmany(*assignment, timeout_ms=FETCH_WAIT_MS)
                for tp, records in batches.items():
                    if not await self._settle(reader, claimed, tp, records):
                        return
                if asyncio.get_running_loop().time() >= reap_at:
                    await self._reap()
                    reap_at = asyncio.get_running_loop().time() + REAP_EVERY_S

    async def _seek(self, reader: LogReader, claimed: Mapping[TopicPartition, int]) -> None:
        """Go on where Redis is. A log that ends before was made anew, so that Redis must be as well."""
        ends = await reader.consumer.end_offsets(list(claimed))
        starts = await reader.consumer.beginning_offsets(list(claimed))
        for tp, offset in claimed.items():
            if offset > ends[tp]:
                await self._limiter.invalidate()
                raise Unavailable(f"Redis has settled {LOG.name}/{tp.partition} beyond its end.")
            reader.consumer.seek(tp, max(offset, starts[tp]))

    async def _settle(
        self, reader: LogReader, claimed: dict[TopicPartition, int], tp: TopicPartition, records: Sequence[Record]
    ) -> bool:
        """Settle what was read of a partition; False when Redis must be asked anew where it is."""
        view = self._views.get(tp.partition)
        if view is None:
            first = records[0]
            since_ms = first.timestamp - LONGEST_REQUEST_MS
            past = await warm(self._settings.kafka, "settlement-warm-up", tp.partition, first.offset, since_ms)
            view = Forgetful(past, first.offset)
            self._views[tp.partition] = view
        items = _decided(view, records)
        next_offset = records[-1].offset + 1
        view.position = next_offset
        held = await self._limiter.settle(tp.partition, claimed[tp], next_offset, items)
        if held is None or held < next_offset:
            return False
        claimed[tp] = next_offset
        return True

    # --- the reaper -------------------------------------------------------------------------------------------

    async def _reap(self) -> None:
        """Give back what was reserved for requests that had ended by then: records that a router read again late."""
        found = await self._limiter.open(bound_us=REAP_AFTER_MS * 1000, limit=REAP_AT_ONCE)
        metrics.RESERVATIONS.labels(state="pending").set(found.pending)
        metrics.RESERVATIONS.labels(state="bound").set(found.bound)
        searches = SEARCHES
        now_ms = (await self._limiter.state()).now_us // 1000
        for ref, bound_us in found.oldest:
            request_id = ref.rpartition(":")[2]
            view = self._views.get(LOG.partition_of(request_id))
            if view is None:
                continue  # another member's, or nothing was read of it yet
            ended = view.view.decided(request_id)
            if not ended and now_ms - bound_us // 1000 > LONGEST_REQUEST_MS and searches:
                searches -= 1
                ended = await self._has_ended(request_id, bound_us // 1000)
            if ended and await self._limiter.reap(ref):
                metrics.RESERVATIONS_REAPED.inc()
                log.info("reservation_reaped", ref=ref)

    async def _has_ended(self, request_id: str, bound_ms: int) -> bool:
        """Whether the log has a deciding terminal of a request, as far back as its record could be read again."""
        back_ms = DAY_MS if is_idempotent(request_id) else LONGEST_REQUEST_MS
        tp = TopicPartition(LOG.name, LOG.partition_of(request_id))
        async with LogReader(self._settings.kafka, "metering-reaper") as reader:
            reader.assign([LOG], [tp.partition])
            await reader.seek_to_time([tp], bound_ms - back_ms)
            view, key = request_log.LogView(), request_id.encode()
            async for record in reader.read_to_end([tp]):
                if record.key == key:
                    with contextlib.suppress(msgspec.MsgspecError):
                        view.apply(request_log.decode(record.value or b""))
        return view.decided(request_id)


def _decided(view: Forgetful, records: Sequence[Record]) -> list[Settled]:
    """What the terminals among these records that decide come to."""
    found = []
    for record in records:
        try:
            terminal = view.view.apply(request_log.decode(record.value or b""))
        except msgspec.MsgspecError:
            continue  # the metering agent buries it
        if terminal is not None:
            view.ended(terminal.request_id, record.timestamp)
            found.append(charge(terminal, record.offset, record.timestamp))
    return found
