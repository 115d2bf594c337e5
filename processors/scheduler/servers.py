"""Models that lie in a server's memory under no lease: those of a worker that is gone, or of others. Pure.

The memory of an engine that is a worker's child is free when the worker's process is gone. That of a server is not: it
keeps what it was asked to load. So what workers see there counts as taken, whoever had it loaded; a model of ours that
is wanted is leased where it lies, and one that nobody wants is unloaded.
"""

from __future__ import annotations

from collections.abc import Iterator

from processors.scheduler.messages import Action, Unload
from processors.scheduler.state import Dropped, Lease, LeaseState, Pool, Strayed, Taking, Unseen, Worker
from schemas.events import NO_EPOCH, Device, ServerHeld, WorkerStatus

UNLOAD_AFTER_MS = 10_000
"""How long a model may lie there unwanted: by then whoever told of it late has told again."""


SEEN_WITHIN_MS = 10_000
"""How long it may take until other workers show what a server holds, once it is loaded."""
LOOKED_WITHIN_MS = 2_000
"""How long it takes until other workers have looked at a server and told of it."""
LEAVING = (LeaseState.RELEASING, LeaseState.QUARANTINED)


def lose(pool: Pool, status: WorkerStatus, lease: Lease, now_ms: int) -> None:
    """A worker is gone that held a model: a server goes on with a load, and shows it when that is done."""
    if lease.epoch is not None and any(one.shared and one.id == lease.device for one in status.devices):
        model = pool.models.get(lease.model)
        loads_ms = 2 * model.load_ms if model is not None and lease.state is LeaseState.LOADING else 0
        pool.unseen[lease.device, lease.model] = Unseen(lease.holds, now_ms + loads_ms + SEEN_WITHIN_MS)


def see_dropped(pool: Pool, status: WorkerStatus, now_ms: int) -> None:
    """A worker shows no more what it was to unload, having looked at its server: what others saw there is older."""
    shown = {resident.model for resident in status.resident}
    for device in status.devices if pool.leases else ():
        if device.shared:
            here = {model for held in device.held for model in held.models}
            for lease in pool.leases.values():
                gone = lease.state in LEAVING and lease.model not in shown | here
                if gone and (lease.worker, lease.device) == (status.worker, device.id):
                    pool.dropped[device.id, lease.model] = Dropped(status.worker, now_ms + LOOKED_WITHIN_MS)


def strays(pool: Pool, now_ms: int) -> dict[str, list[ServerHeld]]:
    """What each server holds beside the leases on its memory, by device.

    Several workers tell of one server, each what it last saw; what any of them sees counts.
    """
    shared = list(_shared(pool))
    if not shared:
        return {}
    found: dict[str, dict[tuple[str, ...], int]] = {}
    leased = {(one.device, one.model) for one in pool.leases.values() if one.state is not LeaseState.FAILED}
    shown = _shown(pool)
    for (device_id, model), lost in pool.unseen.items():
        if (device_id, model) not in shown | leased and now_ms < lost.until_ms:
            found.setdefault(device_id, {})[model,] = lost.bytes
    for worker, device in shared:
        seen: dict[tuple[str, ...], int] = {}  # by the models that it may be; what is none of ours, all together
        old = {
            model
            for (where, model), one in pool.dropped.items()
            if where == device.id and one.worker != worker.status.worker and now_ms < one.until_ms
        }
        for held in device.held:
            if not any((device.id, model) in leased or model in old for model in held.models):
                seen[tuple(held.models)] = seen.get(tuple(held.models), 0) + held.bytes
        most = found.setdefault(device.id, {})
        for models, size in seen.items():
            most[models] = max(size, most.get(models, 0))
    return {device: [ServerHeld(list(models), size) for models, size in held.items()] for device, held in found.items()}


def is_leaving(pool: Pool, device: str, model: str) -> bool:
    """Whether a server was asked to unload a model, and still holds it."""
    stray = pool.strayed.get((device, model))
    return stray is not None and stray.asked


def unload_strays(pool: Pool, now_ms: int) -> list[Action]:
    """Have models unloaded that nobody has a lease on and nobody wants."""
    if pool.taking is not Taking.TAKEN:
        return []
    actions: list[Action] = []
    seen: dict[tuple[str, str], Strayed] = {}
    shown = _shown(pool)
    pool.dropped = {at: one for at, one in pool.dropped.items() if now_ms < one.until_ms}
    pool.unseen = {at: lost for at, lost in pool.unseen.items() if at not in shown and now_ms < lost.until_ms}
    for device, found in strays(pool, now_ms).items():
        for stray in found:
            if not stray.models:
                continue  # It is not ours to unload.
            model = stray.models[0]
            known = pool.strayed.get((device, model)) or Strayed(now_ms)
            if now_ms - known.since_ms >= UNLOAD_AFTER_MS:
                worker = next((one for one, shown in _shared(pool) if shown.id == device and one.usable), None)
                # Who wants it and has not leased it by the next time cannot have it as it lies.
                wanted = not known.spared and any(_wanted(pool, name) for name in stray.models)
                asked = worker is not None and not wanted
                known = Strayed(now_ms, asked, spared=wanted)  # Asked again, should it stay.
                if worker is not None and asked:
                    # One whose load failed has it in its books under that epoch, and obeys none before it.
                    failed = pool.leases.get((worker.status.worker, model))
                    epoch = failed.granted if failed is not None else NO_EPOCH
                    actions.append(Unload(worker.status.worker, worker.status.boot, model, epoch))
            seen[device, model] = known
    pool.strayed = seen
    return actions


def _shared(pool: Pool) -> Iterator[tuple[Worker, Device]]:
    for worker in pool.workers.values():
        for device in worker.status.devices:
            if device.shared:
                yield worker, device


def _shown(pool: Pool) -> set[tuple[str, str]]:
    """(device, model) of all that some worker sees in a server."""
    return {(device.id, model) for _, device in _shared(pool) for held in device.held for model in held.models}


def _wanted(pool: Pool, name: str) -> bool:
    model = pool.models.get(name)
    return bool(pool.queues.get(name)) or (model is not None and pool.at_hand(model))
