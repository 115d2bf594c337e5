"""What a control command does: a pure function of the control plane as it is and the command."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from schemas.audit import AUDIT, AuditNote
from schemas.control import (
    ADAPTER_KINDS,
    ADAPTER_NAME,
    ANY_MODEL,
    CAPABILITIES,
    ERASED,
    KEY,
    MAX_WEIGHT,
    MIN_WEIGHT,
    RECORDS,
    ROLES,
    USER,
    App,
    Budgeted,
    ControlCommand,
    Erasure,
    Key,
    Limited,
    Model,
    Price,
    Provider,
    Record,
    Replay,
    User,
    is_reserved,
)

PROVIDER_KINDS = ("llama_cpp", "transformers", "ollama", "openai")
EMAIL = re.compile(r"[^@\s]{1,64}@[^@\s]{1,189}")
"""What may be an address; whether mail reaches it is not ours to say."""
PUBLISHER_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Write:
    """One record for a compacted topic; a `value` of None deletes the key."""

    kind: str
    """One of `RECORDS`, or `prices`."""
    key: str
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The command is in order; `writes` is empty when it changes nothing."""

    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The command is against the rules; the reason is for whoever sent it."""

    reason: str


Decision = Accepted | Refused


class _Refusal(Exception):
    """Ends the checks of one command."""


@dataclass(slots=True)
class ControlState:
    """The control plane, as all records so far made it."""

    providers: dict[str, Provider] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    apps: dict[str, App] = field(default_factory=dict)
    users: dict[str, User] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    replays: dict[str, Replay] = field(default_factory=dict)
    erasures: dict[str, Erasure] = field(default_factory=dict)
    prices: dict[str, Price] = field(default_factory=dict)
    """The newest price that each model ever had, also of models that are gone."""

    def put(self, write: Write) -> None:
        """Take in a record of a compacted topic. Raises `msgspec.DecodeError` when it is not one."""
        if write.kind == "prices":
            if write.value is not None:
                model, price = write.key.rpartition("/")[0], msgspec.json.decode(write.value, type=Price)
                if model not in self.prices or price.version > self.prices[model].version:
                    self.prices[model] = price
            return
        held: dict[str, Record] = getattr(self, write.kind)
        if write.value is None:
            held.pop(write.key, None)
        else:
            held[write.key] = msgspec.json.decode(write.value, type=RECORDS[write.kind])

    @classmethod
    def of(cls, records: Mapping[str, Mapping[str, bytes]]) -> ControlState:
        """The state that the newest records of all topics make."""
        state = cls()
        for kind, held in records.items():
            for key, value in held.items():
                state.put(Write(kind, key, value))
        return state


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
    if command.kind not in (*RECORDS, AUDIT):
        raise ValueError(f"unknown kind {command.kind!r}; known are {', '.join((*RECORDS, AUDIT))}")
    if not command.key:
        raise ValueError("the command has no key")
    return command


def decide(state: ControlState, command: ControlCommand, *, now_ms: int) -> Decision:
    """What the command does to the control plane; `now_ms` is the time of the command's record."""
    if command.kind == AUDIT:
        return _note(command)
    try:
        if command.value is None:
            return _delete(state, command.kind, command.key)
        try:
            record = msgspec.json.decode(command.value, type=RECORDS[command.kind])
        except msgspec.DecodeError as error:
            return Refused(f"{command.kind[:-1]} {command.key!r}: {error}")
        match record:
            case Provider():
                _check_provider(command.key, record)
            case Model():
                return _put_model(state, command.key, record, now_ms)
            case App():
                _check_app(command.key, record)
                record = _born(record, state.apps.get(command.key), now_ms)
            case User():
                _check_user(state, command.key, record)
                record = _born(record, state.users.get(command.key), now_ms)
            case Key():
                _check_key(state, command.key, record)
                record = _born(record, state.keys.get(command.key), now_ms)
            case Replay():
                record = replayed(state.replays.get(command.key), command.key, record)
            case Erasure():
                return _erase(state, command.key, record, now_ms)
    except _Refusal as refusal:
        return Refused(str(refusal))
    held: dict[str, Record] = getattr(state, command.kind)
    if held.get(command.key) == record:
        return Accepted(())
    return Accepted((Write(command.kind, command.key, msgspec.json.encode(record)),))


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


def _check(holds: bool, reason: str) -> None:
    if not holds:
        raise _Refusal(reason)


def _delete(state: ControlState, kind: str, key: str) -> Decision:
    _check(kind not in ("replays", "erasures"), f"{kind[:-1]} {key!r}: what was done cannot be taken back")
    users: Iterable[str] = ()
    if kind == "providers":
        users = (f"model {model.id!r}" for model in state.models.values() if model.provider == key and model.enabled)
    elif kind == "apps":
        users = (f"key {held.name!r}" for held in state.keys.values() if held.app == key and held.enabled)
    elif kind == "users":
        users = (f"key {held.name!r}" for held in state.keys.values() if held.owner_id == key and held.enabled)
    user = next(iter(users), None)
    _check(user is None, f"{kind[:-1]} {key!r} is used by {user}; disable that first")
    return Accepted((Write(kind, key, None),) if key in getattr(state, kind) else ())


def _check_provider(key: str, provider: Provider) -> None:
    _check(provider.name == key, f"provider {key!r}: its name is {provider.name!r}")
    _check(
        provider.kind in PROVIDER_KINDS,
        f"provider {key!r}: unknown kind {provider.kind!r}; known are {', '.join(PROVIDER_KINDS)}",
    )
    _check(provider.kind != "openai" or bool(provider.base_url), f"provider {key!r}: kind openai needs a base_url")


def _check_app(key: str, app: App) -> None:
    _check(app.id == key, f"app {key!r}: its id is {app.id!r}")
    bounds = f"app {key!r}: weight must be {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, not {app.weight:g}"
    _check(MIN_WEIGHT <= app.weight <= MAX_WEIGHT, bounds)
    _check_limits(f"app {key!r}", app)
    for name, text in app.publishers.items():
        try:
            raw = base64.b64decode(text, validate=True)
        except binascii.Error:
            raw = b""
        whole = bool(name) and len(raw) == PUBLISHER_KEY_BYTES
        _check(whole, f"app {key!r}: publisher {name!r} has no Ed25519 public key of 32 bytes in base64")


def _check_user(state: ControlState, key: str, user: User) -> None:
    who = f"user {key!r}"
    _check(user.id == key, f"{who}: its id is {user.id!r}")
    _check(EMAIL.fullmatch(user.email) is not None, f"{who}: {user.email!r} is no e-mail address")
    _check(user.email == user.email.lower(), f"{who}: its e-mail address is not in lower case")
    _check(user.role in ROLES, f"{who}: unknown role {user.role!r}; known are {', '.join(ROLES)}")
    _check(
        not user.password_hash or user.password_hash.startswith("$argon2id$"), f"{who}: its password is not argon2id"
    )
    unknown = [name for name in user.apps if name not in state.apps]
    _check(not unknown or not user.enabled, f"{who}: there is no app {', '.join(map(repr, unknown))}")
    taken = any(other.email == user.email for other in state.users.values() if other.id != key)
    _check(not taken, f"{who}: another user has the e-mail address {user.email!r}")


def _check_limits(who: str, limits: Limited) -> None:
    for name in ("rate_limit_rpm", "rate_limit_tpm", "concurrency_limit"):
        value = getattr(limits, name)
        _check(value is None or value >= 0, f"{who}: {name} must not be negative")
    if isinstance(limits, Budgeted) and (budget := limits.monthly_budget) is not None:
        _check(budget.is_finite() and budget >= 0, f"{who}: monthly_budget is negative or no number")


def _check_key(state: ControlState, key: str, record: Key) -> None:
    digits = set("0123456789abcdef")
    _check(record.sha256 == key, f"key {record.name!r}: filed under another SHA-256 than its own")
    _check(len(key) == 64 and set(key) <= digits, f"key {record.name!r}: its SHA-256 is not 64 lower-case hex digits")
    _check(record.role in ROLES, f"key {record.name!r}: unknown role {record.role!r}; known are {', '.join(ROLES)}")
    _check_limits(f"key {record.name!r}", record)
    twin = next((held for held in state.keys.values() if held.id == record.id and held.sha256 != key), None)
    _check(twin is None, f"key {record.name!r}: its id {record.id!r} is another key's")
    owned = not record.owner_id or record.owner_id in state.users or not record.enabled
    _check(owned, f"key {record.name!r}: there is no user {record.owner_id!r}")
    _check(record.app in state.apps or not record.enabled, f"key {record.name!r}: there is no app {record.app!r}")
    unknown = [name for name in record.allowed_models if name != ANY_MODEL and name not in state.models]
    _check(not unknown or not record.enabled, f"key {record.name!r}: there is no model {', '.join(map(repr, unknown))}")


def _put_model(state: ControlState, key: str, model: Model, now_ms: int) -> Decision:
    _check_model(state, key, model)
    before, newest = state.models.get(key), state.prices.get(key)
    price = msgspec.structs.replace(model.price, version=newest.version if newest is not None else 1)
    changed = newest is None or price != newest
    if changed and newest is not None:
        price = msgspec.structs.replace(price, version=newest.version + 1)
    created = before.created if before is not None else now_ms // 1000
    record = msgspec.structs.replace(model, price=price, created=created)
    writes = []
    if changed:
        writes.append(Write("prices", f"{key}/{price.version}", msgspec.json.encode(price)))
    if record != before:
        writes.append(Write("models", key, msgspec.json.encode(record)))
    return Accepted(tuple(writes))


def _check_model(state: ControlState, key: str, model: Model) -> None:
    who = f"model {key!r}"
    _check(model.id == key, f"{who}: its id is {model.id!r}")
    _check(bool(model.backend_tag), f"{who}: has no backend_tag")
    _check(model.context_length >= 1, f"{who}: context_length must be at least 1")
    _check(model.max_concurrency >= 1, f"{who}: max_concurrency must be at least 1")
    _check(
        model.default_max_tokens is None or 1 <= model.default_max_tokens < model.context_length,
        f"{who}: default_max_tokens must be at least 1 and below context_length",
    )
    _check(
        min(model.bytes, model.load_ms, model.keep_alive_ms or 0) >= 0,
        f"{who}: bytes, load_ms and keep_alive_ms must not be negative",
    )
    amounts = (model.price.input, model.price.output, model.price.cached)
    _check(all(amount.is_finite() and amount >= 0 for amount in amounts), f"{who}: a price is negative or no number")
    _check_limits(who, model)
    unknown = [name for name in model.capabilities if name not in CAPABILITIES]
    _check(not unknown, f"{who}: unknown capability {', '.join(map(repr, unknown))}")
    # Whether its fallbacks are there is seen when one is needed: models come and go one by one.
    _check(key not in model.fallbacks, f"{who}: is its own fallback")
    for adapter, source in model.adapters.items():
        _check(re.match(ADAPTER_NAME, adapter) is not None, f"{who}: {adapter!r} is no name of an adapter")
        _check(bool(source), f"{who}: adapter {adapter!r} says not where it is")
    if not model.enabled:
        return
    for name in (model.id, *model.aliases):
        _check(not is_reserved(name), f"{who}: the name {name!r} is reserved for a choice by the router")
    _check(model.provider in state.providers, f"{who}: there is no provider {model.provider!r}")
    kind = state.providers[model.provider].kind
    _check(not model.adapters or kind in ADAPTER_KINDS, f"{who}: a provider of kind {kind} loads no adapters")
    taken = {
        name: other.id
        for other in state.models.values()
        if other.enabled and other.id != key
        for name in (*_names(other), *_adapted(other))
    }
    for name in (*_names(model), *_adapted(model)):
        _check(name not in taken, f"{who}: the name {name!r} is taken by model {taken.get(name)!r}")
    _check(len({model.id, *model.aliases}) == 1 + len(model.aliases), f"{who}: an alias stands twice")


def _names(model: Model) -> tuple[str, ...]:
    return (model.id, *model.aliases)


def _adapted(model: Model) -> tuple[str, ...]:
    return tuple(f"{model.id}:{adapter}" for adapter in model.adapters)


def replayed(before: Replay | None, key: str, record: Replay) -> Replay:
    """What is to be known of a letter's replay: claimed, then sent; once, unless it is wanted again."""
    _check(record.letter == key, f"replay {key!r}: of another letter, {record.letter!r}")
    if record.sent:
        _check(before is not None and before.new_id == record.new_id, f"replay {key!r}: was not claimed")
        return msgspec.structs.replace(before or record, sent=True)
    if before is None:
        return msgspec.structs.replace(record, times=1)
    if not before.sent and before.digest == record.digest:
        return before  # Whoever claimed it may have died before it was sent; the same id makes it once.
    word = "was replayed" if before.sent else "is being replayed with another body"
    _check(record.again, f"letter {key.partition('/')[0]} {word} as {before.new_id}; say `again` to send it once more")
    return msgspec.structs.replace(record, times=before.times + 1)


def _erase(state: ControlState, key: str, record: Erasure, now_ms: int) -> Decision:
    _check(record.subject == key, f"erasure {key!r}: of another subject, {record.subject!r}")
    before = state.erasures.get(key)
    if record.applied:
        known = before is not None and before.asked_ms == record.asked_ms
        _check(known, f"erasure {key!r}: not asked for at {record.asked_ms}")
        found = msgspec.structs.replace(before or record, applied=record.applied | (before or record).applied)
        return Accepted((Write("erasures", key, msgspec.json.encode(found)),) if found != before else ())
    _check(record.kind in ERASED and bool(record.id), f"erasure {key!r}: is of no {', '.join(ERASED)}")
    asked = [Erasure(key, asked_ms=now_ms)]
    if record.kind == USER:
        owned = (one for one in state.keys.values() if one.owner_id == record.id)
        asked += [Erasure(f"{KEY}/{one.id}", now_ms, of=record.id) for one in owned]
    return Accepted(tuple(Write("erasures", made.subject, msgspec.json.encode(made)) for made in asked))
