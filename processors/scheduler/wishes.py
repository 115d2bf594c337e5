"""What operators may ask of a pool: to load a model, to unload it, to count bytes as free. Pure, as the policy.

A load is wanted as if somebody waited, but takes memory from idle models only; it ends when the model is active, or
after a while. A model that was unloaded stays out, also if it is to be preloaded, until somebody asks for it. A release
ends a quarantine on an operator's word: the bytes are granted again, the model's name on that worker is not, until the
worker no longer shows it.
"""

from __future__ import annotations

from processors.scheduler.lives import RELOAD_AFTER_MS, drain
from processors.scheduler.messages import Action, LeaseMoved, LoadAsked, ReleaseAsked, UnloadAsked, Wish
from processors.scheduler.state import Lease, LeaseState, Pool
from schemas.events import PoolCommand, PoolCommandKind, PoolWishes, ReleasedLease

LIFE_MS = 60_000
"""A wish that is older when a scheduler reads it is not obeyed; a load is given up after as long."""


def of(command: PoolCommand, asked_ms: int) -> Wish:
    """The wish in a record of `pool.commands` that the brokers took at `asked_ms` (Unix ms)."""
    said = f"{command.actor or 'an operator'}: {command.reason}" if command.reason else command.actor or "an operator"
    match command.kind:
        case PoolCommandKind.LOAD:
            return LoadAsked(command.model, asked_ms + LIFE_MS)
        case PoolCommandKind.UNLOAD:
            return UnloadAsked(command.model, f"unloaded by {said}")
        case PoolCommandKind.RELEASE:
            return ReleaseAsked(command.worker, command.model, f"released by {said}")


def obey(pool: Pool, wish: Wish, now_ms: int) -> list[Action]:
    """Take a wish in; what it asks of a model that the pool has not, or of one that is pinned, is nothing."""
    match wish:
        case LoadAsked(model, until_ms):
            if model in pool.models:
                pool.wanted[model] = until_ms
                pool.parked.discard(model)
                for lease in pool.of_model(model):
                    if lease.state is LeaseState.FAILED:
                        lease.moved_ms = now_ms - RELOAD_AFTER_MS
            return []
        case UnloadAsked(model, reason):
            return _unload(pool, model, reason, now_ms)
        case ReleaseAsked(worker, model, reason):
            return _release(pool, worker, model, reason)


def _unload(pool: Pool, model_id: str, reason: str, now_ms: int) -> list[Action]:
    model = pool.models.get(model_id)
    if model is None or model.pinned:
        return []
    pool.wanted.pop(model_id, None)
    pool.parked.add(model_id)
    return _drain_all(pool, model_id, reason, now_ms)


def _drain_all(pool: Pool, model_id: str, reason: str, now_ms: int) -> list[Action]:
    """Drain what is loaded or being loaded, but nothing that its worker has not shown: it would seem to be unloaded."""
    return [
        action
        for lease in pool.of_model(model_id)
        if lease.shown and lease.state in (LeaseState.LOADING, LeaseState.ACTIVE)
        for action in drain(lease, now_ms, reason)
    ]


def _release(pool: Pool, worker: str, model: str, reason: str) -> list[Action]:
    lease = pool.leases.get((worker, model))
    if lease is None or lease.state is not LeaseState.QUARANTINED:
        return []
    pool.released[worker, model] = lease.granted
    size, lease.bytes = lease.bytes, 0
    return [LeaseMoved(worker, lease.boot, model, lease.granted, "free", size, reason, lease.device)]


def settle(pool: Pool, now_ms: int) -> list[Action]:
    """Drop wishes that came true or too late, and drain what came into memory though it was to stay out."""
    for model, until_ms in list(pool.wanted.items()):
        active = any(lease.state is LeaseState.ACTIVE for lease in pool.of_model(model))
        if active or now_ms > until_ms or model not in pool.models:
            del pool.wanted[model]
    for place, epoch in list(pool.released.items()):
        worker, lease = pool.workers.get(place[0]), pool.leases.get(place)
        if worker is not None and worker.trusted and (lease is None or lease.epoch != epoch):
            del pool.released[place]
    actions: list[Action] = []
    for model in sorted(pool.parked):
        known = pool.models.get(model)
        if known is None or known.pinned or pool.queues.get(model):
            pool.parked.discard(model)
        else:
            actions += _drain_all(pool, model, "was unloaded by an operator", now_ms)
    return actions


def kept(pool: Pool, next_offset: int) -> PoolWishes:
    """What the next scheduler must know; `next_offset` is that of the first wish in `pool.commands` not obeyed yet."""
    released = [ReleasedLease(worker, model, epoch) for (worker, model), epoch in sorted(pool.released.items())]
    return PoolWishes(next_offset, dict(pool.wanted), sorted(pool.parked), released)


def restore(pool: Pool, wishes: PoolWishes) -> None:
    """Take over what the scheduler before was asked."""
    pool.wanted = dict(wishes.load)
    pool.parked = set(wishes.unloaded)
    pool.released = {(found.worker, found.model): found.epoch for found in wishes.released}


def is_released(pool: Pool, lease: Lease) -> bool:
    """Whether the bytes of a lease were released by an operator's word."""
    return pool.released.get((lease.worker, lease.model)) == lease.epoch
