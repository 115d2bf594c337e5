"""The audit trail as its single writer holds it: where the chain ends, and which commands were handled before. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec

from headrace.audit_chain import Place, seal
from headrace.projection import CommandOutcome
from processors.control.state import Write
from schemas.audit import AuditEvent, AuditHead

REMEMBERED = 10_000
"""Commands that are known again when they are delivered again: many more than half a second brings, after which Kafka
knows how far its reader is."""


class Trail:
    """Seals events, in order, and knows what was done; lost with its process, and read from Kafka by the next one."""

    def __init__(self, end: Place, newest: Iterable[AuditEvent] = ()) -> None:
        """`end` is that of the newest head, and `newest` are the last events, oldest first."""
        self._end = end
        self._last_ms = 0
        self._handled: OrderedDict[str, CommandOutcome] = OrderedDict()
        for event in newest:
            self._remember(event)

    def outcome(self, command_id: str) -> CommandOutcome | None:
        """What became of a command that was handled a while ago; None when it is new."""
        return self._handled.get(command_id) if command_id else None

    def add(self, event: AuditEvent) -> Write:
        """The event's record, as the next of the chain."""
        sealed = seal(event, self._end)
        self._end = Place(sealed.seq, sealed.hash)
        self._last_ms = sealed.at_ms
        self._remember(sealed)
        return Write("audit", str(sealed.seq), msgspec.json.encode(sealed))

    def head(self) -> Write:
        """The record that anchors the last event; it goes into the same transaction."""
        day = datetime.fromtimestamp(self._last_ms / 1000, UTC).date().isoformat()
        return Write("audit_heads", day, msgspec.json.encode(AuditHead(*self._end, self._last_ms)))

    def _remember(self, event: AuditEvent) -> None:
        self._handled[event.command] = CommandOutcome(
            event.command, event.outcome, event.refusal, event.detail.get("code", "") if event.refusal else ""
        )
        if len(self._handled) > REMEMBERED:
            self._handled.popitem(last=False)
