"""How a pool stands, for those who ask or decide whether to accept. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from processors.scheduler import policy, wishes
from processors.scheduler.state import Lease, LeaseState, Pool, Taking
from schemas.events import ModelState, PoolStatus, Priority

_SHOWN = (
    ("active", (LeaseState.ACTIVE,)),
    ("loading", (LeaseState.REQUESTED, LeaseState.LOADING)),
    ("draining", (LeaseState.DRAINING, LeaseState.RELEASING, LeaseState.QUARANTINED)),
    ("failed", (LeaseState.FAILED,)),
)
"""States of a model, and the states of a lease that make them; the first that fits counts."""


def pool_status(pool: Pool, name: str, now_ms: int, next_wish: int) -> PoolStatus:
    """The pool as `pool.status` tells of it; `next_wish` as in `wishes.kept`."""
    trusted = [worker.status for worker in pool.workers.values() if worker.usable]
    served = {provider for status in trusted for provider in status.providers}
    waits = {model.id: policy.estimated_wait_ms(pool, model, now_ms) for model in pool.models.values()}
    errors = {model.id: policy.load_error(pool, model) for model in pool.models.values()}
    broken = {model.id: policy.broken_reason(pool, model) for model in pool.models.values()}
    return PoolStatus(
        pool=name,
        term=pool.term,
        at_ms=now_ms,
        taken=pool.taking is Taking.TAKEN,
        ready_models=sorted({lease.model for lease in pool.leases.values() if lease.state is LeaseState.ACTIVE}),
        servable_models=sorted(model.id for model in pool.models.values() if model.provider in served),
        failed_models={model: error for model, error in errors.items() if error is not None},
        broken_models={model: reason for model, reason in broken.items() if reason is not None},
        queued=pool.queued,
        running=len(pool.running),
        estimated_wait_ms=max(waits.values(), default=0),
        waits_ms=waits,
        interactive_waits_ms={
            model.id: policy.estimated_wait_ms(pool, model, now_ms, priority=Priority.INTERACTIVE)
            for model in pool.models.values()
        },
        workers=sorted(status.worker for status in trusted),
        models=model_states(pool),
        wishes=wishes.kept(pool, next_wish),
    )


def model_states(pool: Pool) -> list[ModelState]:
    """How each model stands, by id."""
    leases: dict[str, list[Lease]] = {}
    for lease in pool.leases.values():
        leases.setdefault(lease.model, []).append(lease)
    running: dict[str, int] = {}
    for one in pool.running.values():
        running[one.request.model] = running.get(one.request.model, 0) + 1
    return [
        ModelState(
            model,
            state_of(leases.get(model, ())),
            queued=len(pool.queues.get(model, ())),
            running=running.get(model, 0),
            used_ms=max((lease.used_ms for lease in leases.get(model, ())), default=0),
        )
        for model in sorted(pool.models)
    ]


def state_of(leases: Sequence[Lease]) -> str:
    """One word for a model, from its leases."""
    held = {lease.state for lease in leases}
    return next((word for word, states in _SHOWN if held.intersection(states)), "unloaded")
