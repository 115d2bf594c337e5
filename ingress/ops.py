"""Health and metrics."""

from __future__ import annotations

import asyncio

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

router = guard.router()


@router.get("/health/live")
@public
async def live() -> dict[str, str]:
    """Whether this process answers at all."""
    return {"status": "live"}


@router.get("/health/ready")
@public
async def ready(request: Request) -> JSONResponse:
    """Whether a chat request would be answered; names each part that is not ready, and why."""
    services: Services = request.app.state.services
    waiting = await not_ready(services)
    content = {
        "status": "not ready" if waiting else "ready",
        "waiting_for": waiting,
        "warnings": await doubtful(services),
    }
    return JSONResponse(content, status_code=503 if waiting else 200)


async def doubtful(services: Services) -> dict[str, list[str]]:
    """Model -> what its record says that the model itself does not bear out; nothing of it keeps requests away."""
    try:
        models = {id: model for id, model in services.registry.snapshot.models.items() if model.enabled}
    except Unavailable:
        return {}
    cards = newest(await services.facts.known(), models)
    return {id: found for id, model in sorted(models.items()) if (found := warnings(model, cards.get(id)))}


async def not_ready(services: Services) -> dict[str, str]:
    """Part -> why it is not ready."""
    waiting: dict[str, str] = {}
    if services.draining.is_set():
        waiting["ingress"] = "stopping"
    if not services.replies.ready:
        waiting["kafka"] = "the end of the reply partition is not known yet"
    try:
        async with asyncio.timeout(2):
            await services.redis.ping()
    except (RedisError, OSError, TimeoutError) as error:
        waiting["redis"] = f"no answer: {error!r}"
    try:
        models = [model for model in services.registry.snapshot.models.values() if model.enabled]
    except Unavailable as error:
        waiting["registry"] = error.message
        return waiting
    if not models:
        waiting["models"] = "none is configured"
    for pool in sorted({model.pool for model in models}):
        status = services.pools.status(pool)
        if status is None:
            waiting[f"scheduler of pool {pool}"] = "no status within 5 s"
            continue
        for model in models:
            if model.pool != pool:
                continue
            if model.id not in status.servable_models:
                waiting[f"model {model.id}"] = "no worker serves its provider"
            elif model.preload and model.id not in (*status.ready_models, *status.wishes.unloaded):
                reason = status.failed_models.get(model.id)
                waiting[f"model {model.id}"] = "loading" if reason is None else f"could not be loaded: {reason}"
    return waiting


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
