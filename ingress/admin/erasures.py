"""`/admin/erasures`: erasing what a request, an app or a user asked and was answered, and how far that is."""

from __future__ import annotations

from fastapi import Request

from headrace import erasure
from headrace.access import Permission
from headrace.control_client import command
from headrace.errors import InvalidRequest
from ingress import guard
from ingress.admin.records import After, Limit, page
from ingress.guard import Who
from ingress.services import Services
from schemas.control import Erasure
from schemas.operate import ErasureView, ErasureViews, ErasureWanted

router = guard.router(prefix="/admin/erasures", tags=["admin: erasures"])


LAST_MS = 10**14
"""Later than any erasure (Unix ms)."""


@router.get("")
@guard.needs(Permission.ERASURES_READ)
async def list_erasures(request: Request, limit: Limit = 100, after: After = None) -> ErasureViews:
    """All erasures that were ever asked for, the newest first."""
    services: Services = request.app.state.services
    part = page(await services.erasures.all(), _newest_first, limit, after)
    return ErasureViews(data=[view(one) for one in part.items], has_more=part.has_more, last_id=part.last_id)


def _newest_first(one: Erasure) -> str:
    return f"{LAST_MS - one.asked_ms:015}/{one.subject}"


@router.post("", status_code=202)
@guard.needs(Permission.ERASURES_WRITE)
async def erase(request: Request, wanted: ErasureWanted, who: Who) -> ErasureViews:
    """Erase; when this answers, the content is not readable any more. Analytics follow, and Kafka's copies expire."""
    services: Services = request.app.state.services
    given = {"user": wanted.user, "app": wanted.app, "request": wanted.request}
    asked = [Erasure(erasure.subject(kind, name)) for kind, name in given.items() if name is not None]
    if len(asked) != 1:
        raise InvalidRequest("Name one of user, app and request.")
    await services.control.submit([command(asked[0], actor=who.actor, reason=wanted.reason)])
    mine = (asked[0].subject, asked[0].id if asked[0].kind == "user" else None)
    found = [one for one in await services.erasures.all() if one.subject == mine[0] or one.of == mine[1]]
    return ErasureViews(data=[view(one) for one in found], has_more=False, last_id=None)


def view(one: Erasure) -> ErasureView:
    """An erasure as it is shown."""
    return ErasureView(
        subject=one.subject,
        of=one.of,
        asked_ms=one.asked_ms,
        applied={name: one.applied.get(name) for name in erasure.PROJECTIONS} | {"api": one.asked_ms},
        gone_ms=erasure.gone_ms(one.asked_ms),
    )
