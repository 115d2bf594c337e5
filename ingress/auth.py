"""Who is calling: the bearer key of a request, checked against the registry."""

from __future__ import annotations

import hashlib
import time

from starlette.requests import Request

from headrace.choice import named, not_found
from headrace.errors import Forbidden, Unauthorized
from headrace.registry import Registry, Snapshot
from schemas.control import Key, Model


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


def allowed_model(key: Key, snapshot: Snapshot, name: str) -> Model:
    """The model that a name means, if this key may use it. Raises `ModelNotFound`, also for others' models."""
    model = named(snapshot, name)
    if model is None or not key.may_use(model):
        raise not_found(name)
    return model
