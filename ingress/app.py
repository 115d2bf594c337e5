"""The web application: routes, errors, CORS and trusted proxies."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace import __version__
from ingress import http_errors, ops, requests, usage
from ingress.admin import apps, audit, erasures, keys, letters, machines, prices, users
from ingress.admin import models as admin_models
from ingress.admin import steering as admin_steering
from ingress.admin import usage as admin_usage
from ingress.admin import watching as admin_watching
from ingress.openai import chat, models, resume
from ingress.openai.answer import DIRECT_SEND
from ingress.services import Services
from ingress.signin import routes as signin
from schemas.openai import ChatCompletionRequest

# Steering and watching models come before reading them: their ids may have slashes, and what follows the last one is a
# verb.
ROUTES = (
    chat, resume, models, requests, usage, ops, signin, keys, users, apps, prices, admin_steering,
    admin_watching, admin_models, machines, admin_usage, audit, letters, erasures,
)  # fmt: skip
EXPOSED = [
    "x-request-id", "x-hr-stream-id", "x-hr-model", "retry-after", "x-should-retry", "etag",
    "x-hr-has-more", "x-hr-last-id",
    *(f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
]  # fmt: skip
"""Headers of ours that a page in a browser may read."""
BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key (`hr-…`), or the access token of a signed-in user.",
}


class DirectSend:
    """Puts the server's `send` into the scope, for answers that write often."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        scope[DIRECT_SEND] = send
        try:
            await self._app(scope, receive, send)
        finally:
            # The server's `send` knows the scope: a circle that only the garbage collector would undo.
            del scope[DIRECT_SEND]


def make_app(services: Services) -> FastAPI:
    """The application over running services."""
    app = FastAPI(
        title="Headrace",
        version=__version__,
        description="OpenAI-compatible serving of language models as a stream of events.",
        docs_url="/docs",
        redoc_url=None,
    )
    app.state.services = services
    http_errors.install(app)
    origins = [origin.strip() for origin in services.settings.cors_origins.split(",") if origin.strip()]
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    for module in ROUTES:
        app.include_router(module.router)
    app.openapi = partial(_described, app)  # type: ignore[method-assign]
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with how callers say who they are."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes,
        )  # fmt: skip
        components = made.setdefault("components", {})
        components["securitySchemes"] = {"bearer": BEARER}
        body = ChatCompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        components["schemas"] |= {**body.pop("$defs", {}), ChatCompletionRequest.__name__: body}
        app.openapi_schema = made
    return app.openapi_schema
