"""The control plane as its single writer holds it: all records in force, and the newest price of each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from schemas.control import RECORDS, App, Erasure, Key, Model, Price, Provider, Record, Replay, User


@dataclass(frozen=True, slots=True)
class Write:
    """One record for a compacted topic; a `value` of None deletes the key."""

    kind: str
    """One of `RECORDS`, or `prices`."""
    key: str
    value: bytes | None


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
    key_ids: dict[str, str] = field(default_factory=dict)
    """Id of a key -> its SHA-256."""
    emails: dict[str, str] = field(default_factory=dict)
    """Address of a user -> its id."""

    def put(self, write: Write) -> None:
        """Take in a record of a compacted topic. Raises `msgspec.DecodeError` when it is not one."""
        if write.kind == "prices":
            if write.value is not None:
                model, price = write.key.rpartition("/")[0], msgspec.json.decode(write.value, type=Price)
                if model not in self.prices or price.version > self.prices[model].version:
                    self.prices[model] = price
            return
        held: dict[str, Record] = getattr(self, write.kind)
        before = held.get(write.key)
        if isinstance(before, Key) and self.key_ids.get(before.id) == before.sha256:
            del self.key_ids[before.id]
        elif isinstance(before, User) and self.emails.get(before.email) == before.id:
            del self.emails[before.email]
        if write.value is None:
            held.pop(write.key, None)
            return
        record = held[write.key] = msgspec.json.decode(write.value, type=RECORDS[write.kind])
        if isinstance(record, Key):
            self.key_ids[record.id] = record.sha256
        elif isinstance(record, User):
            self.emails[record.email] = record.id

    @classmethod
    def of(cls, records: Mapping[str, Mapping[str, bytes]]) -> ControlState:
        """The state that the newest records of all topics make."""
        state = cls()
        for kind, held in records.items():
            for key, value in held.items():
                state.put(Write(kind, key, value))
        return state
