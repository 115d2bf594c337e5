"""`/admin/models`: which models there are, how they are configured, and how they stand."""

from __future__ import annotations

import time

from fastapi import Request, Response

from headrace import records, steer
from headrace.access import Permission
from ingress import guard
from ingress.admin.records import (
    After,
    Enabled,
    Limit,
    Search,
    Text,
    all_of,
    change,
    changes,
    create,
    makes,
    one_of,
    page,
    shows,
    tag,
)
from ingress.services import Services
from schemas.admin import ModelView, ModelViews
from schemas.admin_records import ModelCreate, ModelPatch
from schemas.control import Model

router = guard.router(prefix="/admin/models", tags=["admin: models"])


async def view(services: Services, model: Model) -> ModelView:
    """A model as it is configured and stands."""
    [shown] = await _views(services, [model])
    return shown


async def _views(services: Services, models: list[Model]) -> list[ModelView]:
    return services.fleet.fleet.model_views(models, time.time_ns() // 1_000_000, await services.facts.known())


@router.post("", **makes())
@guard.needs(Permission.MODELS_WRITE)
async def create_model(request: Request, body: ModelCreate, response: Response) -> ModelView:
    """Make a model that callers may name; `headrace apply` leaves it alone. The same again is the same model."""
    services: Services = request.app.state.services
    await create(request, records.new_model(body))
    made = await one_of(services, Model, body.id)
    tag(response, made)
    return await view(services, made)


@router.get("")
@guard.needs(Permission.MODELS_READ)
async def list_models(
    request: Request, limit: Limit = 100, after: After = None, provider: Text = None, enabled: Enabled = None,
    q: Search = None,
) -> ModelViews:  # fmt: skip
    """Models by id, enabled or not."""
    services: Services = request.app.state.services
    found = [
        model
        for model in await all_of(services, Model)
        if (provider is None or model.provider == provider)
        and (enabled is None or model.enabled is enabled)
        and records.has(q, model.id, *model.aliases)
    ]
    part = page(found, lambda model: model.id, limit, after)
    return ModelViews(data=await _views(services, part.items), has_more=part.has_more, last_id=part.last_id)


async def find(services: Services, name: str) -> Model:
    """The model with this id or alias, as it is in force now. Raises `ModelNotFound`."""
    models = {model.id: model for model in await all_of(services, Model)}
    return steer.find(models, name)


@router.get("/{model_id:path}", **shows())
@guard.needs(Permission.MODELS_READ)
async def get_model(request: Request, model_id: str, response: Response) -> ModelView:
    """One model, by id or alias."""
    services: Services = request.app.state.services
    found = await find(services, model_id)
    tag(response, found)
    return await view(services, found)


@router.patch("/{model_id:path}", **changes())
@guard.needs(Permission.MODELS_WRITE)
async def update_model(request: Request, model_id: str, body: ModelPatch, response: Response) -> ModelView:
    """Change a model; in force when this answers. `headrace apply` undoes it where `headrace.toml` names the model."""
    services: Services = request.app.state.services
    made = await change(
        request, lambda: find(services, model_id), lambda model: records.changed_model(model, body)
    )  # fmt: skip
    tag(response, made)
    return await view(services, made)


@router.delete("/{model_id:path}", **changes())
@guard.needs(Permission.MODELS_WRITE)
async def disable_model(request: Request, model_id: str, response: Response) -> ModelView:
    """Disable a model: nobody is given it any more, and its names are free. Its record, usage and prices stay."""
    services: Services = request.app.state.services
    patch = ModelPatch(enabled=False, fallbacks=[])
    made = await change(
        request,
        lambda: find(services, model_id),
        lambda model: records.changed_model(model, patch),
        reason="disabled",
    )
    tag(response, made)
    return await view(services, made)
