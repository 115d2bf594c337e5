"""Which model gets the memory of which device, and who has to give it back. Pure, as the policy that calls it.

A model that takes none of our memory is held by every worker that serves it. Others that are wanted and not held take
turns by what a second of loading gains: requests that wait, times how long they have, over the load time. Each takes
free memory where it fits tightest; of workers that share it, the one with the fewest models. Where nothing is free,
held models are drained, and not before the device has loaded what it loads now. They are chosen greedily: idle ones
first, by what it would cost to need them again (expected requests x load time) for the memory they give, until they
suffice; then those are spared, the dearest first, without which the others still do. That is not always the cheapest
set. A model in use gives way only to a queue that is about to lack its model for longer than W_max, and not before it
has had a turn: in simulation (`bench/scheduler`) each rule by which it gave way sooner cost more in loads than it won.
The memory of pinned models, and memory that is not seen to be free, is never granted.

Training jobs are lent what is left: free memory, and that of idle models that nobody has asked for for minutes. They
are given notice before a model that may still be of use gives way, if the wait for their checkpoint costs less.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from processors.scheduler import servers, training
from processors.scheduler.lives import drain, due_again
from processors.scheduler.messages import Action, Grant
from processors.scheduler.state import Job, Lease, LeaseState, Pool, Taking, TrainingLease
from processors.scheduler.yielding import gives_way, yield_slots
from schemas.control import Model
from schemas.events import Priority

LEAST_TURN_MS = 1_000
"""A model in use that was loaded for less than this, or than its load took, gives way to nobody: queues that are all
late would take their models from each other before any of them is served."""
LATENESS_MS = 1_000
"""How much later than it could a plan is made, and a worker shows what it has done."""
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
    lacked_ms: int
    """How long there has been somebody who waits, not with batch work, while nobody had the model loaded."""
    may_evict: bool
    """Whether somebody waits for it or asked for it; one that is only to be there at hand takes free memory."""
    batch_only: bool

    late: bool
    """Whether half of W_max has passed, or will have when it is loaded: it is passed over for nobody else then."""
    ahead_ms: float = 0
    """By how much sooner it must have its memory, so that others who are late have theirs in time after it."""

    @property
    def rank(self) -> tuple[bool, bool, bool, float, str]:
        """Its place among wishes, the lowest being the first: late ones by their wait, others by what they gain."""
        gain = self.lacked_ms if self.late else self.waited_ms * self.waiting / max(1, self.model.load_ms)
        return not self.may_evict, self.batch_only, not self.late, -gain, self.model.id


@dataclass(slots=True, eq=False)
class _Holder:
    """An active lease that may have to give way."""

    lease: Lease
    use: int
    """0 for an idle one, 1 for one that only batch work uses, 2 for others."""
    rested: bool
    """Whether it has held its memory for as long as it is promised."""
    had_turn: bool
    """Whether it was loaded for at least as long as its load took."""
    ends_ms: float
    """How long it takes until what runs on it has ended."""
    cost: float
    """Expected time to load it again: how often it is asked for, times its load."""

    @property
    def bytes(self) -> int:
        return self.lease.bytes

    def order(self) -> tuple[int, float, str]:
        """In which order they give way: idle ones by what they cost, those in use by who has had the longest turn."""
        return self.use, self.lease.moved_ms if self.use > 1 else self.cost / self.bytes, self.lease.model


class _Option(NamedTuple):
    """A device that a model may be given."""

    place: Place
    spot: Place
    """Where its bytes are counted."""


# --- memory ---------------------------------------------------------------------------------------------------------


def too_large(pool: Pool, model: Model) -> str | None:
    """Why no worker could hold the model, if it had all memory to itself; None also while none is there to serve it."""
    served = False
    for worker in pool.workers.values():
        if worker.usable and model.provider in worker.status.providers:
            devices = worker.devices_for(model.provider)
            if not devices or any(model.bytes <= device.bytes for device in devices):
                return None
            served = True
    return f"takes {model.bytes} bytes, more than any device of this pool has" if served else None


# --- planning -------------------------------------------------------------------------------------------------------


def place(pool: Pool, now_ms: int) -> list[Action]:
    """Ask for leases on what is wanted, and drain what must give way; nothing before the pool is taken."""
    if pool.taking is not Taking.TAKEN:
        return []
    for lease in pool.leases.values():
        if lease.state is LeaseState.ACTIVE and _will_serve(pool, lease):
            pool.ready_ms[lease.model] = now_ms
    planner = _Planner(pool, now_ms)
    planner.relieve()
    failed = _failed_over(pool)
    wanted = [
        model
        for model in pool.models.values()
        if pool.queues.get(model.id) or model.id in failed or pool.at_hand(model)
    ]
    for model in wanted:
        planner.spread(model)
    held = {lease.model for lease in pool.leases.values() if _will_serve(pool, lease)}
    wishes = (_wish(pool, model, now_ms) for model in wanted if model.bytes and model.id not in held)
    for wish in planner.in_time(sorted(wishes, key=lambda wish: wish.rank)):
        planner.grant(wish)
    for model in wanted:
        if _short_of_slots(pool, model):
            planner.widen(model)
    for job in training.waiting(pool):
        planner.lend(job)
    return planner.actions


def _wish(pool: Pool, model: Model, now_ms: int) -> _Wish:
    queue = pool.queues.get(model.id)
    pressing = queue.oldest(batch=False) if queue else None
    oldest = pressing or (queue.oldest() if queue else None)
    waited = now_ms - oldest.waiting_ms if oldest is not None else 0
    # Since somebody waits, not since the oldest came: where callers leave before W_max, it would never be late.
    since_ms = queue.pressing_ms if queue and pressing else now_ms - waited
    ready_ms = pool.ready_ms.get(model.id, 0)
    lacked = now_ms - (since_ms if ready_ms > now_ms else max(since_ms, ready_ms))  # a clock may have been put back
    may_evict = oldest is not None or model.id in pool.wanted
    late = pressing is not None and 2 * (lacked + model.load_ms) >= pool.limits.max_wait_ms
    return _Wish(model, len(queue or ()), waited, lacked, may_evict, pressing is None, late)


def before(pool: Pool, model: Model, now_ms: int, priority: Priority) -> list[Model]:
    """Models that are waited for and get memory before one that is asked for now, those first that come first."""
    held = {lease.model for lease in pool.leases.values() if _will_serve(pool, lease)}
    wishes = [
        _wish(pool, other, now_ms)
        for id, queue in pool.queues.items()
        if queue and id not in held and id != model.id and (other := pool.models.get(id)) is not None and other.bytes
    ]
    own = _wish_with(pool, model, now_ms, priority).rank
    return [wish.model for wish in sorted(wishes, key=lambda wish: wish.rank) if wish.rank < own]


def due_ms(pool: Pool, model: Model, now_ms: int, priority: Priority) -> float:
    """In how many milliseconds models in use must have ended for one that is asked for now; infinite for batch work."""
    wish = _wish_with(pool, model, now_ms, priority)
    left_ms = pool.limits.max_wait_ms - wish.lacked_ms - wish.model.load_ms - LATENESS_MS
    return math.inf if wish.batch_only else left_ms


def _wish_with(pool: Pool, model: Model, now_ms: int, priority: Priority) -> _Wish:
    """The wish of a model's queue when a request has joined it that comes now."""
    wish = _wish(pool, model, now_ms)
    if wish.batch_only and priority is not Priority.BATCH:  # It is the first that does not wait for others.
        wish = wish._replace(waited_ms=0, lacked_ms=0, batch_only=False)
    return wish._replace(waiting=wish.waiting + 1, may_evict=True)


def turn_ms(load_ms: int) -> int:
    """How long a model in use keeps its memory at least, if its load takes so long."""
    return max(LEAST_TURN_MS, load_ms)


def _failed_over(pool: Pool) -> set[str]:
    """Models whose load failed and whose requests go to a fallback: nobody asks for them until they are there again."""
    failed = {lease.model for lease in pool.leases.values() if lease.state is LeaseState.FAILED}
    return {model_id for model_id in failed if (model := pool.models.get(model_id)) is not None and model.fallbacks}


def _short_of_slots(pool: Pool, model: Model) -> bool:
    queue = pool.queues.get(model.id)
    if not model.bytes or not queue:
        return False
    leases = [lease for lease in pool.of_model(model.id) if _will_serve(pool, lease)]
    slots = sum(model.max_concurrency - lease.used for lease in leases)
    return bool(leases) and len(queue) > slots


def _will_serve(pool: Pool, lease: Lease) -> bool:
    """Whether the lease serves or will; not on a worker that is about to leave, or whose provider fails."""
    worker = pool.workers.get(lease.worker)
    return lease.coming and (worker is None or not worker.status.stopping) and not pool.blocked(lease)


def _pinned(pool: Pool, lease: Lease) -> bool:
    model = pool.models.get(lease.model)
    return model is not None and model.pinned


class _Planner:
    """One look at a pool; what it grants and claims counts for the next wish."""

    def __init__(self, pool: Pool, now_ms: int) -> None:
        self.actions: list[Action] = []
        self._pool = pool
        self._now = now_ms
        self._free: dict[Place, int] = defaultdict(int)
        """Bytes of each device that nobody holds or waits for; below 0 where somebody waits."""
        self._leaving: dict[Place, int] = defaultdict(int)
        """Bytes that are on their way back."""
        self._active: dict[Place, list[_Holder]] = {}
        self._offers: dict[str, list[tuple[str, list[_Option]]]] = {}
        """Workers that may be given work for a provider's models, and their devices for it; filled as they are asked
        for."""
        self._movable: dict[Place, int] = defaultdict(int)
        """Bytes of leases that may have to give way, now or when they are loaded."""
        self._loading: set[Place] = set()
        """Devices on which a model is being loaded."""
        self._shared: set[str] = set()
        self._there: dict[Place, dict[str, int]] = defaultdict(dict)
        """Bytes of models that a server holds and nobody has a lease on: those of a worker that is gone."""
        for name, worker in pool.workers.items():
            for device in worker.status.devices:
                if device.shared:
                    self._shared.add(device.id)
                self._free[self._spot(name, device.id)] = device.bytes
        for server, found in servers.strays(pool, now_ms).items():
            spot = Place("", server)
            self._there[spot] = {model: stray.bytes for stray in found for model in stray.models}
            self._free[spot] -= sum(stray.bytes for stray in found)
        for lease in pool.leases.values():
            spot = self._spot(lease.worker, lease.device)
            self._free[spot] -= lease.holds
            movable = lease.coming and not _pinned(pool, lease)
            if movable:
                self._movable[spot] += lease.bytes
            if lease.state in (LeaseState.DRAINING, LeaseState.RELEASING):
                self._leaving[spot] += lease.holds
            elif lease.state in (LeaseState.REQUESTED, LeaseState.LOADING):
                self._loading.add(spot)
            elif movable and lease.bytes:
                self._active.setdefault(spot, []).append(self._holder(lease))
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

    def _holder(self, lease: Lease) -> _Holder:
        pool, busy = self._pool, bool(lease.used or self._pool.queues.get(lease.model))
        model = pool.models.get(lease.model)
        load_ms = model.load_ms if model is not None else 0
        held_ms = self._now - lease.moved_ms
        return _Holder(
            lease=lease,
            use=busy + (busy and not gives_way(pool, lease)),
            rested=held_ms >= pool.limits.residency_loads * load_ms,
            had_turn=not 0 <= held_ms < turn_ms(max(load_ms, lease.load_took_ms)),
            ends_ms=2 * pool.service_ms.get(lease.model, 0.0),
            cost=demand(pool, lease.model, self._now) * max(1, load_ms),
        )

    def relieve(self) -> None:
        """Drain idle models where more is held than there is: a device shrank or is gone, or models grew."""
        for spot, free in list(self._free.items()):
            missing = -free - self._leaving[spot]
            if missing <= 0 or not spot.device:
                continue
            missing -= self._end_training(spot, missing, "its device has less memory than is held")
            idle = [holder for holder in self._active.get(spot, ()) if not holder.use]
            for holder in sorted(idle, key=lambda holder: holder.cost / holder.bytes):
                if missing > 0:
                    missing -= holder.bytes
                    self._drain(spot, holder, "its device has less memory than is held")

    def in_time(self, wishes: list[_Wish]) -> list[_Wish]:
        """The same, each with how much sooner it must begin for those that come after it.

        Late ones come first, by when W_max ends for them. From when one of them has its memory to when the next has it,
        the turn of the first passes, what it runs then ends, and the next is loaded. Where the ends of their W_max are
        closer than that, the first must be done by so much sooner. Those that share no device are in nobody's way.
        """
        late = [(wish, {option.spot for option in self._options(wish.model)}) for wish in wishes if wish.late]
        if len(late) < 2:
            return wishes
        sooner: dict[str, float] = {}
        for at, (wish, spots) in enumerate(late):
            before, takes_ms, most = wish, 0.0, 0.0
            for other, places in late[at + 1 :]:
                if spots.isdisjoint(places):
                    continue
                ends_ms = max((holder.ends_ms for spot in places for holder in self._active.get(spot, ())), default=0.0)
                takes_ms += (turn_ms(before.model.load_ms) + ends_ms + other.model.load_ms) / len(places)
                most = max(most, takes_ms - (wish.lacked_ms - other.lacked_ms))
                before = other
            sooner[wish.model.id] = most
        return [wish._replace(ahead_ms=sooner.get(wish.model.id, 0.0)) for wish in wishes]

    def spread(self, model: Model) -> None:
        """Have every worker hold a model that takes no memory there that is counted."""
        for name, devices in self._offering(model.provider):
            if not devices and self._may_hold(model, name):
                self._ask(model, name, "")

    def grant(self, wish: _Wish) -> None:
        """Give a model memory, or have memory made free for it."""
        model = wish.model
        options = self._options(model)
        fitting = [option for option in options if self._fits(model, option.spot)]
        if fitting:
            leases = Counter(worker for worker, _ in self._pool.leases)
            best = min(fitting, key=lambda option: (self._free[option.spot], leases[option.place.worker]))
            self._ask(model, *best.place)
        elif options:
            spots = sorted({option.spot for option in options})
            if wish.may_evict:
                self._make_room(wish, spots)
            else:
                self._have_training_leave(spots, model)

    def widen(self, model: Model) -> None:
        """Serve a model with more waiting than slots from further workers, where that takes nothing from others."""
        options = self._options(model)
        for option in options:
            if self._fits(model, option.spot):
                self._ask(model, *option.place)
                return
        self._have_training_leave([option.spot for option in options], model)

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
            forgotten = [holder for holder in self._active.get(spot, ()) if self._forgotten(holder)]
            if self._free[spot] + self._leaving[spot] + sum(holder.bytes for holder in forgotten) >= job.bytes:
                forgotten.sort(key=lambda holder: (holder.lease.used_ms, holder.lease.model))
                for holder in forgotten:
                    if self._free[spot] + self._leaving[spot] < job.bytes:
                        self._drain(spot, holder, f"nobody asks for it, and {job.id} can train")
                self._free[spot] -= job.bytes
                return

    def _forgotten(self, holder: _Holder) -> bool:
        """Whether a model is idle, was not asked for for minutes, and is not to be at hand."""
        lease, model = holder.lease, self._pool.models.get(holder.lease.model)
        kept = model is not None and self._pool.at_hand(model)
        turn_ms = self._now - max(lease.moved_ms, lease.used_ms)
        rested = turn_ms >= DEMAND_HALF_LIFE_MS
        return rested and not kept and not holder.use and demand(self._pool, lease.model, self._now) < FORGOTTEN

    def _offering(self, provider: str) -> list[tuple[str, list[_Option]]]:
        found = self._offers.get(provider)
        if found is None:
            found = self._offers[provider] = [
                (
                    name,
                    [
                        _Option(Place(name, device.id), self._spot(name, device.id))
                        for device in worker.devices_for(provider)
                    ],
                )
                for name, worker in self._pool.workers.items()
                if worker.offers(provider)
            ]
        return found

    def _may_hold(self, model: Model, worker: str) -> bool:
        """Whether a worker has no lease on the model, or one that failed and may be tried again."""
        lease = self._pool.leases.get((worker, model.id))
        return lease is None or due_again(lease, self._now)

    def _options(self, model: Model) -> list[_Option]:
        """Where a model could be held that is not held there, if its size is known.

        A server holds a model once, whoever asks it to: one worker's unload would take it from another.
        """
        if not model.bytes:
            return []
        held = (
            {self._spot(lease.worker, lease.device) for lease in self._pool.of_model(model.id) if lease.holds}
            if self._shared
            else ()
        )
        return [
            option
            for name, devices in self._offering(model.provider)
            if devices and self._may_hold(model, name)
            for option in devices
            if not (option.place.device in self._shared and option.spot in held)
            and not servers.is_leaving(self._pool, option.place.device, model.id)
        ]

    def _fits(self, model: Model, spot: Place) -> bool:
        """Whether it takes nothing from others there; where it lies already it takes no more."""
        return self._free_for(model, spot) >= max(model.bytes, self._there[spot].get(model.id, 0))

    def _free_for(self, model: Model, spot: Place) -> int:
        """Bytes that a model may take there: those that nobody holds, and its own where it lies under no lease."""
        return self._free[spot] + self._there[spot].get(model.id, 0)

    def _ask(self, model: Model, worker: str, device: str) -> None:
        boot = self._pool.workers[worker].status.boot
        spot = self._spot(worker, device)
        there = self._there[spot].pop(model.id, 0)  # it may take more than its record says
        self._pool.dropped.pop((device, model.id), None)  # What others show from now on may be this load.
        size = max(model.bytes, there) if device else 0
        self._pool.leases[worker, model.id] = Lease(worker, boot, model.id, device, size, moved_ms=self._now)
        self._free[spot] += there - size
        self._loading.add(spot)
        self.actions.append(Grant(worker, boot, model.id, device, size))

    # --- making room ----------------------------------------------------------------------------------------------

    def _make_room(self, wish: _Wish, places: list[Place]) -> None:
        """Wait for memory that is on its way back, else drain what `_victims` chooses where that costs least."""
        # What comes back may come late; no job trains in the meantime where a queue is late too.
        leaves = bool(self._training_leaves.intersection(places))
        if wish.late and not leaves:
            for at_once in (True, False):
                if self._have_training_leave(places, wish.model, at_once=at_once):
                    return
        for spot in places:
            if self._free_for(wish.model, spot) + self._leaving[spot] >= wish.model.bytes:
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
            self._claim(wish, places)
            return
        spot, victims = min(options, key=lambda option: (sum(holder.cost for holder in option[1]), option[0]))
        self._free[spot] -= wish.model.bytes
        for holder in victims:
            self._drain(spot, holder, f"makes room for {wish.model.id}")
            if not wish.batch_only:
                self.actions += yield_slots(self._pool, [holder.lease], len(holder.lease.running))

    def _claim(self, wish: _Wish, places: list[Place]) -> None:
        """Keep a device for a queue whose time is over until enough of its models have had their turn.

        Else those that need less would always find one of them that has, and a large model none.
        """
        if not wish.late or wish.lacked_ms + wish.model.load_ms < self._pool.limits.max_wait_ms:
            return
        for spot in places:
            if self._free_for(wish.model, spot) + self._leaving[spot] + self._movable[spot] >= wish.model.bytes:
                self._free[spot] -= wish.model.bytes
                return

    def _price(self, victims: list[_Holder]) -> tuple[bool, float]:
        """Whether a model in use would give way, and the expected cost in milliseconds of waiting requests."""
        return any(holder.use for holder in victims), sum(holder.cost for holder in victims)

    def _notice_price(self, wish: _Wish, spot: Place) -> float:
        """What it costs those who wait that a trainer writes its checkpoint first, in the same unit."""
        return max((lease.notice_ms for lease in self._training.get(spot, ())), default=0) * max(1, wish.waiting)

    def _have_training_leave(self, spots: list[Place], model: Model, *, at_once: bool = False) -> bool:
        """Give notice to jobs, and keep their bytes for a model, where that suffices; whether it does anywhere.

        `at_once`: without what is on its way back already.
        """
        for spot in spots if self._pool.trainers else ():
            missing = model.bytes - self._free[spot] - (0 if at_once else self._leaving[spot])
            trains = self._training.get(spot, [])
            concerned = trains or spot in self._training_leaves
            if concerned and sum(lease.bytes for lease in trains) >= missing:
                self._end_training(spot, missing, f"makes room for {model.id}")
                self._free[spot] -= model.bytes
                return True
        return False

    def _all_together(self, wish: _Wish, spots: list[Place]) -> list[tuple[Place, list[_Holder]]]:
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

    def _drain(self, spot: Place, holder: _Holder, reason: str) -> None:
        self._active[spot].remove(holder)
        self._leaving[spot] += holder.bytes
        self._movable[spot] -= holder.bytes
        self.actions += drain(holder.lease, self._now, reason)

    def _victims(self, wish: _Wish, spot: Place) -> list[_Holder] | None:
        """Leases on a device that may be taken and suffice, chosen greedily by `order`; None when all do not."""
        missing = wish.model.bytes - self._free_for(wish.model, spot) - self._leaving[spot]
        candidates = [holder for holder in self._active.get(spot, ()) if self._may_take(wish, holder)]
        if sum(holder.bytes for holder in candidates) < missing:
            return None
        candidates.sort(key=_Holder.order)
        chosen: list[_Holder] = []
        for holder in candidates:
            if missing <= 0:
                break
            chosen.append(holder)
            missing -= holder.bytes
        for holder in sorted(chosen, key=lambda holder: holder.cost, reverse=True):
            if missing + holder.bytes <= 0:
                chosen.remove(holder)
                missing += holder.bytes
        return chosen

    def _may_take(self, wish: _Wish, holder: _Holder) -> bool:
        """Whether it gives way to this wish: by its use, or as the queue would lack its model for longer than W_max."""
        if wish.batch_only:
            return not holder.use and holder.rested
        lacks_ms = wish.lacked_ms + wish.ahead_ms + wish.model.load_ms + holder.ends_ms + LATENESS_MS
        return (holder.use < 2 and holder.rested) or (holder.had_turn and lacks_ms >= self._pool.limits.max_wait_ms)


def demand(pool: Pool, model: str, now_ms: int) -> float:
    """Requests for a model of late; each counts half after `DEMAND_HALF_LIFE_MS`."""
    count, at_ms = pool.demand.get(model, (0.0, now_ms))
    return float(count * 0.5 ** ((now_ms - at_ms) / DEMAND_HALF_LIFE_MS))


def count_demand(pool: Pool, model: str, now_ms: int) -> None:
    """A request for the model has come."""
    pool.demand[model] = (demand(pool, model, now_ms) + 1.0, now_ms)
