"""What the audit trail says of a command: who did what to which thing, field by field, without its secrets. Pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from processors.control.decide import PRICES, Accepted, Decision, Refused
from processors.control.state import ControlState
from schemas.audit import AUDIT, AuditEvent, AuditNote, Change
from schemas.control import RECORDS, ControlCommand, Key, Price, Record

SECRET_FIELDS = frozenset({"sha256", "password_hash"})
_SECRET_OPTION = re.compile(r"key|token|secret|password", re.IGNORECASE)
_CREDENTIALS = re.compile(r"//[^/@\s\"]+@")
"""User and password in a URL."""
REDACTED = '"redacted"'
_NOTHING: tuple[object, ...] = (None, "", (), {})
"""Values of a new record that say nothing."""
MAX_VALUE_CHARS, MAX_TEXT_CHARS, MAX_DETAILS = 1_000, 2_000, 32
"""An event is bounded, so that no command can be too large to be written down."""


def described(command: ControlCommand, before: Record | Price | None, decision: Decision, *, at_ms: int) -> AuditEvent:
    """The event of a command that was decided on; `before` is the record as it was. It is not sealed yet."""
    if command.kind == AUDIT and isinstance(decision, Accepted):
        said = msgspec.json.decode(command.value or b"", type=AuditNote)
        event = _event(command, at_ms, said.action, said.kind, said.key, said.outcome)
        items = list(said.detail.items())[:MAX_DETAILS]
        return msgspec.structs.replace(event, detail={_cut(name): _cut(value) for name, value in items})
    after = _after(command, decision)
    action = "delete" if command.value is None else "create" if before is None else "update"
    key = _shown_key(command, before, after)
    if isinstance(decision, Refused):
        event = _event(command, at_ms, action, command.kind, key, "refused")
        detail = {"code": decision.code} if decision.code else {}
        return msgspec.structs.replace(event, refusal=_cut(decision.reason), detail=detail)
    outcome = "applied" if decision.writes else "unchanged"
    event = _event(command, at_ms, action, command.kind, key, outcome)
    return msgspec.structs.replace(event, changes=changes(before, after) if decision.writes else {})


def unreadable(place: str, why: str, *, at_ms: int) -> AuditEvent:
    """The event of a record that is no command; `place` says where it stands."""
    return AuditEvent(0, "", at_ms, place, "", "write", "commands", place, "unreadable", refusal=_cut(why))


def _event(command: ControlCommand, at_ms: int, action: str, kind: str, key: str, outcome: str) -> AuditEvent:
    return AuditEvent(
        seq=0,
        previous="",
        at_ms=at_ms,
        command=_cut(command.id),
        actor=_cut(command.actor),
        action=_cut(action),
        kind=_cut(kind),
        key=_cut(key),
        outcome=_cut(outcome),
        reason=_cut(command.reason),
    )


def held(state: ControlState, command: ControlCommand) -> Record | Price | None:
    """The record that a command is about, as it is; of a price the newest one of its model."""
    records: dict[str, Record | Price] = getattr(state, command.kind, {})
    return records.get(command.key)


def _after(command: ControlCommand, decision: Decision) -> Record | Price | None:
    if isinstance(decision, Accepted):
        for write in decision.writes:
            if write.kind == command.kind == PRICES and write.value is not None:
                return msgspec.json.decode(write.value, type=Price)
            if (write.kind, write.key) == (command.kind, command.key) and write.value is not None:
                return msgspec.json.decode(write.value, type=RECORDS[write.kind])
    return None


def _shown_key(command: ControlCommand, before: Record | Price | None, after: Record | Price | None) -> str:
    """The natural key; an API key is filed under its SHA-256, which is not shown, so it goes by its id."""
    if command.kind != "keys":
        return command.key
    known = after or before
    return known.id if isinstance(known, Key) else "unknown"


def changes(before: Record | Price | None, after: Record | Price | None) -> dict[str, Change]:
    """The fields that differ, with their values as JSON text."""
    one = after or before
    found: dict[str, Change] = {}
    for name in one.__struct_fields__ if one is not None else ():
        if before is None:
            if (new := getattr(after, name)) not in _NOTHING:
                found[name] = Change("", _shown(name, new))
        elif after is None:
            found[name] = Change(_shown(name, getattr(before, name)), "")
        elif (old := getattr(before, name)) != (new := getattr(after, name)):
            found[name] = Change(_shown(name, old), _shown(name, new))
    return found


def _shown(name: str, value: Any) -> str:
    if name in SECRET_FIELDS:
        return REDACTED if value else '""'
    if isinstance(value, dict):
        value = {
            option: "redacted" if isinstance(held, str) and _SECRET_OPTION.search(option) else held
            for option, held in value.items()
        }
    text = msgspec.json.encode(value).decode()
    if "//" in text:
        text = _CREDENTIALS.sub("//redacted@", text)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}… ({len(text)} characters)"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]}…"
