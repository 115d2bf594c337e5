"""What always holds in the small world of the scheduling policy, whoever takes memory, changes records or makes wishes.

Memory is never granted beyond what its device was last told to have: where more is held than that, nothing is granted
until it fits again, and what is idle gives way. What is no model of the pool any more serves nobody, is loaded nowhere,
and nobody waits for it. Each raises `Broken`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from processors.scheduler import messages
from processors.scheduler.state import LeaseState, Pool, Taking
from tests.support.scheduler_machines import MODELS, SERVED, WORKERS, device_of, hold

if TYPE_CHECKING:
    from tests.support.scheduler_world import World

LEAVING = (LeaseState.DRAINING, LeaseState.RELEASING)
TRAINS = (LeaseState.REQUESTED, LeaseState.LOADING, LeaseState.ACTIVE)
PROVIDERS = {id: model.provider for id, model in (MODELS | SERVED).items()}


def held(pool: Pool, worker: str) -> int:
    """Bytes of a worker's device that are granted, to models and to jobs."""
    models = sum(lease.holds for lease in pool.leases.values() if lease.worker == worker and lease.device == "d")
    return models + sum(lease.bytes for lease in pool.trainers.values() if lease.worker == worker)


def may_grant(world: World, grant: messages.Grant | messages.GrantTraining) -> None:
    """Memory is granted to who may use it, and where it is free by all that was told."""
    pool, machine = world.pool, world.machines[grant.worker]
    known = pool.workers[grant.worker]
    hold(known.trusted and known.status.boot == grant.boot, "an untrusted worker is granted memory")
    hold(not known.status.stopping, "a stopping worker is granted memory")
    if isinstance(grant, messages.Grant):
        hold(grant.model in world.models, "a model that was removed is granted memory")
        model = world.models[grant.model]
        hold(model.provider not in machine.told_broken, "a model of a broken provider is granted memory")
        takes = model.bytes if grant.device else 0
        hold(grant.device == device_of(model.id) and grant.bytes >= takes, "a model is not granted what it takes")
        wanted = model.id not in world.parked or pool.queues.get(model.id)
        hold(wanted, "{} was unloaded by an operator, and nobody waits for it", model.id)
    if grant.device == "d":
        now = held(pool, grant.worker)
        hold(now <= machine.told, "{} is granted {} of {} bytes", grant.worker, now, machine.told)
    elif grant.device == "s" and world.server is not None:
        now, most = _in_server(world), world.server.size
        hold(now <= most, "{} of {} bytes of the server are granted", now, most)


def _in_server(world: World) -> int:
    """Bytes of the server that are granted, or taken by what nobody leases and some worker that is there saw."""
    leases = [lease for lease in world.pool.leases.values() if lease.device == "s" and lease.holds]
    leased = {lease.model for lease in leases}
    lies = world.server.lies if world.server is not None else ()
    shown = [
        {id: size for id, size in world.machines[name].shown.items() if id in lies and id not in leased}
        for name in world.pool.workers
    ]
    ours = {id: size for one in shown for id, size in one.items() if id in SERVED}
    others = max((sum(size for id, size in one.items() if id not in SERVED) for one in shown), default=0)
    return sum(lease.bytes for lease in leases) + sum(ours.values()) + others


def strays(world: World) -> list[str]:
    """What lies in the server, is ours to unload, and is leased by nobody."""
    lies = world.server.lies if world.server is not None else ()
    leased = {lease.model for lease in world.pool.leases.values() if lease.holds}
    return [id for id in lies if id in SERVED and id not in leased and id not in world.deleted]


def check_queues(world: World) -> None:
    """Nobody waits for a model that is gone, or whose provider is broken wherever it is served."""
    pool = world.pool
    if world.parked:
        world.parked -= {id for id in world.parked if pool.queues.get(id)}
    if world.released:
        check_released(world)
    if pool.taking is not Taking.TAKEN:
        return  # Until then nothing is decided.
    for id in world.removed:
        hold(not pool.queues.get(id), "{} was removed, and is waited for", id)
    if not any(world.machines[name].told_broken for name in pool.workers):
        return
    for id, queue in pool.queues.items():
        if queue:
            serving = [
                name
                for name, worker in pool.workers.items()
                if worker.usable and PROVIDERS[id] in worker.status.providers
            ]
            lives = any(PROVIDERS[id] not in world.machines[name].told_broken for name in serving)
            hold(lives or not serving, "{} is waited for, and its provider is broken everywhere", id)


def check_released(world: World) -> None:
    """What an operator said to be free is free, as long as its worker shows it."""
    for place, epoch in list(world.released.items()):
        name, id = place
        machine, lease = world.machines[name], world.pool.leases.get(place)
        shown = machine.resident.get(id)
        if not machine.alive or shown is None or (shown.epoch, shown.state) != (epoch, "ghost"):
            del world.released[place]
        elif lease is not None and lease.epoch == epoch:
            hold(not lease.holds, "{} was released, and is held", place)


def check_ticked(world: World) -> None:
    """What holds when time was told: nobody waits past its time, what is gone leaves, and what is too much too."""
    pool = world.pool
    for queue in pool.queues.values():
        for request in queue:
            hold(world.now <= request.late_ms, "{} waits past its time", request.id)
    for running in pool.running.values():
        late = world.now > running.request.deadline_ms
        hold(not late or running.cancel_asked, "{} runs past its time", running.request.id)
    if pool.taking is not Taking.TAKEN:
        return
    for lease in pool.leases.values():
        gone = lease.model in world.removed and lease.state in (LeaseState.ACTIVE, LeaseState.FAILED)
        hold(not gone, "{} was removed, and is kept", lease.model)
    crowded = [name for name in pool.workers if held(pool, name) > world.machines[name].told]
    if any(_idles(world, name) for name in crowded):
        world.tell(messages.Tick())  # It may idle only since those who waited for it were told that it is in vain.
        for name in crowded:
            idles = name in pool.workers and _idles(world, name)
            hold(not idles, "{} stays on {} in memory that is not there", idles, name)


def _idles(world: World, name: str) -> str:
    """What trains or idles on a device of which more is held than there is, and may give way."""
    pool = world.pool
    leases = [lease for lease in pool.leases.values() if (lease.worker, lease.device) == (name, "d")]
    trainers = [lease for lease in pool.trainers.values() if lease.worker == name]
    leaves = sum(lease.holds for lease in leases if lease.state in LEAVING)
    leaves += sum(lease.bytes for lease in trainers if lease.state is LeaseState.DRAINING)
    if held(pool, name) - leaves <= world.machines[name].told:
        return ""
    for trainer in trainers:
        if trainer.state in TRAINS:
            return trainer.job
    for lease in leases:
        idle = lease.state is LeaseState.ACTIVE and lease.bytes and not lease.used and not pool.queues.get(lease.model)
        pinned = lease.model in world.models and world.models[lease.model].pinned
        if idle and not pinned:
            return lease.model
    return ""


def check_load(world: World, id: str) -> None:
    """Where an operator asked for a model, it is loaded at once if there is room that nobody else waits for."""
    pool = world.pool
    served = {
        lease.model
        for lease in pool.leases.values()
        if lease.state in TRAINS and lease.worker in pool.workers and pool.workers[lease.worker].offers("p")
    }
    lacking = {one for one, queue in pool.queues.items() if queue and device_of(one) == "d"} - served
    alone = pool.taking is Taking.TAKEN and pool.wanted.keys() <= {id} and not pool.trainers and lacking <= {id}
    if not alone or device_of(id) != "d" or id not in world.models or pool.of_model(id):
        return
    for name in WORKERS:
        worker = pool.workers.get(name)
        if worker is not None and worker.offers("p"):
            room = world.machines[name].told - held(pool, name)
            hold(room < world.models[id].bytes, "{} is asked for, and has room on {}", id, name)
