"""`/admin/workers` and `/admin/leases`: who holds what, and ending a quarantine by hand."""

from __future__ import annotations

import time

from fastapi import Request

from headrace import steer
from headrace.access import Permission
from ingress import guard
from ingress.admin.records import CONFLICT, UNKNOWN
from ingress.admin.steering import taken
from ingress.guard import Who
from ingress.services import Services
from schemas.admin import LeaseRelease, LeaseViews, WishTaken, WorkerViews

router = guard.router(prefix="/admin", tags=["admin: machines"])


@router.get("/workers")
@guard.needs(Permission.FLEET_READ)
async def list_workers(request: Request) -> WorkerViews:
    """The workers that were heard within an hour, with their memory and what is on it."""
    services: Services = request.app.state.services
    return WorkerViews(data=services.fleet.fleet.worker_views(time.time_ns() // 1_000_000))


@router.get("/leases")
@guard.needs(Permission.FLEET_READ)
async def list_leases(request: Request) -> LeaseViews:
    """The leases that have not ended."""
    services: Services = request.app.state.services
    return LeaseViews(data=services.fleet.fleet.lease_views())


@router.post("/leases/release", status_code=202, responses=UNKNOWN | CONFLICT)
@guard.needs(Permission.FLEET_STEER)
async def release(request: Request, body: LeaseRelease, who: Who) -> WishTaken:
    """Say that the quarantined bytes of a lease are free; who said so and why stays with the lease."""
    services: Services = request.app.state.services
    fleet = services.fleet.fleet
    return await taken(services, steer.release(fleet, body.worker, body.model, actor=who.actor, reason=body.reason))
