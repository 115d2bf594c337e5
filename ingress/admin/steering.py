"""`/admin/models/{id}/load|unload|pin|unpin`: steering models."""

from __future__ import annotations

from fastapi import Request, Response

from headrace import steer
from headrace.access import Permission
from ingress import guard
from ingress.admin.models import view
from ingress.admin.records import CONFLICT, UNKNOWN, change, changes, one_of, tag
from ingress.guard import Who
from ingress.services import Services
from schemas.admin import ModelView, WishTaken
from schemas.control import Model
from schemas.events import PoolCommand

router = guard.router(prefix="/admin/models", tags=["admin: models"])


@router.post("/{model_id:path}/load", status_code=202, responses=UNKNOWN | CONFLICT)
@guard.needs(Permission.FLEET_STEER)
async def load(request: Request, model_id: str, who: Who) -> WishTaken:
    """Bring a model into memory now; idle models give way. Given up after a minute."""
    services: Services = request.app.state.services
    model = steer.find(services.registry.snapshot.models, model_id)
    return await taken(services, steer.load(services.fleet.fleet, model, actor=who.actor))


@router.post("/{model_id:path}/unload", status_code=202, responses=UNKNOWN | CONFLICT)
@guard.needs(Permission.FLEET_STEER)
async def unload(request: Request, model_id: str, who: Who) -> WishTaken:
    """Let a model's requests end and give its memory back; it stays out until somebody calls it."""
    services: Services = request.app.state.services
    model = steer.find(services.registry.snapshot.models, model_id)
    return await taken(services, steer.unload(services.fleet.fleet, model, actor=who.actor))


@router.post("/{model_id:path}/pin", **changes())
@guard.needs(Permission.FLEET_STEER)
async def pin(request: Request, model_id: str, response: Response) -> ModelView:
    """Load a model and keep it in memory for ever; in force when this answers."""
    return await _set_pinned(request, model_id, response, pinned=True)


@router.post("/{model_id:path}/unpin", **changes())
@guard.needs(Permission.FLEET_STEER)
async def unpin(request: Request, model_id: str, response: Response) -> ModelView:
    """Let a model give way to others again; in force when this answers."""
    return await _set_pinned(request, model_id, response, pinned=False)


async def _set_pinned(request: Request, model_id: str, response: Response, *, pinned: bool) -> ModelView:
    services: Services = request.app.state.services
    found = steer.find(services.registry.snapshot.models, model_id)
    made = await change(
        request,
        lambda: one_of(services, Model, found.id),
        lambda model: steer.pin(model, pinned=pinned),
        reason="pinned" if pinned else "unpinned",
    )
    tag(response, made)
    return await view(services, made)


async def taken(services: Services, wish: PoolCommand) -> WishTaken:
    """Send a wish, and say so when it is durable."""
    await steer.send(services.producer, wish)
    return WishTaken(id=wish.id, pool=wish.pool, kind=wish.kind, model=wish.model, worker=wish.worker)
