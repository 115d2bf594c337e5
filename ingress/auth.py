"""Who is calling: the bearer key of a request, checked against the registry."""

from __future__ import annotations

import hashlib
import time

from starlette.requests import Request

from headrace.errors import Forbidden, ModelNotFound, Unauthorized
from headrace.registry import Registry
from schemas.control import ANY_MODEL, Key, Model


async def caller(request: Request, registry: Registry) -> Key:
    """The key of the caller. Raises `Unauthorized`, or `Unavailable` while the registry is not complete."""
    header = request.headers.get("authorization", "")
    scheme, _, text = header.partition(" ")
    text = text.strip()
    if not header:
        raise Unauthorized("No API key was sent; send it as 'Authorization: Bearer hr-…'.")
    if scheme.lower() != "bearer" or not text:
        raise Unauthorized("The Authorization header must be 'Bearer hr-…'.")
    key = await registry.key(hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest())
    if key is None or not key.enabled:
        raise Unauthorized("The API key is not known or was revoked.")
    if key.expires_at is not None and key.expires_at <= time.time():
        raise Unauthorized("The API key has expired.")
    app = registry.snapshot.apps.get(key.app)
    if app is None or not app.enabled:
        raise Forbidden("The API key's app is not enabled.")
    return key


def may_use(key: Key, model: Model) -> bool:
    """Whether a key may use a model."""
    return ANY_MODEL in key.allowed_models or model.id in key.allowed_models


def allowed_model(key: Key, registry: Registry, name: str) -> Model:
    """The model with this id or alias, if this key may use it. Raises `ModelNotFound`, also for others' models."""
    model = registry.snapshot.resolve(name)
    if model is None or not may_use(key, model):
        raise ModelNotFound(f"The model {name!r} does not exist; GET /v1/models lists those that do.", param="model")
    return model
