"""The web application: routes, errors, CORS and trusted proxies."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace import __version__
from ingress import http_errors, ops, requests, usage
from ingress.admin import audit as admin_audit
from ingress.admin import erasures as admin_erasures
from ingress.admin import letters as admin_letters
from ingress.admin import machines as admin_machines
from ingress.admin import models as admin_models
from ingress.admin import usage as admin_usage
from ingress.openai import chat, models, resume
from ingress.openai.answer import DIRECT_SEND
from ingress.services import Services


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
            allow_methods=["GET", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-hr-stream-id", "x-hr-model", "retry-after"],
        )
    admin = (admin_models, admin_machines, admin_usage, admin_audit, admin_letters, admin_erasures)
    for module in (chat, resume, models, requests, usage, ops, *admin):
        app.include_router(module.router)
    return app
