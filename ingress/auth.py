"""Who is calling: the key or the access token of a request, checked against the registry."""

from __future__ import annotations

import hashlib
import time

from starlette.requests import Request

from headrace.access import Principal, app_refusal, check_app_name, key_refusal, user_refusal
from headrace.choice import named, not_found
from headrace.errors import InvalidToken, Unauthorized
from headrace.registry import Snapshot
from ingress.services import Services
from ingress.signin.tokens import is_token
from schemas.control import Key, Model


async def authenticate(request: Request) -> Principal:
    """Who calls. Raises `Unauthorized`, `Forbidden`, or `Unavailable` while the registry is not complete."""
    services: Services = request.app.state.services
    header = request.headers.get("authorization", "")
    scheme, _, text = header.partition(" ")
    text = text.strip()
    if not header:
        raise Unauthorized("No API key was sent; send it as 'Authorization: Bearer hr-…'.")
    if scheme.lower() != "bearer" or not text:
        raise Unauthorized("The Authorization header must be 'Bearer hr-…'.")
    if is_token(text):
        return await _signed_in(services, text)
    key = await services.registry.key(hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest())
    snapshot = services.registry.snapshot
    if key is not None and key.app not in snapshot.apps:
        # The key is asked of Redis, apps are followed: one that was made a moment ago is not known here yet.
        snapshot = await services.registry.confirmed()
    refused = key_refusal(key, snapshot.apps, time.time())
    if refused is not None or key is None:
        raise refused or Unauthorized("The API key is not known.")
    return Principal.of_key(key)


async def _signed_in(services: Services, text: str) -> Principal:
    """The user whose access token this is, if the session and the user's record still are as when it was issued."""
    claims = services.signin.read(text, now_s=time.time())
    session = await services.sessions.get(claims.sid)
    if session is None or session.user != claims.sub:
        raise InvalidToken("The session has ended; sign in again.")
    user = await services.registry.user(claims.sub)
    if user is not None and not session.is_of(user):
        # Another replica may have changed the user a moment ago, and begun this session since.
        user = await services.registry.user(claims.sub, fresh=True)
    refused = user_refusal(user)
    if refused is not None or user is None:
        raise refused or Unauthorized("The user is not known.")
    if not session.is_of(user):
        raise InvalidToken("Your role or password was changed; sign in again.")
    return Principal.of_user(user, claims.sid)


def asking_key(request: Request, principal: Principal) -> Key:
    """The key under which a principal asks models; a signed-in user names an app by `x-hr-app`. Raises `Forbidden`."""
    services: Services = request.app.state.services
    key = principal.asks_for(check_app_name(request.headers.get("x-hr-app")))
    if principal.key is None and (refused := app_refusal(key.app, services.registry.snapshot.apps)) is not None:
        raise refused
    return key


def allowed_model(key: Key, snapshot: Snapshot, name: str) -> Model:
    """The model that a name means, if this key may use it. Raises `ModelNotFound`, also for others' models."""
    model = named(snapshot, name)
    if model is None or not key.may_use(model):
        raise not_found(name)
    return model
