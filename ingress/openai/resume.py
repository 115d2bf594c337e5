"""`GET /v1/chat/completions/{id}/stream`: the rest of a stream, from any ingress, as long as the topic holds it."""

from __future__ import annotations

import re

from fastapi import Request
from starlette.responses import Response

from headrace import audit
from headrace.access import Permission
from headrace.chat_body import parse
from headrace.errors import InvalidRequest, NotFound
from ingress import guard
from ingress.auth import asking_key
from ingress.guard import principal_of
from ingress.openai.answer import ChatAnswer, Ticket
from ingress.services import Services
from schemas.ids import PublicId
from topics.catalogue import REPLIES

router = guard.router()

_EVENT_ID = re.compile(r"^(\d{1,9}):(\d{1,12})$")


@router.get("/v1/chat/completions/{completion_id}/stream")
@guard.needs(Permission.GENERATE)
async def resume(request: Request, completion_id: str, starting_after: str | None = None) -> Response:
    """Continue a stream after the event named by Last-Event-ID (or `starting_after`); from its beginning without."""
    services: Services = request.app.state.services
    principal = principal_of(request)
    public = PublicId.parse(completion_id)
    if public is None or public.reply_partition >= REPLIES.partitions:
        raise NotFound(f"{completion_id!r} is not the id of a completion (chatcmpl-…).")
    after = _position(request.headers.get("last-event-id") or starting_after)
    asked = await services.lookup.request(public.request_id, public.created_ms, services.registry.snapshot.apps)
    if asked is None or not principal.sees(asked.envelope.tenant):
        raise NotFound(f"The completion {completion_id!r} is not known, or is older than can be resumed.")
    tenant = asked.envelope.tenant
    await services.erasures.check(tenant, public.request_id, asked.envelope.key_id, asked.accepted_ms)
    if tenant not in principal.apps:
        said = audit.note("resume", "requests", public.request_id, actor=principal.actor, tenant=tenant)
        await audit.record(services.producer, said)
    body, _ = parse(asked.body)
    if not body.stream:
        raise InvalidRequest("This completion was not streamed; send its Idempotency-Key again to get its answer.")
    key = asking_key(request, principal)
    listed = asked.envelope.resume_s > 0 or asked.envelope.idempotency_key is not None
    ticket = Ticket(public, asked.envelope.digest, asked.envelope.resume_s, first=False, listed=listed)
    return ChatAnswer(services, key, ticket, body, after=after)


def _position(text: str | None) -> tuple[int, int]:
    if not text:
        return 1, 0
    match = _EVENT_ID.match(text)
    if match is None:
        raise InvalidRequest("Last-Event-ID must be 'attempt:seq', as the stream's events have it.")
    return int(match[1]), int(match[2])
