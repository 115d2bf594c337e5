"""`GET /v1/requests/{id}`: the life of one request, hop by hop."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from headrace import audit
from headrace.access import Permission
from headrace.erasure import Erased
from headrace.errors import NotFound, Unavailable
from headrace.openai_objects import error_object, usage_object
from ingress import guard
from ingress.guard import Who
from ingress.lookup import age_ms
from ingress.services import Services
from schemas.events import STAGE_RANK, LifecycleEvent, Terminal
from schemas.ids import PublicId, created_ms, normalise_request_id
from schemas.openai import ErrorBody

router = guard.router()

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "There is none of yours."}}
RECENT_MS = 15 * 60_000
"""Younger requests are read from Kafka, where nothing lags; older ones from ClickHouse."""


class Step(BaseModel):
    """One step; `since_accepted_ms` tells how long after acceptance it came."""

    stage: str
    at_ms: int
    since_accepted_ms: int
    role: str
    instance: str
    attempt: int
    detail: dict[str, Any]


class RequestLife(BaseModel):
    """What is known of a request. `status` is `in_flight` until it has its terminal."""

    request_id: str
    tenant: str
    status: str
    model: str | None = None
    alias: str | None = None
    provider: str | None = None
    worker: str | None = None
    attempts: int = 1
    finish_ms: int | None = None
    """From acceptance to the terminal."""
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    steps: list[Step]


@router.get("/v1/requests/{request_id}", responses=UNKNOWN)
@guard.needs(Permission.REQUESTS_READ)
async def life(request: Request, request_id: str, who: Who) -> RequestLife:
    """A request's lifecycle, by request id or completion id."""
    services: Services = request.app.state.services
    found = normalise_request_id(request_id)
    if found is None:
        raise NotFound(f"{request_id!r} is no request id.")
    public = PublicId.parse(request_id)
    since = public.created_ms if public is not None else created_ms(found)
    if since is not None and age_ms(since) < RECENT_MS:
        events, terminal = await asyncio.gather(
            services.lookup.events(found, since), services.lookup.terminal(found, since)
        )
    else:
        events, terminal = await _stored(services, found), None
    tenant = terminal.tenant if terminal is not None else events[0].tenant if events else None
    if tenant is None or not who.sees(tenant):
        raise NotFound(f"The request {request_id!r} is not known.")
    if any(event.detail.get("erased") for event in events):
        raise Erased
    await services.erasures.check(tenant, found, *_sent(events, terminal))
    if tenant not in who.apps:
        said = audit.note("read", "requests", found, actor=who.actor, tenant=tenant)
        await audit.record(services.producer, said)
    return describe(found, tenant, events, terminal)


def _sent(events: list[LifecycleEvent], terminal: Terminal | None) -> tuple[str, int]:
    """By which key a request was sent, and when (Unix ms), as far as it is known."""
    first = next((event for event in events if event.stage == "accepted"), events[0] if events else None)
    by = terminal.key_id if terminal is not None else str(first.detail.get("key_id", "")) if first is not None else ""
    return by, first.at_ms if first is not None else terminal.timings.accepted_ms if terminal is not None else 0


async def _stored(services: Services, request_id: str) -> list[LifecycleEvent]:
    from ingress import history  # ClickHouse's client is large, and most ingresses never look this far back

    try:
        return await history.events(services.settings, request_id)
    except OSError as error:
        raise Unavailable("ClickHouse does not answer; requests of the last minutes can still be asked for.") from error


def describe(request_id: str, tenant: str, events: list[LifecycleEvent], terminal: Terminal | None) -> RequestLife:
    """The life as it is shown, from what is known. Steps come by rank of stage, then by time."""
    ordered = sorted(events, key=lambda event: (event.attempt, STAGE_RANK[event.stage], event.at_ms))
    accepted = next((event.at_ms for event in ordered if event.stage == "accepted"), 0)
    accepted = accepted or (ordered[0].at_ms if ordered else 0)
    life = RequestLife(
        request_id=request_id,
        tenant=tenant,
        status="in_flight",
        steps=[
            Step(
                stage=event.stage.value,
                at_ms=event.at_ms,
                since_accepted_ms=event.at_ms - accepted,
                role=event.role,
                instance=event.instance,
                attempt=event.attempt,
                detail=dict(event.detail),
            )
            for event in ordered
        ],
    )
    for step in life.steps:
        if step.stage == "terminal":
            life.status = str(step.detail.get("status", life.status))
            life.finish_ms = step.since_accepted_ms
    if terminal is not None:
        life.status = terminal.status.value
        life.model, life.alias = terminal.model or None, terminal.alias or None
        life.provider, life.worker = terminal.provider or None, terminal.worker or None
        life.attempts = terminal.attempt
        life.usage = usage_object(terminal.usage)
        life.error = error_object(terminal.error)["error"] if terminal.error is not None else None
    return life
