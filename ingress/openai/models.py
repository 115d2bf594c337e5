"""`GET /v1/models`: the ids, aliases and adapters that this key may use, and the choices it may leave to the router."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from headrace.access import Permission
from headrace.choice import not_found, tasks
from ingress import guard
from ingress.auth import allowed_model, asking_key
from ingress.guard import principal_of
from ingress.services import Services
from schemas.control import TASKS, Key
from schemas.openai import ErrorBody, ModelCard, ModelList

router = guard.router()

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "There is none for this key."}}
ROUTER = "headrace"
"""Who owns the ids by which the router chooses."""


@router.get("/v1/models")
@guard.needs(Permission.MODELS_SEE)
async def list_models(request: Request) -> ModelList:
    """The models, aliases and adapters that this key may use, and the choices for which there is one of them."""
    services: Services = request.app.state.services
    key = asking_key(request, principal_of(request))
    cards = []
    for model in services.registry.snapshot.models.values():
        if model.enabled and key.may_use(model):
            names = (model.id, *model.aliases, *(f"{model.id}:{adapter}" for adapter in model.adapters))
            cards += [ModelCard(id=name, created=model.created, owned_by=model.provider) for name in names]
    return ModelList(data=cards + _choices(services, key))


@router.get("/v1/models/{model_id:path}", responses=UNKNOWN)
@guard.needs(Permission.MODELS_SEE)
async def get_model(request: Request, model_id: str) -> ModelCard:
    """One model, by id, alias or `id:adapter`, or one choice."""
    services: Services = request.app.state.services
    key = asking_key(request, principal_of(request))
    if model_id in TASKS:
        found = next((card for card in _choices(services, key) if card.id == model_id), None)
        if found is None:
            raise not_found(model_id)
        return found
    model = allowed_model(key, services.registry.snapshot, model_id)
    return ModelCard(id=model_id, created=model.created, owned_by=model.provider)


def _choices(services: Services, key: Key) -> list[ModelCard]:
    snapshot = services.registry.snapshot
    created = min((model.created for model in snapshot.models.values()), default=0)
    return [ModelCard(id=task, created=created, owned_by=ROUTER) for task in tasks(snapshot, key)]
