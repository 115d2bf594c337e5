"""Health and metrics."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST
from redis.exceptions import RedisError
from starlette.responses import JSONResponse, Response

from headrace.errors import Unavailable
from headrace.model_facts import newest, warnings
from headrace.telemetry import gather
from ingress import guard
from ingress.guard import public
from ingress.services import Services
from schemas.control import Model
from schemas.events import PoolStatus

router = guard.router()


@router.get("/health/live")
@public
async def live() -> dict[str, str]:
    """Whether this process answers at all."""
    return {"status": "live"}


@router.get("/health/ready")
@public
async def ready(request: Request) -> JSONResponse:
    """Whether a chat request would be answered, if only by one of the models.

    `waiting_for` names the parts that are not there, also models that are being loaded while others serve; `failed` the
    models that no worker serves, or could load. Neither keeps an ingress from serving the other models.
    """
    services: Services = request.app.state.services
    found = await readiness(services)
    content = {
        "status": "ready" if found.ready else "not ready",
        "waiting_for": found.waiting,
        "failed": found.failed,
        "warnings": await doubtful(services),
    }
    return JSONResponse(content, status_code=200 if found.ready else 503)


async def doubtful(services: Services) -> dict[str, list[str]]:
    """Model -> what its record says that the model itself does not bear out; nothing of it keeps requests away."""
    try:
        models = {id: model for id, model in services.registry.snapshot.models.items() if model.enabled}
    except Unavailable:
        return {}
    cards = newest(await services.facts.known(), models)
    return {id: found for id, model in sorted(models.items()) if (found := warnings(model, cards.get(id)))}


@dataclass(slots=True)
class Readiness:
    """What an ingress could answer now."""

    ready: bool = False
    waiting: dict[str, str] = field(default_factory=dict)
    """Part -> why it is not there yet."""
    failed: dict[str, str] = field(default_factory=dict)
    """Model -> why nobody can serve it."""


async def readiness(services: Services) -> Readiness:
    """How everything stands that a request needs."""
    found = Readiness()
    if services.draining.is_set():
        found.waiting["ingress"] = "stopping"
    if not services.replies.ready:
        found.waiting["kafka"] = "the end of the reply partition is not known yet"
    try:
        async with asyncio.timeout(2):
            await services.redis.ping()
    except (RedisError, OSError, TimeoutError) as error:
        found.waiting["redis"] = f"no answer: {error!r}"
    try:
        models = [model for model in services.registry.snapshot.models.values() if model.enabled]
    except Unavailable as error:
        found.waiting["registry"] = error.message
        return found
    if not models:
        found.waiting["models"] = "none is configured"
    whole = not found.waiting
    for model in models:
        found.ready |= _would_answer(model, services.pools.status(model.pool), found)
    found.ready &= whole
    return found


def _would_answer(model: Model, status: PoolStatus | None, found: Readiness) -> bool:
    """Whether a request for the model would be served, with a load where it is loaded on demand; if not, why."""
    if status is None:
        found.waiting[f"scheduler of pool {model.pool}"] = "no status within 5 s"
    elif model.id not in status.servable_models:
        found.failed[model.id] = "no worker serves its provider"
    elif (reason := status.failed_models.get(model.id)) is not None:
        found.failed[model.id] = f"could not be loaded: {reason}"
    elif not model.preload or model.id in (*status.ready_models, *status.wishes.unloaded):
        return True
    else:
        found.waiting[f"model {model.id}"] = "loading"
    return False


@router.get("/metrics")
@public
async def metrics(request: Request) -> Response:
    """Prometheus metrics of every role that is reachable, labelled by role and instance."""
    services: Services = request.app.state.services
    try:
        text = await gather(services.redis, ("ingress", services.settings.instance))
    except (RedisError, OSError) as error:
        raise Unavailable("The metrics of the other roles cannot be read (Redis does not answer).") from error
    return Response(text, media_type=CONTENT_TYPE_LATEST)
