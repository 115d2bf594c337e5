"""How long a model that nobody holds may be expected to wait for memory that others hold. Pure.

It follows what `placement` does: free memory, what is on its way back and idle models come first. Only where these do
not suffice are models in use waited for, until they fall idle or have to give way to a queue that is late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from processors.scheduler import placement, servers
from processors.scheduler.state import Lease, LeaseState, Pool
from processors.scheduler.yielding import gives_way
from schemas.control import Model
from schemas.events import Priority

LIKELY = 0.4
"""Part of the mean time until requests end that is reckoned with: two in three exponential times are longer.

With more, 0.5 or the median 0.69, more requests are refused on the workload `bursts` that would have been served."""


def load_left_ms(lease: Lease, model: Model | None, now_ms: int) -> int:
    """Expected milliseconds until a model is loaded under a lease that is coming."""
    if model is None or lease.state is LeaseState.ACTIVE:
        return 0
    return max(0, model.load_ms - (now_ms - lease.moved_ms if lease.state is LeaseState.LOADING else 0))


@dataclass(slots=True)
class _Spot:
    """Memory that the model could be given."""

    providers: list[str]
    free: int
    """Bytes that nobody holds."""
    leaving: int = 0
    """Bytes that are on their way back."""
    back: list[tuple[float, int]] = field(default_factory=list)
    """In how many milliseconds how many bytes may be had."""
    busy: list[Lease] = field(default_factory=list)
    """What is in use, or will be when it is loaded."""
    from_ms: float = 0.0
    """When what is being loaded there is loaded, and what is left of the model itself is gone."""

    def suffices_ms(self, size: int) -> float:
        """In how many milliseconds so many bytes may be had; infinite where they may not."""
        if self.free >= size:
            return self.from_ms
        found = self.free
        for at_ms, freed in sorted(self.back):
            found += freed
            if found >= size:
                return max(at_ms, self.from_ms)
        return math.inf


def memory_wait_ms(pool: Pool, model: Model, now_ms: int, priority: Priority = Priority.STANDARD) -> int:
    """Expected milliseconds until a model has the memory for its load, if a request of that priority comes now.

    A low estimate, since one that is too high refuses what would be served: those in use are reckoned to end what they
    have, as if nobody came meanwhile, and it is never more than W_max, which a queue is not to wait longer than. Wishes
    that come before it take what is free or on its way back; that they compete for models in use too is left out.
    """
    spots = _spots(pool, model)
    if not spots:
        return 0
    _take_stock(pool, model, spots, now_ms)
    if any(spot.free + spot.leaving >= model.bytes for spot in spots.values()):
        _claim(pool, model, list(spots.values()), now_ms, priority)
    wait_ms = min(spot.suffices_ms(model.bytes) for spot in spots.values())
    if wait_ms == math.inf:
        due_ms = placement.due_ms(pool, model, now_ms, priority)
        for spot in spots.values():
            spot.back += [(_gives_way_ms(pool, lease, now_ms, due_ms), lease.bytes) for lease in spot.busy]
        wait_ms = min(spot.suffices_ms(model.bytes) for spot in spots.values())
    return int(min(wait_ms, pool.limits.max_wait_ms))


def _spots(pool: Pool, model: Model) -> dict[tuple[str, str], _Spot]:
    """Memory that is large enough for the model, by worker and device; none where it takes none that is counted."""
    spots: dict[tuple[str, str], _Spot] = {}
    for name, worker in pool.workers.items() if model.bytes else ():
        if not worker.offers(model.provider):
            continue
        devices = worker.devices_for(model.provider)
        if not devices:
            return {}
        for device in devices:
            if device.bytes >= model.bytes:
                spots["" if device.shared else name, device.id] = _Spot(device.providers, device.bytes)
    return spots


def _take_stock(pool: Pool, model: Model, spots: dict[tuple[str, str], _Spot], now_ms: int) -> None:
    """Find what is held there, and when what will give way is free."""
    for lease in pool.leases.values():
        spot = spots.get((lease.worker, lease.device)) or spots.get(("", lease.device))
        if spot is None:
            continue
        spot.free -= lease.holds
        if lease.state in (LeaseState.DRAINING, LeaseState.RELEASING):
            gone_ms = _end_ms(pool, lease, pool.models.get(lease.model))
            spot.leaving += lease.bytes
            spot.back.append((gone_ms, lease.bytes))
            if lease.model == model.id:
                spot.from_ms = max(spot.from_ms, gone_ms)
        elif lease.coming:
            _take_stock_of(pool, lease, spot, now_ms)
    for server, found in servers.strays(pool, now_ms).items():
        if ("", server) in spots:
            spots["", server].free -= sum(stray.bytes for stray in found if model.id not in stray.models)
    for trainer in pool.trainers.values():
        spot = spots.get((trainer.worker, trainer.device))
        if spot is not None:
            spot.free -= trainer.bytes
            if trainer.state is LeaseState.DRAINING:
                spot.leaving += trainer.bytes
                spot.back.append((max(0, trainer.by_ms - now_ms), trainer.bytes))
            elif trainer.state is not LeaseState.QUARANTINED:
                spot.back.append((min(trainer.notice_ms, pool.limits.max_wait_ms // 2), trainer.bytes))


def _take_stock_of(pool: Pool, lease: Lease, spot: _Spot, now_ms: int) -> None:
    """A lease that serves, or will."""
    held = pool.models.get(lease.model)
    spot.from_ms += load_left_ms(lease, held, now_ms)
    if held is not None and held.pinned:
        return
    if lease.state is LeaseState.ACTIVE and not lease.used and not pool.queues.get(lease.model):
        rests_ms = pool.limits.residency_loads * (held.load_ms if held is not None else 0)
        spot.back.append((max(0.0, rests_ms - (now_ms - lease.moved_ms)), lease.bytes))
    else:
        spot.busy.append(lease)


def _claim(pool: Pool, model: Model, spots: list[_Spot], now_ms: int, priority: Priority) -> None:
    """Keep memory that is free, or on its way back, for those that come before the model."""
    for other in placement.before(pool, model, now_ms, priority):
        for spot in spots:
            if other.provider in spot.providers and spot.free + spot.leaving >= other.bytes:
                spot.free -= other.bytes
                break


def _gives_way_ms(pool: Pool, lease: Lease, now_ms: int, due_ms: float) -> float:
    """In how many milliseconds a model in use has fallen idle, or has to give way and what it runs has ended."""
    model, active = pool.models.get(lease.model), lease.state is LeaseState.ACTIVE
    if active and due_ms < math.inf and gives_way(pool, lease):
        return 0.0
    loads_ms, service_ms = load_left_ms(lease, model, now_ms), pool.service_ms.get(lease.model, 0.0)
    turn_ms = placement.turn_ms(max(model.load_ms if model is not None else 0, lease.load_took_ms))
    turn_left_ms = turn_ms - (now_ms - lease.moved_ms) if active else loads_ms + turn_ms
    must_ms = max(0.0, turn_left_ms, due_ms - 2 * service_ms) + service_ms
    return min(must_ms, loads_ms + _end_ms(pool, lease, model))


def _end_ms(pool: Pool, lease: Lease, model: Model | None) -> float:
    """In how many milliseconds all has ended that runs on a lease or, unless it drains, waits for its model.

    Of n requests the next ends after the mean service time over n. Nobody is reckoned to come meanwhile.
    """
    slots = model.max_concurrency if model is not None else 1
    queue = pool.queues.get(lease.model) if lease.coming else None
    number = lease.used + (len(queue) if queue else 0)
    turns = max(0, number - slots) / slots + sum(1 / left for left in range(1, min(number, slots) + 1))
    return LIKELY * turns * pool.service_ms.get(lease.model, 0.0)
