"""`/admin/audit`: the audit trail, page by page; each look at it is an event of it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiokafka.errors import KafkaError
from fastapi import Query, Request

from headrace import audit, audit_trail
from headrace.access import Permission
from headrace.audit_trail import Filter
from headrace.errors import Unavailable
from ingress import guard
from ingress.guard import Who
from ingress.services import Services
from schemas.audit import AuditEvent
from schemas.operate import AuditEvents, AuditEventView

router = guard.router(prefix="/admin/audit", tags=["admin: audit"])

Name = Annotated[str, Query(max_length=500)]
Ms = Annotated[int, Query(ge=0, le=2**53)]


@router.get("")
@guard.needs(Permission.AUDIT_READ)
async def list_events(
    request: Request,
    who: Who,
    *,
    actor_: Annotated[str, Query(alias="actor", max_length=500)] = "",
    kind: Name = "",
    subject: Annotated[str, Query(alias="key", max_length=500)] = "",
    action: Name = "",
    outcome: Name = "",
    since_ms: Ms = 0,
    until_ms: Ms = 0,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[int | None, Query(ge=0, le=2**53)] = None,
) -> AuditEvents:
    """The newest events that match all that is given; a page may hold fewer than `limit` though there are more."""
    services: Services = request.app.state.services
    wanted = Filter(actor_, kind, subject, action, outcome, since_ms, until_ms)
    await audit.record(services.producer, audit.note("read", "audit", "events", actor=who.actor, **wanted.said()))
    try:
        page = await audit_trail.page(services.settings, wanted, limit=limit, before=before)
    except KafkaError as error:
        raise Unavailable("The audit trail cannot be read now (Kafka does not answer).") from error
    return AuditEvents(data=[view(event) for event in page.events], next=page.next)


def view(event: AuditEvent) -> AuditEventView:
    """An event as it is shown."""
    return AuditEventView.model_validate(msgspec.structs.asdict(event) | {"changes": _plain(event)})


def _plain(event: AuditEvent) -> dict[str, dict[str, str]]:
    return {name: msgspec.structs.asdict(change) for name, change in event.changes.items()}
