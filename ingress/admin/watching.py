"""`GET /admin/models/{id}/events`: how a model stands, as server-sent events, for who waits for a pull or a load."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from fastapi import Request
from redis.exceptions import RedisError
from sse_starlette import EventSourceResponse, ServerSentEvent

from headrace.access import Permission
from headrace.errors import Forbidden, HeadraceError, ModelNotFound, Unauthorized
from headrace.openai_objects import error_object
from ingress import guard
from ingress.admin.models import find, view
from ingress.admin.records import UNKNOWN
from ingress.services import Services

router = guard.router(prefix="/admin/models", tags=["admin: models"])

LOOK_S = 0.5
"""How often a model is looked at: what changes faster is told once."""
PING_S = 15
"""A comment after this long without an event, so that proxies keep the connection."""
SEND_S = 10.0
"""A watcher that takes nothing for this long is dropped."""


@router.get("/{model_id:path}/events", responses=UNKNOWN, response_class=EventSourceResponse)
@guard.needs(Permission.MODELS_READ)
async def watch(request: Request, model_id: str) -> EventSourceResponse:
    """Events `model`, each the model as `GET /admin/models/{id}` shows it: at once, and whenever that has changed.

    It tells how far a pull or a load is. It ends with an event `error` when the model is gone or the caller may no
    longer see it, and without one when this ingress stops: ask again then.
    """
    services: Services = request.app.state.services
    model = await find(services, model_id)
    await view(services, model)  # What cannot be told at all is answered as an error.
    return EventSourceResponse(_told(request, model.id), ping=PING_S, send_timeout=SEND_S, sep="\n")


async def _told(request: Request, model_id: str) -> AsyncIterator[ServerSentEvent]:
    services: Services = request.app.state.services
    last = ""
    while not services.stopping.is_set():
        try:
            await guard.admitted(request, Permission.MODELS_READ)
            shown = (await view(services, await find(services, model_id))).model_dump_json()
        except (Unauthorized, Forbidden, ModelNotFound) as end:
            yield ServerSentEvent(json.dumps(error_object(end.info())), event="error")
            return
        except (HeadraceError, RedisError, OSError):
            shown = last  # A part is away for now.
        if shown != last:
            yield ServerSentEvent(shown, event="model")
            last = shown
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(services.stopping.wait(), LOOK_S)
