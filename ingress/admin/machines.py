"""`/admin/workers` and `/admin/leases`: who holds what, and ending a quarantine by hand."""

from __future__ import annotations

import time

from fastapi import Request

from headrace import steer
from headrace.access import Permission
from ingress import guard
from ingress.admin.records import CONFLICT, UNKNOWN, After, Limit, Text, page
from ingress.admin.steering import taken
from ingress.guard import Who
from ingress.services import Services
from schemas.admin import LeaseRelease, LeaseViews, WishTaken, WorkerViews

router = guard.router(prefix="/admin", tags=["admin: machines"])


@router.get("/workers")
@guard.needs(Permission.FLEET_READ)
async def list_workers(
    request: Request, limit: Limit = 100, after: After = None, pool: Text = None, status: Text = None
) -> WorkerViews:
    """The workers that were heard within an hour, by id, with their memory and what is on it."""
    services: Services = request.app.state.services
    found = [
        worker
        for worker in services.fleet.fleet.worker_views(time.time_ns() // 1_000_000)
        if pool in (None, worker.pool) and status in (None, worker.status)
    ]
    part = page(found, lambda worker: worker.id, limit, after)
    return WorkerViews(data=part.items, has_more=part.has_more, last_id=part.last_id)


@router.get("/leases")
@guard.needs(Permission.FLEET_READ)
async def list_leases(
    request: Request, limit: Limit = 100, after: After = None, pool: Text = None, worker: Text = None,
    model: Text = None, state: Text = None,
) -> LeaseViews:  # fmt: skip
    """The leases that have not ended, by worker and model."""
    services: Services = request.app.state.services
    found = [
        lease
        for lease in services.fleet.fleet.lease_views()
        if pool in (None, lease.pool)
        and worker in (None, lease.worker)
        and model in (None, lease.model)
        and state in (None, lease.state)
    ]
    part = page(found, lambda lease: f"{lease.worker}/{lease.model}/{lease.epoch:020}", limit, after)
    return LeaseViews(data=part.items, has_more=part.has_more, last_id=part.last_id)


@router.post("/leases/release", status_code=202, responses=UNKNOWN | CONFLICT)
@guard.needs(Permission.FLEET_STEER)
async def release(request: Request, body: LeaseRelease, who: Who) -> WishTaken:
    """Say that the quarantined bytes of a lease are free; who said so and why stays with the lease."""
    services: Services = request.app.state.services
    fleet = services.fleet.fleet
    return await taken(services, steer.release(fleet, body.worker, body.model, actor=who.actor, reason=body.reason))
