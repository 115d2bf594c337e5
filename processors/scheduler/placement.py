"""Which model gets the memory of which device, and who has to give it back. Pure, as the policy that calls it.

A model that takes none of our memory is held by every worker that serves it. Others that are wanted and not held take
turns by what a second of loading gains: requests that wait, times how long they have, over the load time. Each takes
free memory where it fits tightest; of workers that share it, the one with the fewest models. Where nothing is free, the
cheapest set of held models that suffices is drained: idle ones first, by what it would cost to need them again
(expected requests x load time) for the memory they give, and not before the device has loaded what it loads now. A
model in use gives way only to a queue that is about to wait for longer than W_max: in simulation (`bench/scheduler`)
each rule by which it gave way sooner cost more in loads than it won. The memory of pinned models, and memory that is
not seen to be free, is never granted.

Training jobs are lent what is left: free memory, and that of idle models that nobody has asked for for minutes. They
are given notice before a model that may still be of use gives way, if the wait for their checkpoint costs less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from processors.scheduler import training
from processors.scheduler.messages import Action, Grant, LeaseMoved, Unload
from processors.scheduler.state import Job, Lease, LeaseState, Pool, Taking, TrainingLease, Worker
from processors.scheduler.yielding import gives_way, yield_slots
from schemas.control import Model

RELOAD_AFTER_MS = 5_000
"""A model whose load failed is tried again after this long."""
RELEASE_TIMEOUT_MS = 30_000
"""A worker that does not show the memory free after this long has it quarantined."""
DEMAND_HALF_LIFE_MS = 60_000
FORGOTTEN = 1 / 16
"""Demand below which an idle model's memory is lent to training: one request four minutes ago."""


class Place(NamedTuple):
    """A device of a worker; the worker is empty for one that several share."""

    worker: str
    device: str


class _Wish(NamedTuple):
    """A model that is wanted and that nobody holds."""

    model: Model
    waiting: int
    """Requests that wait for it."""
    waited_ms: int
    """How long its oldest request has waited."""
    may_evict: bool
    """Whether somebody waits for it or asked for it; one that is only to be there at hand takes free memory."""
    batch_only: bool

    late: bool
    """Whether half of W_max has passed, or will have when it is loaded: it is passed over for nobody else then."""

    @property
    def rank(self) -> tuple[bool, bool, bool, float, str]:
        """Its place among wishes, the lowest being the first: late ones by their wait, others by what they gain."""
        gain = self.waited_ms if self.late else self.waited_ms * self.waiting / max(1, self.model.load_ms)
        return not self.may_evict, self.batch_only, not self.late, -gain, self.model.id


# --- leases move ----------------------------------------------------------------------------------------------------


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
    if model.keep_alive_ms is None or model.pinned or model.preload or _busy(pool, lease):
        return False
    return now_ms - max(lease.used_ms, lease.moved_ms) >= model.keep_alive_ms


def due_again(lease: Lease, now_ms: int) -> bool:
    """Whether a load that failed may be tried again."""
    return lease.state is LeaseState.FAILED and now_ms - lease.moved_ms >= RELOAD_AFTER_MS


# --- memory ---------------------------------------------------------------------------------------------------------


def can_ever_fit(pool: Pool, model: Model) -> bool:
    """Whether some worker that is there could hold the model alone; True while none is there that serves it."""
    serving = [
        worker for worker in pool.workers.values() if worker.usable and model.provider in worker.status.providers
    ]
    sizes = [[device.bytes for device in worker.devices_for(model.provider)] for worker in serving]
    return not sizes or any(not of_one or model.bytes <= max(of_one) for of_one in sizes)


# --- planning -------------------------------------------------------------------------------------------------------


def place(pool: Pool, now_ms: int) -> list[Action]:
    """Ask for leases on what is wanted, and drain what must give way; nothing before the pool is taken."""
    if pool.taking is not Taking.TAKEN:
        return []
    planner = _Planner(pool, now_ms)
    planner.relieve()
    failed = _failed_over(pool)
    for model in pool.models.values():
        if _at_hand(pool, model) or model.id in failed or pool.queues.get(model.id):
            planner.spread(model)
    for wish in sorted(_wishes(pool, now_ms), key=lambda wish: wish.rank):
        planner.grant(wish)
    for model in pool.models.values():
        if model.id in pool.queues and _short_of_slots(pool, model):
            planner.widen(model)
    for job in training.waiting(pool):
        planner.lend(job)
    return planner.actions


def _wishes(pool: Pool, now_ms: int) -> Iterator[_Wish]:
    coming = {lease.model for lease in pool.leases.values() if _will_serve(pool, lease)}
    failed = _failed_over(pool)
    for model in pool.models.values():
        queue = pool.queues.get(model.id)
        if model.id in coming or not model.bytes or not (queue or model.id in failed or _at_hand(pool, model)):
            continue
        pressing = queue.oldest(batch=False) if queue else None
        oldest = pressing or (queue.oldest() if queue else None)
        waited = now_ms - oldest.waiting_ms if oldest is not None else 0
        may_evict = oldest is not None or model.id in pool.wanted
        late = pressing is not None and 2 * (waited + model.load_ms) >= pool.limits.max_wait_ms
        yield _Wish(model, len(queue or ()), waited, may_evict, pressing is None, late)


def _at_hand(pool: Pool, model: Model) -> bool:
    """Whether a model is to be held though nobody waits for it."""
    return model.pinned or model.id in pool.wanted or (model.preload and model.id not in pool.parked)


def _failed_over(pool: Pool) -> set[str]:
    """Models whose load failed and whose requests go to a fallback: nobody asks for them until they are there again."""
    failed = {lease.model for lease in pool.leases.values() if lease.state is LeaseState.FAILED}
    return {model_id for model_id in failed if (model := pool.models.get(model_id)) is not None and model.fallbacks}


def _short_of_slots(pool: Pool, model: Model) -> bool:
    if not model.bytes:
        return False
    leases = [lease for lease in pool.of_model(model.id) if _will_serve(pool, lease)]
    slots = sum(model.max_concurrency - lease.used for lease in leases)
    return bool(leases) and len(pool.queues[model.id]) > slots


def _will_serve(pool: Pool, lease: Lease) -> bool:
    """Whether the lease serves or will; not on a worker that is about to leave, or whose provider fails."""
    worker = pool.workers.get(lease.worker)
    return lease.coming and (worker is None or not worker.status.stopping) and not pool.blocked(lease)


def _busy(pool: Pool, lease: Lease) -> bool:
    return bool(lease.used or pool.queues.get(lease.model))


def _pinned(pool: Pool, lease: Lease) -> bool:
    model = pool.models.get(lease.model)
    return model is not None and model.pinned


class _Planner:
    """One look at a pool; what it grants and claims counts for the next wish."""

    def __init__(self, pool: Pool, now_ms: int) -> None:
        self.actions: list[Action] = []
        self._pool = pool
        self._now = now_ms
        self._free: Counter[Place] = Counter()
        """Bytes of each device that nobody holds or waits for; below 0 where somebody waits."""
        self._leaving: Counter[Place] = Counter()
        """Bytes that are on their way back."""
        self._active: dict[Place, list[Lease]] = {}
        """Leases that may have to give way."""
        self._use: dict[tuple[str, str], int] = {}
        """Of those, by worker and model: 0 for an idle one, 1 for one that only batch work uses, 2 for others."""
        self._loading: set[Place] = set()
        """Devices on which a model is being loaded."""
        self._shared: set[str] = set()
        for name, worker in pool.workers.items():
            for device in worker.status.devices:
                if device.shared:
                    self._shared.add(device.id)
                self._free[self._spot(name, device.id)] = device.bytes
        for lease in pool.leases.values():
            spot = self._spot(lease.worker, lease.device)
            self._free[spot] -= lease.holds
            if lease.state in (LeaseState.DRAINING, LeaseState.RELEASING):
                self._leaving[spot] += lease.holds
            elif lease.state in (LeaseState.REQUESTED, LeaseState.LOADING):
                self._loading.add(spot)
            elif lease.state is LeaseState.ACTIVE and lease.bytes and not _pinned(pool, lease):
                self._active.setdefault(spot, []).append(lease)
                busy = _busy(pool, lease)
                self._use[lease.worker, lease.model] = busy + (busy and not gives_way(pool, lease))
        self._training: dict[Place, list[TrainingLease]] = {}
        """Leases of jobs that may be given notice."""
        self._training_leaves: set[Place] = set()
        """Devices on which jobs were given notice."""
        for trainer in pool.trainers.values():
            spot = self._spot(trainer.worker, trainer.device)
            self._free[spot] -= trainer.bytes
            if trainer.state is LeaseState.DRAINING:
                self._leaving[spot] += trainer.bytes
                self._training_leaves.add(spot)
            elif trainer.state is not LeaseState.QUARANTINED:
                self._training.setdefault(spot, []).append(trainer)

    def _spot(self, worker: str, device: str) -> Place:
        return Place("" if device in self._shared else worker, device)

    def relieve(self) -> None:
        """Drain idle models where more is held than there is: a device shrank or is gone, or models grew."""
        for spot, free in list(self._free.items()):
            missing = -free - self._leaving[spot]
            if missing <= 0 or not spot.device:
                continue
            missing -= self._end_training(spot, missing, "its device has less memory than is held")
            idle = [lease for lease in self._active.get(spot, ()) if not self._in_use(lease)]
            for lease in sorted(idle, key=lambda lease: self._cost(lease) / lease.bytes):
                if missing > 0:
                    missing -= lease.bytes
                    self._drain(spot, lease, "its device has less memory than is held")

    def spread(self, model: Model) -> None:
        """Have every worker hold a model that takes no memory there that is counted."""
        for name, worker in self._workers(model):
            if not worker.devices_for(model.provider):
                self._ask(model, name, "")

    def grant(self, wish: _Wish) -> None:
        """Give a model memory, or have memory made free for it."""
        model = wish.model
        places = list(self._places(model))
        fitting = [place for place in places if self._free[self._spot(*place)] >= model.bytes]
        if fitting:
            leases = Counter(worker for worker, _ in self._pool.leases)
            self._ask(model, *min(fitting, key=lambda place: (self._free[self._spot(*place)], leases[place.worker])))
        elif places:
            spots = sorted({self._spot(*place) for place in places})
            if wish.may_evict:
                self._make_room(wish, spots)
            else:
                self._have_training_leave(spots, model)

    def widen(self, model: Model) -> None:
        """Serve a model with more waiting than slots from further workers, where that takes nothing from others."""
        places = list(self._places(model))
        for place in places:
            if self._free[self._spot(*place)] >= model.bytes:
                self._ask(model, *place)
                return
        self._have_training_leave([self._spot(*place) for place in places], model)

    def lend(self, job: Job) -> None:
        """Let a job train in memory that nobody wants or is likely to want soon."""
        spots = [Place(worker, device) for worker, device in training.devices(self._pool, job)]
        fitting = [spot for spot in spots if self._free[spot] >= job.bytes]
        if fitting:
            spot = min(fitting, key=lambda spot: (self._free[spot], spot))
            self._free[spot] -= job.bytes
            self.actions += training.grant(self._pool, job, self._pool.workers[spot.worker], spot.device, self._now)
            return
        for spot in spots:
            if self._free[spot] + self._leaving[spot] >= job.bytes:
                self._free[spot] -= job.bytes
                return
            forgotten = [lease for lease in self._active.get(spot, ()) if self._forgotten(lease)]
            if self._free[spot] + self._leaving[spot] + sum(lease.bytes for lease in forgotten) >= job.bytes:
                forgotten.sort(key=lambda lease: (lease.used_ms, lease.model))
                for lease in forgotten:
                    if self._free[spot] + self._leaving[spot] < job.bytes:
                        self._drain(spot, lease, f"nobody asks for it, and {job.id} can train")
                self._free[spot] -= job.bytes
                return

    def _forgotten(self, lease: Lease) -> bool:
        """Whether a model is idle, was not asked for for minutes, and is not to be at hand."""
        model = self._pool.models.get(lease.model)
        kept = model is not None and _at_hand(self._pool, model)
        turn_ms = self._now - max(lease.moved_ms, lease.used_ms)
        rested = turn_ms >= DEMAND_HALF_LIFE_MS
        return (
            rested and not kept and not self._in_use(lease) and demand(self._pool, lease.model, self._now) < FORGOTTEN
        )

    def _workers(self, model: Model) -> Iterator[tuple[str, Worker]]:
        """Workers that may be given the model and have no lease on it."""
        for name, worker in self._pool.workers.items():
            if worker.offers(model.provider):
                lease = self._pool.leases.get((name, model.id))
                if lease is None or due_again(lease, self._now):
                    yield name, worker

    def _places(self, model: Model) -> Iterator[Place]:
        """The devices of those workers, for a model whose size is known.

        A server holds a model once, whoever asks it to: one worker's unload would take it from another.
        """
        if not model.bytes:
            return
        held = {self._spot(lease.worker, lease.device) for lease in self._pool.of_model(model.id) if lease.holds}
        for name, worker in self._workers(model):
            for device in worker.devices_for(model.provider):
                if not (device.shared and self._spot(name, device.id) in held):
                    yield Place(name, device.id)

    def _ask(self, model: Model, worker: str, device: str) -> None:
        boot = self._pool.workers[worker].status.boot
        size = model.bytes if device else 0
        self._pool.leases[worker, model.id] = Lease(worker, boot, model.id, device, size, moved_ms=self._now)
        spot = self._spot(worker, device)
        self._free[spot] -= size
        self._loading.add(spot)
        self.actions.append(Grant(worker, boot, model.id, device, size))

    # --- making room ----------------------------------------------------------------------------------------------

    def _make_room(self, wish: _Wish, places: list[Place]) -> None:
        """Wait for memory that is on its way back, else drain the cheapest set that suffices."""
        # What comes back may come late; no job trains in the meantime where a queue is late too.
        leaves = bool(self._training_leaves.intersection(places))
        if wish.late and not leaves and self._have_training_leave(places, wish.model):
            return
        for spot in places:
            if self._free[spot] + self._leaving[spot] >= wish.model.bytes:
                self._free[spot] -= wish.model.bytes
                return
        # Loads share the drive and the bus of a device: what made room now would be missed before the load begins.
        idle = [spot for spot in places if wish.late or spot not in self._loading]
        options = [(spot, chosen) for spot in idle if (chosen := self._victims(wish, spot)) is not None]
        if self._training:
            best = min((self._price(chosen) for _, chosen in options), default=(True, 0.0))
            worth = [spot for spot in places if best >= (False, self._notice_price(wish, spot))]
            if self._have_training_leave(worth, wish.model):
                return
            if not options:
                options = self._all_together(wish, idle)
        if not options:
            return
        spot, victims = min(options, key=lambda option: (sum(map(self._cost, option[1])), option[0]))
        self._free[spot] -= wish.model.bytes
        for lease in victims:
            self._drain(spot, lease, f"makes room for {wish.model.id}")
            if not wish.batch_only:
                self.actions += yield_slots(self._pool, [lease], len(lease.running))

    def _price(self, victims: list[Lease]) -> tuple[bool, float]:
        """Whether a model in use would give way, and the expected cost in milliseconds of waiting requests."""
        return any(self._in_use(lease) for lease in victims), sum(map(self._cost, victims))

    def _notice_price(self, wish: _Wish, spot: Place) -> float:
        """What it costs those who wait that a trainer writes its checkpoint first, in the same unit."""
        return max((lease.notice_ms for lease in self._training.get(spot, ())), default=0) * max(1, wish.waiting)

    def _have_training_leave(self, spots: list[Place], model: Model) -> bool:
        """Give notice to jobs, and keep their bytes for a model, where that suffices; whether it does anywhere."""
        for spot in spots if self._pool.trainers else ():
            missing = model.bytes - self._free[spot] - self._leaving[spot]
            trains = self._training.get(spot, [])
            concerned = trains or spot in self._training_leaves
            if concerned and sum(lease.bytes for lease in trains) >= missing:
                self._end_training(spot, missing, f"makes room for {model.id}")
                self._free[spot] -= model.bytes
                return True
        return False

    def _all_together(self, wish: _Wish, spots: list[Place]) -> list[tuple[Place, list[Lease]]]:
        """A device where jobs and models suffice only together: its jobs are given notice; the models to drain."""
        for spot in spots:
            trained = sum(lease.bytes for lease in self._training.get(spot, ()))
            self._leaving[spot] += trained
            victims = self._victims(wish, spot)
            self._leaving[spot] -= trained
            if victims is not None:
                self._end_training(spot, trained, f"makes room for {wish.model.id}")
                return [(spot, victims)]
        return []

    def _end_training(self, spot: Place, missing: int, reason: str) -> int:
        """Give notice to the jobs that began last until enough is on its way back; returns how much that is."""
        found = 0
        for lease in sorted(self._training.get(spot, ()), key=lambda lease: (-lease.moved_ms, lease.job)):
            if found < missing:
                found += lease.bytes
                self._training[spot].remove(lease)
                self._training_leaves.add(spot)
                self._leaving[spot] += lease.bytes
                self.actions += training.notice(self._pool, lease, self._now, reason)
        return found

    def _drain(self, spot: Place, lease: Lease, reason: str) -> None:
        self._active[spot].remove(lease)
        self._leaving[spot] += lease.bytes
        self.actions += drain(lease, self._now, reason)

    def _victims(self, wish: _Wish, spot: Place) -> list[Lease] | None:
        """The cheapest of the leases on a device that may be taken and suffice; None when they do not."""
        missing = wish.model.bytes - self._free[spot] - self._leaving[spot]
        candidates = [lease for lease in self._active.get(spot, ()) if self._may_take(wish, lease)]
        if sum(lease.bytes for lease in candidates) < missing:
            return None
        candidates.sort(
            key=lambda lease: (self._in_use(lease), self._cost(lease) / lease.bytes, lease.model),
        )
        chosen: list[Lease] = []
        for lease in candidates:
            if missing <= 0:
                break
            chosen.append(lease)
            missing -= lease.bytes
        for lease in sorted(chosen, key=self._cost, reverse=True):
            if missing + lease.bytes <= 0:
                chosen.remove(lease)
                missing += lease.bytes
        return chosen

    def _may_take(self, wish: _Wish, lease: Lease) -> bool:
        if self._in_use(lease) > (0 if wish.batch_only else 1):
            return self._must_have(wish, lease)
        turn_ms = self._pool.limits.residency_loads * self._load_ms(lease)
        return self._now - lease.moved_ms >= turn_ms or self._must_have(wish, lease)

    def _in_use(self, lease: Lease) -> int:
        return self._use[lease.worker, lease.model]

    def _must_have(self, wish: _Wish, lease: Lease) -> bool:
        """Whether the queue would wait for longer than W_max if this lease was not drained now."""
        needs = wish.model.load_ms + 2 * self._pool.service_ms.get(lease.model, 0.0)
        return not wish.batch_only and wish.waited_ms + needs >= self._pool.limits.max_wait_ms

    def _load_ms(self, lease: Lease) -> int:
        model = self._pool.models.get(lease.model)
        return model.load_ms if model is not None else 0

    def _cost(self, lease: Lease) -> float:
        """Expected time to load it again: how often it is asked for, times its load."""
        return demand(self._pool, lease.model, self._now) * max(1, self._load_ms(lease))


def demand(pool: Pool, model: str, now_ms: int) -> float:
    """Requests for a model of late; each counts half after `DEMAND_HALF_LIFE_MS`."""
    count, at_ms = pool.demand.get(model, (0.0, now_ms))
    return float(count * 0.5 ** ((now_ms - at_ms) / DEMAND_HALF_LIFE_MS))


def count_demand(pool: Pool, model: str, now_ms: int) -> None:
    """A request for the model has come."""
    pool.demand[model] = (demand(pool, model, now_ms) + 1.0, now_ms)
