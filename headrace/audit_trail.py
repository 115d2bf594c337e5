"""Reading the audit trail out of Kafka: its newest events, a page of those that match, and whether it is whole."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
from aiokafka import TopicPartition

from headrace import audit
from headrace.audit_chain import Check, Place, Verdict
from headrace.control_log import CommittedReader, replay_control
from headrace.settings import Settings
from schemas.audit import AuditEvent, AuditHead
from topics.catalogue import AUDIT_EVENTS, AUDIT_HEADS
from topics.clients import LogReader

WINDOW = 2_000
"""Offsets that are read at a time, from the newest back."""
MAX_SCAN = 200_000
"""Offsets that one page may look through."""
_NOTED = re.compile(r"(\d+) ([0-9a-f]{64})")
_event = msgspec.json.Decoder(AuditEvent)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events are wanted; what is empty, or 0, does not matter."""

    actor: str = ""
    kind: str = ""
    key: str = ""
    action: str = ""
    outcome: str = ""
    since_ms: int = 0
    until_ms: int = 0

    def said(self) -> dict[str, str]:
        """What is asked for, as the trail says who looked for it."""
        return audit.only({name: value or None for name, value in dataclasses.asdict(self).items()})

    def takes(self, event: AuditEvent) -> bool:
        """Whether an event is wanted."""
        names = ("actor", "kind", "key", "action", "outcome")
        return (
            all(getattr(self, name) in ("", getattr(event, name)) for name in names)
            and event.at_ms >= self.since_ms
            and (not self.until_ms or event.at_ms < self.until_ms)
        )


@dataclass(frozen=True, slots=True)
class Page:
    """Events that match, the newest first."""

    events: list[AuditEvent]
    next: int | None
    """Where the next page goes on; None when nothing older is kept."""


async def heads(settings: Settings) -> list[AuditHead]:
    """The anchored heads, one a day, oldest first."""
    found = (await replay_control(settings, {"audit_heads": AUDIT_HEADS})).records["audit_heads"].values()
    return sorted((msgspec.json.decode(raw, type=AuditHead) for raw in found), key=lambda head: head.seq)


async def newest(settings: Settings, count: int) -> list[AuditEvent]:
    """About the last `count` events that can be read, oldest first."""
    async with CommittedReader(settings.kafka, f"audit-newest-{settings.instance}") as reader:
        [partition] = reader.assign([AUDIT_EVENTS])
        begin, end = await _bounds(reader, partition)
        # Every second offset may be the mark that ends a transaction.
        return [event for _, event in await _between(reader, partition, max(begin, end - 2 * count), end)]


async def page(settings: Settings, wanted: Filter, *, limit: int, before: int | None = None) -> Page:
    """Up to `limit` events that match, from offset `before` back (the newest by default).

    It may be shorter though there is more: one page looks through `MAX_SCAN` offsets at most.
    """
    found: list[AuditEvent] = []
    async with CommittedReader(settings.kafka, f"audit-page-{settings.instance}") as reader:
        [partition] = reader.assign([AUDIT_EVENTS])
        begin, end = await _bounds(reader, partition)
        end = end if before is None else min(end, before)
        lowest = max(begin, end - MAX_SCAN)
        while end > lowest:
            start = max(lowest, end - WINDOW)
            for offset, event in reversed(await _between(reader, partition, start, end)):
                if event.at_ms < wanted.since_ms:
                    return Page(found, None)
                if wanted.takes(event):
                    found.append(event)
                    if len(found) == limit:
                        return Page(found, offset if offset > begin else None)
            end = start
    return Page(found, end if end > begin else None)


async def _bounds(reader: LogReader, partition: TopicPartition) -> tuple[int, int]:
    begins = await reader.consumer.beginning_offsets([partition])
    ends = await reader.consumer.end_offsets([partition])
    return int(begins[partition]), int(ends[partition])


async def _between(reader: LogReader, partition: TopicPartition, start: int, end: int) -> list[tuple[int, AuditEvent]]:
    """The events from `start` to before `end`, with their offsets; what is no event is left to `verify`."""
    found: list[tuple[int, AuditEvent]] = []
    reader.consumer.seek(partition, start)
    async for record in reader.read_to_end([partition], {partition: end}):
        try:
            found.append((record.offset, _event.decode(record.value or b"")))
        except msgspec.MsgspecError:
            continue
    return found


def noted(lines: Iterable[str]) -> list[Place]:
    """The heads in lines of the form `SEQ HASH`, as `headrace audit verify` prints them. Raises `ValueError`."""
    found = []
    for line in lines:
        match = _NOTED.match(line.strip())
        if match is None:
            raise ValueError(f"{line.strip()!r} is not of the form 'SEQ HASH'")
        found.append(Place(int(match[1]), match[2]))
    return found


async def verify(settings: Settings, witnesses: Sequence[Place] = ()) -> Verdict:
    """Check all that is kept of the trail: against its chain, the anchored heads, and heads noted elsewhere."""
    before = await heads(settings)
    now_ms = time.time_ns() // 1_000_000
    # A head that was noted tells no time: it is held against what is kept, and never taken for cut off too early.
    told = [AuditHead(place.seq, place.hash, 0) for place in witnesses]
    check = Check([*before, *told], now_ms=now_ms, retention_ms=AUDIT_EVENTS.retention_ms or now_ms)
    async with CommittedReader(settings.kafka, f"audit-verify-{settings.instance}") as reader:
        [partition] = reader.assign([AUDIT_EVENTS])
        _, end = await _bounds(reader, partition)
        await reader.consumer.seek_to_beginning(partition)
        async for record in reader.read_to_end([partition], {partition: end}):
            check.take(record.value)
    return check.end(await heads(settings))
