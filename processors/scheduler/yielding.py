"""Batch work gives way at once to what does not wait, and goes on later from where it was. Pure.

A request that gives way keeps its slot until its next attempt is open in the log: only then is what its worker still
says void, and may the worker be told to stop.
"""

from __future__ import annotations

from collections.abc import Iterable

from processors.scheduler.messages import Action, Recover
from processors.scheduler.state import Lease, Pool, Running
from schemas.events import Priority


def yield_slots(pool: Pool, leases: Iterable[Lease], wanted: int) -> list[Action]:
    """Have batch work on these leases give up slots until `wanted` are given up or on their way."""
    actions: list[Action] = []
    for lease in leases:
        for running in [pool.running[request_id] for request_id in sorted(lease.running)]:
            wanted -= running.yielding
            if wanted > 0 and _may_yield(running):
                running.yielding = True
                wanted -= 1
                actions.append(Recover(running, may_retry=True, reason="it gave way to work that does not wait"))
    return actions


def gives(pool: Pool, lease: Lease) -> int:
    """Slots of a lease that batch work has given up, or would."""
    return sum(_gives(pool, request_id) for request_id in lease.running)


def gives_way(pool: Pool, lease: Lease) -> bool:
    """Whether all that runs on a lease, or waits for its model, is batch work that loses nothing by giving way."""
    queue = pool.queues.get(lease.model)
    return not (queue and queue.pressing) and all(_gives(pool, request_id) for request_id in lease.running)


def _gives(pool: Pool, request_id: str) -> bool:
    running = pool.running[request_id]
    return running.yielding or _may_yield(running)


def _may_yield(running: Running) -> bool:
    batch = running.request.priority is Priority.BATCH
    return batch and running.goes_on and not running.yielding and not running.cancel_asked
