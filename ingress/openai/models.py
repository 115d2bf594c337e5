"""`GET /v1/models`: what this key may use, under ids and aliases."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ingress.auth import allowed_model, caller, may_use
from ingress.services import Services
from schemas.openai import ModelCard, ModelList

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """The models and aliases that this key may use."""
    services: Services = request.app.state.services
    key = await caller(request, services.registry)
    cards = []
    for model in services.registry.snapshot.models.values():
        if model.enabled and may_use(key, model):
            names = (model.id, *model.aliases)
            cards += [ModelCard(id=name, created=model.created, owned_by=model.provider) for name in names]
    return ModelList(data=cards)


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> ModelCard:
    """One model, by id or alias."""
    services: Services = request.app.state.services
    key = await caller(request, services.registry)
    model = allowed_model(key, services.registry, model_id)
    return ModelCard(id=model_id, created=model.created, owned_by=model.provider)
