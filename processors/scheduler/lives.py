"""The life of a lease from when it serves: it drains, is released, and is free; or its time is over. Pure."""

from __future__ import annotations

from processors.scheduler.messages import Action, LeaseMoved, Unload
from processors.scheduler.state import Lease, LeaseState, Pool
from schemas.control import Model

RELOAD_AFTER_MS = 5_000
"""A model whose load failed is tried again after this long."""
RELEASE_TIMEOUT_MS = 30_000
"""A worker that does not show the memory free after this long has it quarantined."""


def move(lease: Lease, state: LeaseState, now_ms: int, *, reason: str = "") -> list[Action]:
    """Bring a lease into a state, and say so once it has an epoch."""
    lease.state, lease.moved_ms = state, now_ms
    if lease.epoch is None or state is LeaseState.REQUESTED:
        return []
    shown = "free" if state is LeaseState.FAILED else str(state)
    return [LeaseMoved(lease.worker, lease.boot, lease.model, lease.epoch, shown, lease.bytes, reason, lease.device)]


def drain(lease: Lease, now_ms: int, reason: str) -> list[Action]:
    """Let an active lease end when its requests have; there is no way back."""
    return [*move(lease, LeaseState.DRAINING, now_ms, reason=reason), *release_drained(lease, now_ms)]


def release_drained(lease: Lease, now_ms: int) -> list[Action]:
    """Give the memory back if the lease drains and nothing runs on it any more."""
    if lease.state is not LeaseState.DRAINING or lease.used or lease.epoch is None:
        return []
    moved = move(lease, LeaseState.RELEASING, now_ms)
    return [Unload(lease.worker, lease.boot, lease.model, lease.epoch), *moved]


def freed(pool: Pool, lease: Lease) -> list[Action]:
    """The worker shows that it no longer holds the model."""
    del pool.leases[lease.worker, lease.model]
    if lease.epoch is None:
        return []
    return [LeaseMoved(lease.worker, lease.boot, lease.model, lease.epoch, "free", lease.bytes, device=lease.device)]


def time_out(pool: Pool, now_ms: int) -> list[Action]:
    """Quarantine what is not seen to be free in time; release what was kept alive for long enough."""
    actions: list[Action] = []
    for lease in list(pool.leases.values()):
        model = pool.models.get(lease.model)
        if lease.state is LeaseState.FAILED and model is None:
            del pool.leases[lease.worker, lease.model]
            if lease.epoch is not None:  # the worker forgets its failure too
                actions.append(Unload(lease.worker, lease.boot, lease.model, lease.epoch))
        elif lease.state is LeaseState.RELEASING and now_ms - lease.moved_ms >= RELEASE_TIMEOUT_MS:
            actions += move(lease, LeaseState.QUARANTINED, now_ms, reason="not seen to be free")
        elif lease.state is LeaseState.ACTIVE and model is None:
            actions += drain(lease, now_ms, "the model was removed")
        elif lease.state is LeaseState.ACTIVE and model is not None and _kept_long_enough(pool, lease, model, now_ms):
            actions += drain(lease, now_ms, "not used for its keep-alive")
    return actions


def _kept_long_enough(pool: Pool, lease: Lease, model: Model, now_ms: int) -> bool:
    if model.keep_alive_ms is None or model.pinned or model.preload or lease.used or pool.queues.get(lease.model):
        return False
    return now_ms - max(lease.used_ms, lease.moved_ms) >= model.keep_alive_ms


def due_again(lease: Lease, now_ms: int) -> bool:
    """Whether a load that failed may be tried again."""
    return lease.state is LeaseState.FAILED and now_ms - lease.moved_ms >= RELOAD_AFTER_MS
