"""What an operator may ask for, checked against how things stand, and the wish or the record that asks for it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
import uuid_utils

from headrace import audit
from headrace.errors import Conflict, ModelNotFound, NotFound, Unavailable
from headrace.fleet import Fleet
from schemas.control import Model
from schemas.events import PoolCommand, PoolCommandKind
from topics.catalogue import POOL_COMMANDS
from topics.clients import Producer


def find(models: Mapping[str, Model], name: str) -> Model:
    """The model with this id, enabled or not, or with this alias. Raises `ModelNotFound`."""
    found = models.get(name)
    if found is None:
        found = next((model for model in models.values() if model.enabled and name in model.aliases), None)
    if found is None:
        raise ModelNotFound(f"There is no model {name!r}.", param="model")
    return found


def load(fleet: Fleet, model: Model, *, actor: str, reason: str = "") -> PoolCommand:
    """The wish to load a model. Raises `Conflict` or `Unavailable` when nobody would obey it."""
    if not model.enabled:
        raise Conflict(f"The model {model.id!r} is not enabled.")
    _heard(fleet, model.pool)
    return _wish(model.pool, PoolCommandKind.LOAD, model.id, actor=actor, reason=reason)


def unload(fleet: Fleet, model: Model, *, actor: str, reason: str = "") -> PoolCommand:
    """The wish to unload a model. Raises `Conflict` or `Unavailable` when nobody would obey it."""
    if model.pinned:
        raise Conflict(f"The model {model.id!r} is pinned; unpin it first.")
    _heard(fleet, model.pool)
    return _wish(model.pool, PoolCommandKind.UNLOAD, model.id, actor=actor, reason=reason)


def release(fleet: Fleet, worker: str, model: str, *, actor: str, reason: str) -> PoolCommand:
    """The word that the quarantined bytes of a lease are free. Raises `NotFound`, `Conflict` or `Unavailable`."""
    held = [lease for lease in fleet.leases.held() if (lease.worker, lease.model) == (worker, model)]
    if not held:
        raise NotFound(f"The worker {worker!r} has no lease on the model {model!r}.")
    if held[-1].state != "quarantined":
        raise Conflict(
            f"The lease of {model!r} on {worker!r} is {held[-1].state}; only quarantined bytes are released."
        )
    _heard(fleet, held[-1].pool)
    return _wish(held[-1].pool, PoolCommandKind.RELEASE, model, worker=worker, actor=actor, reason=reason)


def pin(model: Model, *, pinned: bool) -> Model:
    """The model's record, pinned or not."""
    return msgspec.structs.replace(model, pinned=pinned)


async def send(producer: Producer, wish: PoolCommand) -> int:
    """Write a wish down and hand it to the pool's scheduler; returns its offset when it is durable.

    Raises `KafkaError`, or `Unavailable` when it cannot be written into the audit trail.
    """
    worker = {"worker": wish.worker} if wish.worker else {}
    said = audit.note(wish.kind.value, "models", wish.model, actor=wish.actor, reason=wish.reason, outcome="asked",
                      pool=wish.pool, wish=wish.id, **worker)  # fmt: skip
    await audit.record(producer, said)
    written = await producer.send(POOL_COMMANDS.name, msgspec.json.encode(wish), key=wish.pool)
    return int(written.offset)


def _heard(fleet: Fleet, pool: str) -> None:
    if fleet.pool(pool, _now_ms()) is None:
        raise Unavailable(f"The scheduler of the pool {pool!r} is not heard; try again shortly.")


def _wish(pool: str, kind: PoolCommandKind, model: str, *, actor: str, reason: str, worker: str = "") -> PoolCommand:
    return PoolCommand(uuid_utils.uuid7().hex, pool, kind, model, worker, actor, reason, _now_ms())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
