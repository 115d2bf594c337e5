"""`/admin/workers` and `/admin/leases`: who holds what, and ending a quarantine by hand."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request

from headrace import steer
from ingress.admin.access import CONFLICT, REFUSALS, UNKNOWN, Admin
from ingress.admin.models import actor, taken
from ingress.services import Services
from schemas.admin import LeaseRelease, LeaseViews, WishTaken, WorkerViews

router = APIRouter(prefix="/admin", tags=["admin"], responses=REFUSALS)


@router.get("/workers")
async def list_workers(request: Request, _: Admin) -> WorkerViews:
    """The workers that were heard within an hour, with their memory and what is on it."""
    services: Services = request.app.state.services
    return WorkerViews(data=services.fleet.fleet.worker_views(time.time_ns() // 1_000_000))


@router.get("/leases")
async def list_leases(request: Request, _: Admin) -> LeaseViews:
    """The leases that have not ended."""
    services: Services = request.app.state.services
    return LeaseViews(data=services.fleet.fleet.lease_views())


@router.post("/leases/release", status_code=202, responses=UNKNOWN | CONFLICT)
async def release(request: Request, body: LeaseRelease, key: Admin) -> WishTaken:
    """Say that the quarantined bytes of a lease are free; who said so and why stays with the lease."""
    services: Services = request.app.state.services
    fleet = services.fleet.fleet
    return await taken(services, steer.release(fleet, body.worker, body.model, actor=actor(key), reason=body.reason))
