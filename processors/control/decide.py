"""What a control command does: a pure function of the control plane as it is and the command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from headrace.access import USER_PREFIX
from headrace.projection import EXISTS, PRECONDITION
from processors.control.checks import Refusal, check, check_app, check_key, check_model, check_provider, check_user
from processors.control.pricing import priced, scheduled
from processors.control.state import ControlState, Write
from schemas.audit import AUDIT, AuditNote
from schemas.control import (
    ABSENT,
    ERASED,
    KEY,
    RECORDS,
    USER,
    App,
    ControlCommand,
    Erasure,
    Key,
    Model,
    Price,
    Provider,
    Record,
    Replay,
    User,
    digest,
)

PRICES = "prices"
_TYPES: dict[str, type[Record | Price]] = {**RECORDS, PRICES: Price}


@dataclass(frozen=True, slots=True)
class Accepted:
    """The command is in order; `writes` is empty when it changes nothing."""

    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The command is against the rules; the reason is for whoever sent it."""

    reason: str
    code: str = ""
    """`PRECONDITION` or `EXISTS` where that is why; see `headrace.projection.CommandOutcome`."""


Decision = Accepted | Refused


class _Received(ControlCommand, frozen=True):
    """A command as it is decoded: msgspec takes nothing but null for `Raw | None`, and anything for `Raw`."""

    value: msgspec.Raw = msgspec.Raw(b"null")


def decode_command(value: bytes | None) -> ControlCommand:
    """The command in a record. Raises `ValueError` with the reason when there is none."""
    if value is None:
        raise ValueError("the command has no value")
    received = msgspec.json.decode(value, type=_Received)
    deletes = bytes(received.value) == b"null"
    command = ControlCommand(
        **{**msgspec.structs.asdict(received), "value": None if deletes else received.value.copy()}
    )
    if command.kind not in (*_TYPES, AUDIT):
        raise ValueError(f"unknown kind {command.kind!r}; known are {', '.join((*_TYPES, AUDIT))}")
    if not command.key:
        raise ValueError("the command has no key")
    return command


def apps_with_publishers(writes: Iterable[Write]) -> list[str]:
    """The apps among these records that have publishers, and so need a topic of answers."""
    apps = (msgspec.json.decode(write.value, type=App) for write in writes if write.kind == "apps" and write.value)
    return [app.id for app in apps if app.publishers]


def decide(state: ControlState, command: ControlCommand, *, now_ms: int) -> Decision:
    """What the command does to the control plane; `now_ms` is the time of the command's record.

    A command whose result is there already changes nothing, whatever its condition says: it may have come twice.
    """
    if command.kind == AUDIT:
        return _note(command)
    try:
        if command.value is None:
            return _delete(state, command)
        try:
            record = msgspec.json.decode(command.value, type=_TYPES[command.kind])
        except msgspec.DecodeError as error:
            return Refused(f"{command.kind[:-1]} {command.key!r}: {error}")
        match record:
            case Provider():
                check_provider(command.key, record)
            case Model():
                return _put_model(state, command, record, now_ms)
            case Price():
                return _put_price(state, command, record, now_ms)
            case App():
                check_app(command.key, record)
                record = _born(record, state.apps.get(command.key), now_ms)
            case User():
                check_user(state, command.key, record)
                record = _born(record, state.users.get(command.key), now_ms)
            case Key():
                check_key(state, command.key, record)
                record = _born(record, state.keys.get(command.key), now_ms)
            case Replay():
                record = replayed(state.replays.get(command.key), command.key, record)
            case Erasure():
                return _erase(state, command.key, record, now_ms)
        held: dict[str, Record] = getattr(state, command.kind)
        if held.get(command.key) == record:
            return Accepted(())
        _check_condition(state, command)
    except Refusal as refusal:
        return Refused(str(refusal), refusal.code)
    return Accepted((Write(command.kind, command.key, msgspec.json.encode(record)),))


def _check_condition(state: ControlState, command: ControlCommand) -> None:
    """Raise `Refusal` when the record is not as the command's sender has seen it."""
    if command.if_match is None:
        return
    kind = "models" if command.kind == PRICES else command.kind
    held: Record | None = getattr(state, kind).get(command.key)
    what = f"{kind[:-1]} {_shown(command, held)!r}"
    if command.if_match == ABSENT:
        check(held is None, f"{what}: there is one already", EXISTS)
        return
    check(held is not None, f"{what}: there is none", PRECONDITION)
    same = held is not None and digest(held) == command.if_match
    check(same, f"{what}: it was changed meanwhile; read it again, and change what you find", PRECONDITION)


def _shown(command: ControlCommand, held: Record | None) -> str:
    """How a record is called: never by the hash of a key."""
    return held.name if isinstance(held, Key) else command.key


def _note(command: ControlCommand) -> Decision:
    """A note for the audit trail changes nothing."""
    try:
        msgspec.json.decode(command.value or b"null", type=AuditNote)
    except msgspec.DecodeError as error:
        return Refused(f"note {command.key!r}: {error}")
    return Accepted(())


Born = TypeVar("Born", App, User, Key)


def _born(record: Born, before: Born | None, now_ms: int) -> Born:
    """The record with the time of its first version, which no sender sets."""
    return msgspec.structs.replace(record, created=before.created if before is not None else now_ms // 1000)


def _delete(state: ControlState, command: ControlCommand) -> Decision:
    kind, key = command.kind, command.key
    check(kind != PRICES, "prices stay for ever; set another one")
    check(kind not in ("replays", "erasures"), f"{kind[:-1]} {key!r}: what was done cannot be taken back")
    if key not in getattr(state, kind):
        return Accepted(())
    _check_condition(state, command)
    users: Iterable[str] = ()
    if kind == "providers":
        users = (f"model {model.id!r}" for model in state.models.values() if model.provider == key and model.enabled)
    elif kind == "apps":
        users = (f"key {held.name!r}" for held in state.keys.values() if held.app == key and held.enabled)
    elif kind == "users":
        users = (f"key {held.name!r}" for held in state.keys.values() if held.owner_id == key and held.enabled)
    user = next(iter(users), None)
    check(user is None, f"{kind[:-1]} {key!r} is used by {user}; disable that first")
    return Accepted((Write(kind, key, None),))


def _put_model(state: ControlState, command: ControlCommand, model: Model, now_ms: int) -> Decision:
    key = command.key
    check_model(state, key, model)
    before = state.models.get(key)
    record, price = priced(model, before, state.prices.get(key), now_ms)
    created = before.created if before is not None else now_ms // 1000
    record = msgspec.structs.replace(record, created=created)
    if record != before or price is not None:
        _check_condition(state, command)
    return Accepted(_model_writes(before, record, price))


def _put_price(state: ControlState, command: ControlCommand, price: Price, now_ms: int) -> Decision:
    before = state.models.get(command.key)
    if before is None:
        raise Refusal(f"price: there is no model {command.key!r}")
    record, made = scheduled(before, price, state.prices.get(command.key), now_ms)
    check_model(state, command.key, record)
    if made is not None:
        _check_condition(state, command)
    return Accepted(_model_writes(before, record, made) if made is not None else ())


def _model_writes(before: Model | None, record: Model, price: Price | None) -> tuple[Write, ...]:
    writes = []
    if price is not None:
        writes.append(Write(PRICES, f"{record.id}/{price.version}", msgspec.json.encode(price)))
    if record != before:
        writes.append(Write("models", record.id, msgspec.json.encode(record)))
    return tuple(writes)


def replayed(before: Replay | None, key: str, record: Replay) -> Replay:
    """What is to be known of a letter's replay: claimed, then sent; once, unless it is wanted again."""
    check(record.letter == key, f"replay {key!r}: of another letter, {record.letter!r}")
    if record.sent:
        check(before is not None and before.new_id == record.new_id, f"replay {key!r}: was not claimed")
        return msgspec.structs.replace(before or record, sent=True)
    if before is None:
        return msgspec.structs.replace(record, times=1)
    if not before.sent and before.digest == record.digest:
        return before  # Whoever claimed it may have died before it was sent; the same id makes it once.
    word = "was replayed" if before.sent else "is being replayed with another body"
    check(record.again, f"letter {key.partition('/')[0]} {word} as {before.new_id}; say `again` to send it once more")
    return msgspec.structs.replace(record, times=before.times + 1)


def _erase(state: ControlState, key: str, record: Erasure, now_ms: int) -> Decision:
    check(record.subject == key, f"erasure {key!r}: of another subject, {record.subject!r}")
    before = state.erasures.get(key)
    if record.applied:
        known = before is not None and before.asked_ms == record.asked_ms
        check(known, f"erasure {key!r}: not asked for at {record.asked_ms}")
        found = msgspec.structs.replace(before or record, applied=record.applied | (before or record).applied)
        return Accepted((Write("erasures", key, msgspec.json.encode(found)),) if found != before else ())
    check(record.kind in ERASED and bool(record.id), f"erasure {key!r}: is of no {', '.join(ERASED)}")
    asked = [Erasure(key, asked_ms=now_ms)]
    if record.kind == USER:
        owned = (one for one in state.keys.values() if one.owner_id == record.id)
        asked += [Erasure(f"{KEY}/{one.id}", now_ms, of=record.id) for one in owned]
        # What it asked while signed in stands under an id of its own.
        asked.append(Erasure(f"{KEY}/{USER_PREFIX}{record.id}", now_ms, of=record.id))
    return Accepted(tuple(Write("erasures", made.subject, msgspec.json.encode(made)) for made in asked))
