"""The chain of the audit trail: sealing an event to the one before, and checking a kept trail. Pure.

A hash covers the event as JSON with sorted keys, so that any language can check it, and so that fields which a later
version adds are covered too. Events hold no number with a fraction, which languages write in different ways.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from schemas.audit import GENESIS, AuditEvent, AuditHead


class Place(NamedTuple):
    """Where a chain ends: sequence and hash of its last event."""

    seq: int = 0
    hash: str = GENESIS


def digest(fields: dict[str, Any]) -> str:
    """The hash of an event, given as what its JSON decodes to; its `hash` is left out."""
    covered = {name: value for name, value in fields.items() if name != "hash"}
    return hashlib.sha256(msgspec.json.encode(covered, order="sorted")).hexdigest()


def seal(event: AuditEvent, after: Place) -> AuditEvent:
    """The event as the next one of a chain."""
    placed = msgspec.structs.replace(event, seq=after.seq + 1, previous=after.hash)
    return msgspec.structs.replace(placed, hash=digest(msgspec.to_builtins(placed)))


class Broken(NamedTuple):
    """The first event at which a trail is not what was written."""

    seq: int
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found."""

    first: int
    """Sequence of the oldest event that is kept; 0 when there is none."""
    head: Place
    anchors: int
    """Heads that were compared with kept events."""
    broken: Broken | None

    @property
    def events(self) -> int:
        """How many events are kept, as far as the chain holds."""
        return self.head.seq - self.first + 1 if self.first else 0


class Check:
    """Checks a trail, given event by event, against heads that were kept elsewhere; the first fault is kept.

    `heads` were read before the events, so that all of them must be in the trail, or older than `retention_ms`.
    """

    def __init__(self, heads: Iterable[AuditHead], *, now_ms: int, retention_ms: int) -> None:
        self._heads: dict[int, set[str]] = defaultdict(set)
        self._kept_since_ms = now_ms - retention_ms
        self._newest = 0
        self._young: list[int] = []
        """Sequences of heads whose events retention has not reached."""
        for head in heads:
            self._heads[head.seq].add(head.hash)
            self._newest = max(self._newest, head.seq)
            if head.at_ms > self._kept_since_ms:
                self._young.append(head.seq)
        self._first = 0
        self._last = Place()
        self._compared = 0
        self._broken: Broken | None = None

    def take(self, value: bytes | None) -> None:
        """The next record of `audit.events`."""
        if self._broken is not None:
            return None
        expected = self._last.seq + 1
        try:
            fields = msgspec.json.decode(value or b"", type=dict[str, Any])
            event = msgspec.convert(fields, AuditEvent)
        except msgspec.MsgspecError:
            return self._fault(expected, "the record is no audit event")
        if event.hash != digest(fields):
            return self._fault(event.seq, "its hash is not that of its content: it was changed")
        if not self._first:
            return self._begin(event)
        if event.seq != expected:
            return self._fault(expected, f"event {event.seq} stands in its place")
        if event.previous != self._last.hash:
            return self._fault(event.seq, f"it does not follow event {self._last.seq} as that is kept")
        return self._accept(event)

    def _begin(self, event: AuditEvent) -> None:
        """The oldest event that is kept: retention may have taken those before, if they are old enough."""
        self._first = event.seq
        before = event.seq - 1
        cut = min((seq for seq in self._young if seq <= before), default=None)
        if cut is not None:
            return self._fault(cut, "it is gone, though it is younger than what retention deletes")
        if before == 0 and event.previous != GENESIS:
            return self._fault(1, "it names an event before it")
        if before in self._heads and event.previous not in self._heads[before]:
            return self._fault(event.seq, f"it does not follow event {before} as that was anchored")
        return self._accept(event)

    def _accept(self, event: AuditEvent) -> None:
        anchored = self._heads.get(event.seq)
        if anchored is not None:
            self._compared += 1
            if anchored != {event.hash}:
                return self._fault(event.seq, "it is not the event that was anchored: the trail was rewritten")
        self._last = Place(event.seq, event.hash)
        return None

    def _fault(self, seq: int, why: str) -> None:
        if self._broken is None:
            self._broken = Broken(seq, why)

    def end(self, heads_after: Iterable[AuditHead]) -> Verdict:
        """All was given; `heads_after` were read after the events, so that nothing may stand behind the newest."""
        after = max((head.seq for head in heads_after), default=0)
        if not self._first and self._young:
            self._fault(min(self._young), "it is gone, though it is younger than what retention deletes")
        elif self._first and self._last.seq < self._newest:
            self._fault(self._last.seq + 1, f"the trail ends before it, and its head was event {self._newest}")
        elif self._last.seq > after:
            self._fault(after + 1, f"it stands behind the anchored head, event {after}")
        return Verdict(self._first, self._last, self._compared, self._broken)
