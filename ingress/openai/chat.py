"""`POST /v1/chat/completions`: admit, publish, answer."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from dataclasses import dataclass

import structlog
from aiokafka.errors import KafkaError
from fastapi import Request
from starlette.responses import Response

from headrace import metrics
from headrace.access import Permission
from headrace.asked import Asked, needs
from headrace.chat_body import TIERS, check_context, parse
from headrace.choice import Choice, choose
from headrace.errors import HeadraceError, InvalidRequest, Unavailable
from headrace.limits.limiter import UNLIMITED, Admission
from ingress import guard
from ingress.auth import allowed_model, asking_key
from ingress.guard import principal_of
from ingress.idempotency import ACCEPTED, Reservations
from ingress.openai.answer import ChatAnswer, Ticket
from ingress.openai.body import read_body
from ingress.services import Services
from schemas.control import TASKS, Key
from schemas.events import PRIORITIES, Stage
from schemas.ids import PublicId, idempotent_request_id, new_request_id
from schemas.openai import ChatCompletionRequest
from topics.catalogue import REQUESTS
from topics.clients import Producer
from topics.envelope import INGRESS, Envelope

log = structlog.get_logger(__name__)
_TRACEPARENT = re.compile(r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")
"""W3C Trace Context; what does not match is to be ignored, as the standard says."""
router = guard.router()

BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{ChatCompletionRequest.__name__}"}}},
}
"""The body as OpenAPI tells of it; it is read raw, since its bytes go on unchanged."""
PRODUCE_TIMEOUT_S = 5.0
PENDING_POLL_S = 0.05
MAX_RESUME_S = 3600
MAX_DEADLINE_S = 1800.0
DEFAULT_RESUME_S = 30
"""Grace of requests that can be resumed but name no time of their own."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the headers of a request ask for."""

    idempotency_key: str | None
    resume_s: int
    deadline_s: float
    traceparent: str | None
    priority: str | None
    """None where no header names one."""
    start_within_s: float | None

    @property
    def patience_s(self) -> float:
        """How long the request may wait for its turn."""
        return self.deadline_s if self.start_within_s is None else min(self.deadline_s, self.start_within_s)


def wishes(request: Request, default_deadline_s: float) -> Wishes:
    """The wishes in a request's headers. Raises `InvalidRequest`, naming the header."""
    headers = request.headers
    key = headers.get("idempotency-key")
    if key is not None:
        Reservations.check_key(key)
    resume_s = DEFAULT_RESUME_S if key is not None else 0
    if (text := headers.get("x-hr-resume")) is not None:
        if not (text.isascii() and text.isdecimal()) or int(text) > MAX_RESUME_S:
            raise InvalidRequest(f"x-hr-resume must be whole seconds from 0 to {MAX_RESUME_S}.", param="x-hr-resume")
        resume_s = int(text)
    deadline_s = _seconds(request, "x-request-timeout") or default_deadline_s
    priority = headers.get("x-hr-priority")
    if priority is not None and priority not in PRIORITIES:
        raise InvalidRequest(f"x-hr-priority must be one of {', '.join(PRIORITIES)}.", param="x-hr-priority")
    trace = headers.get("traceparent", "")
    return Wishes(
        key, resume_s, deadline_s, trace if _TRACEPARENT.match(trace) else None, priority,
        start_within_s=_seconds(request, "x-hr-start-within"),
    )  # fmt: skip


def _seconds(request: Request, name: str) -> float | None:
    """The time that a header gives; None without it. Raises `InvalidRequest`."""
    if (text := request.headers.get(name)) is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_DEADLINE_S:  # NaN is not either
        raise InvalidRequest(f"{name} must be seconds, above 0 and at most {MAX_DEADLINE_S:g}.", param=name)
    return seconds


@router.post("/v1/chat/completions", openapi_extra={"requestBody": BODY})
@guard.needs(Permission.GENERATE)
async def create(request: Request) -> Response:
    """Create a chat completion, streamed or not. Shapes are OpenAI's."""
    services: Services = request.app.state.services
    key = asking_key(request, principal_of(request))
    raw = await read_body(request)
    wanted = wishes(request, services.settings.request_deadline)
    body, asked = parse(raw)
    choice, named = _admit(services, key, body, asked, wanted)
    if not services.replies.ready or services.draining.is_set():
        raise Unavailable("This ingress is starting or stopping; try again shortly.")
    ticket = await _ticket(services, key, raw, wanted)
    admission = UNLIMITED
    if ticket.first:
        try:
            admission = await _reserve(services, key, ticket, choice, asked, len(raw))
        except HeadraceError:
            if wanted.idempotency_key is not None:
                await services.reservations.release(key.app, ticket.public.request_id)
            raise
    answer = ChatAnswer(services, key, ticket, body, model=named, limits=admission.headers)
    if ticket.first:
        answer.attach()
        try:
            await _publish(services, key, raw, wanted, ticket, body)
        except BaseException:
            answer.detach()  # Its reservation lapses, unless the brokers took the request after all.
            raise
        services.admissions.accepted(admission, key.app, ticket.public.request_id)
        metrics.ACCEPTED.labels(model=choice.task or choice.model.id).inc()
    return answer


def _admit(
    services: Services, key: Key, body: ChatCompletionRequest, asked: Asked, wanted: Wishes
) -> tuple[Choice, str]:
    """The model that would serve the request now (the router chooses anew), and the id of the one that it names.

    Raises `ModelNotFound` or `ContextLengthExceeded`.
    """
    snapshot = services.registry.snapshot
    named = ""
    if body.model not in TASKS:
        model = allowed_model(key, snapshot, body.model)
        check_context(body, model)
        named = model.id
    standing_of = services.pools.standing(wanted.patience_s, _priority(wanted, body))
    now_ms = time.time_ns() // 1_000_000
    return choose(snapshot, key, body.model, needs(asked), standing_of, at_ms=now_ms), named


def _priority(wanted: Wishes, body: ChatCompletionRequest) -> str:
    """The header's, else what the body's `service_tier` stands for."""
    return wanted.priority or TIERS.get(body.service_tier or "", "standard")


async def _reserve(
    services: Services, key: Key, ticket: Ticket, choice: Choice, asked: Asked, body_bytes: int
) -> Admission:
    """What this caller's request may come to, reserved. Raises what refuses it: its model's standing, or a limit."""
    standing = choice.standing
    if standing.down is not None and not standing.may_try:
        raise standing.down
    snapshot, request_id = services.registry.snapshot, ticket.public.request_id
    return await services.admissions.admit(snapshot, key, choice.model, request_id, asked, body_bytes)


async def _ticket(services: Services, key: Key, raw: bytes, wanted: Wishes) -> Ticket:
    """The id of the request: new, or that of the one that an Idempotency-Key names."""
    digest = hashlib.sha256(raw).hexdigest()
    partition = services.replies.partition
    if wanted.idempotency_key is None:
        public = PublicId(new_request_id(), partition, time.time_ns() // 1_000_000)
        return Ticket(public, digest, wanted.resume_s, first=True, listed=wanted.resume_s > 0)
    request_id = idempotent_request_id(key.app, wanted.idempotency_key)
    await services.erasures.check("", request_id, "", 0)
    while True:
        held = await services.reservations.reserve(key.app, request_id, digest, partition)
        if held is None:
            public = PublicId(request_id, partition, time.time_ns() // 1_000_000)
            return Ticket(public, digest, wanted.resume_s, first=True, listed=True)
        if held.state == ACCEPTED:
            break
        # Not published yet, and perhaps never: its ingress may refuse it, or die. Then it is ours.
        await asyncio.sleep(PENDING_POLL_S)
    public = PublicId(request_id, held.reply_partition, held.created_ms)
    await _not_erased(services, key.app, public)
    return Ticket(public, digest, wanted.resume_s, first=False, listed=True)


async def _not_erased(services: Services, tenant: str, public: PublicId) -> None:
    """Raises `Erased` when the answer that a caller would be given is. Whose key asked is seldom to be looked up."""
    sender = ""
    if await services.erasures.of_keys(public.created_ms):
        apps = services.registry.snapshot.apps
        asked = await services.lookup.request(public.request_id, public.created_ms, apps)
        sender = asked.envelope.key_id if asked is not None else ""
    await services.erasures.check(tenant, public.request_id, sender, public.created_ms)


async def _publish(
    services: Services, key: Key, raw: bytes, wanted: Wishes, ticket: Ticket, body: ChatCompletionRequest
) -> None:
    """Publish, and return when the brokers have acknowledged. Raises `Unavailable`."""
    request_id, partition, created_ms = ticket.public
    envelope = Envelope(
        request_id=request_id,
        source=f"{INGRESS}{services.settings.instance}/{services.boot}",
        time_ms=created_ms,
        tenant=key.app,
        key_id=key.id,
        user_id=key.owner_id,
        reply_partition=partition,
        digest=ticket.digest,
        deadline_s=wanted.deadline_s,
        resume_s=wanted.resume_s,
        priority=_priority(wanted, body),
        idempotency_key=wanted.idempotency_key,
        traceparent=wanted.traceparent,
        start_within_s=wanted.start_within_s,
    )
    headers = services.seals.sealed(REQUESTS.name, envelope.headers(), ticket.digest)
    sending = asyncio.ensure_future(_send(services.producer, request_id, raw, headers))
    try:
        await asyncio.wait_for(asyncio.shield(sending), PRODUCE_TIMEOUT_S)
    except (KafkaError, TimeoutError) as error:
        log.error("publish_failed", request_id=request_id, error=repr(error))
        # The outcome may be unknown. If the brokers take it after all, nobody waits: it is cancelled then.
        sending.add_done_callback(lambda sent: _too_late(services, request_id, key.app, sent))
        if wanted.idempotency_key is not None:
            await services.reservations.release(key.app, request_id)
        raise Unavailable(
            f"The request {request_id} could not be stored; it will not be answered. Send it again.", retry_after_s=2
        ) from error
    except asyncio.CancelledError:
        sending.add_done_callback(lambda sent: _too_late(services, request_id, key.app, sent))
        raise
    if wanted.idempotency_key is not None:
        await services.reservations.confirm(key.app, request_id, ticket.digest, partition, created_ms)
    services.outcomes.event(
        request_id,
        key.app,
        Stage.ACCEPTED,
        at_ms=created_ms,
        detail={"alias": body.model, "stream": bool(body.stream), "bytes": len(raw), "key_id": key.id},
    )


async def _send(producer: Producer, request_id: str, raw: bytes, headers: list[tuple[str, bytes]]) -> None:
    await producer.send(REQUESTS.name, raw, key=request_id, headers=headers)


def _too_late(services: Services, request_id: str, tenant: str, sent: asyncio.Future[None]) -> None:
    if not sent.cancelled() and sent.exception() is None:
        services.attachments.left(request_id, tenant, 0, reason="The ingress had given up on publishing it.")
