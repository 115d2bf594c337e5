"""Leases as the workers that hold them show them: loaded, failed, grown, freed, or of a scheduler before. Pure."""

from __future__ import annotations

from processors.scheduler import lives, wishes
from processors.scheduler.messages import Action
from processors.scheduler.state import Lease, LeaseState, Pool
from schemas.events import Resident, WorkerStatus


def adopt(pool: Pool, status: WorkerStatus, now_ms: int) -> list[Action]:
    """Bring leases in line with what a worker really holds."""
    actions: list[Action] = []
    for resident in status.resident:
        lease = pool.leases.get((status.worker, resident.model))
        if lease is None:
            actions += _take_over(pool, status, resident, now_ms)
        elif resident.epoch == lease.epoch:
            lease.shown = True
            actions += _follow(lease, resident, now_ms)
    return actions


def _take_over(pool: Pool, status: WorkerStatus, resident: Resident, now_ms: int) -> list[Action]:
    """A lease of an earlier term, found where it is held."""
    model = pool.models.get(resident.model)
    size = resident.bytes or (model.bytes if model is not None else 0)
    lease = Lease(
        status.worker, status.boot, resident.model, resident.device, size if resident.device else 0, resident.epoch,
        LeaseState.LOADING, moved_ms=now_ms, used_ms=now_ms, shown=True,
    )  # fmt: skip
    if wishes.is_released(pool, lease):
        lease.bytes = 0
    place = (status.worker, resident.model)
    lease.running = {r.request.id for r in pool.running.values() if (r.worker, r.request.model) == place}
    pool.leases[place] = lease
    if resident.state == "unloading":
        return lives.move(lease, LeaseState.RELEASING, now_ms)
    return _follow(lease, resident, now_ms)


def _follow(lease: Lease, resident: Resident, now_ms: int) -> list[Action]:
    """One lease, as the worker that holds it shows it."""
    match resident.state:
        case "loading" if lease.state is LeaseState.ACTIVE:
            # Its engine died and comes back under the same lease.
            return lives.move(lease, LeaseState.LOADING, now_ms)
        case "active" if lease.state is LeaseState.LOADING:
            lease.load_took_ms = now_ms - lease.moved_ms
            lease.used_ms = now_ms
            if resident.bytes and lease.device:
                lease.bytes = resident.bytes
            return lives.move(lease, LeaseState.ACTIVE, now_ms)
        case "active" if lease.device and lease.state is not LeaseState.QUARANTINED:
            lease.bytes = max(lease.bytes, resident.bytes)  # its peak
        case "failed" if lease.state in (LeaseState.LOADING, LeaseState.ACTIVE, LeaseState.DRAINING):
            lease.error = resident.error
            return lives.move(lease, LeaseState.FAILED, now_ms, reason=f"not loaded: {resident.error}")
    return []


def see_freed(pool: Pool, status: WorkerStatus) -> list[Action]:
    """What was to be unloaded and is no longer shown is free."""
    shown = {resident.model: resident.epoch for resident in status.resident if resident.state != "failed"}
    leaving = (LeaseState.RELEASING, LeaseState.QUARANTINED)
    return [
        action
        for lease in list(pool.leases.values())
        if lease.worker == status.worker and lease.state in leaving and shown.get(lease.model) != lease.epoch
        for action in lives.freed(pool, lease)
    ]
