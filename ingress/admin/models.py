"""`/admin/models`: how models are configured and stand; loading, unloading and pinning them."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request

from headrace import steer
from headrace.control_client import ControlClient, command
from headrace.projection import Projection
from ingress.admin.access import CONFLICT, REFUSALS, UNKNOWN, Admin
from ingress.services import Services
from schemas.admin import ModelView, ModelViews, WishTaken
from schemas.control import Key, Model
from schemas.events import PoolCommand

router = APIRouter(prefix="/admin/models", tags=["admin"], responses=REFUSALS)

CONFIRM_S = 5.0
"""How long a change of a record may take to be in force."""


async def _views(services: Services, models: list[Model]) -> list[ModelView]:
    return services.fleet.fleet.model_views(models, time.time_ns() // 1_000_000, await services.facts.known())


@router.get("")
async def list_models(request: Request, _: Admin) -> ModelViews:
    """All models, enabled or not."""
    services: Services = request.app.state.services
    return ModelViews(data=await _views(services, list(services.registry.snapshot.models.values())))


@router.get("/{model_id:path}", responses=UNKNOWN)
async def get_model(request: Request, model_id: str, _: Admin) -> ModelView:
    """One model, by id or alias."""
    services: Services = request.app.state.services
    [view] = await _views(services, [steer.find(services.registry.snapshot.models, model_id)])
    return view


@router.post("/{model_id:path}/load", status_code=202, responses=UNKNOWN | CONFLICT)
async def load(request: Request, model_id: str, key: Admin) -> WishTaken:
    """Bring a model into memory now; idle models give way. Given up after a minute."""
    services: Services = request.app.state.services
    model = steer.find(services.registry.snapshot.models, model_id)
    return await taken(services, steer.load(services.fleet.fleet, model, actor=actor(key)))


@router.post("/{model_id:path}/unload", status_code=202, responses=UNKNOWN | CONFLICT)
async def unload(request: Request, model_id: str, key: Admin) -> WishTaken:
    """Let a model's requests end and give its memory back; it stays out until somebody calls it."""
    services: Services = request.app.state.services
    model = steer.find(services.registry.snapshot.models, model_id)
    return await taken(services, steer.unload(services.fleet.fleet, model, actor=actor(key)))


@router.post("/{model_id:path}/pin", responses=UNKNOWN)
async def pin(request: Request, model_id: str, key: Admin) -> ModelView:
    """Load a model and keep it in memory for ever; in force when this answers."""
    return await _set_pinned(request, model_id, key, pinned=True)


@router.post("/{model_id:path}/unpin", responses=UNKNOWN)
async def unpin(request: Request, model_id: str, key: Admin) -> ModelView:
    """Let a model give way to others again; in force when this answers."""
    return await _set_pinned(request, model_id, key, pinned=False)


async def _set_pinned(request: Request, model_id: str, key: Key, *, pinned: bool) -> ModelView:
    services: Services = request.app.state.services
    model = steer.pin(steer.find(services.registry.snapshot.models, model_id), pinned=pinned)
    client = ControlClient(services.settings, Projection(services.redis), timeout=CONFIRM_S)
    await client.submit([command(model, actor=actor(key), reason="pinned" if pinned else "unpinned")])
    [view] = await _views(services, [model])
    return view


def actor(key: Key) -> str:
    """How a key stands in what it asked for."""
    return f"key {key.id}"


async def taken(services: Services, wish: PoolCommand) -> WishTaken:
    """Send a wish, and say so when it is durable."""
    await steer.send(services.producer, wish)
    return WishTaken(id=wish.id, pool=wish.pool, kind=wish.kind, model=wish.model, worker=wish.worker)
