"""The router's decisions, pure: a request record becomes a routed request, a terminal, or a dead letter."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.errors import DeadlineExceeded, HeadraceError, InvalidRequest, ModelNotFound
from headrace.registry import Snapshot
from schemas.events import INLINE_BODY_BYTES, NOTHING, BodyRef, Routed, Status, Terminal, Timings
from topics.catalogue import REPLIES
from topics.envelope import Envelope, EnvelopeError, parse

MAX_AGE_MS = 600_000
"""A request that waited longer than this at the broker is refused as `expired`: nobody waits for it any more."""
BYTES_PER_TOKEN = 4
"""For estimates only: English text has about four bytes a token."""


class Unreadable(Exception):
    """The record is no request that we could answer: its envelope or body cannot be decoded."""

    def __init__(self, reason: str, envelope: Envelope | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.envelope = envelope


class _Body(msgspec.Struct):
    """The few fields of a chat body that routing needs."""

    model: str
    messages: msgspec.Raw
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_body = msgspec.json.Decoder(_Body)


def route(
    value: bytes | None,
    headers: Sequence[tuple[str, bytes]],
    *,
    partition: int,
    offset: int,
    accepted_ms: int,
    now_ms: int,
    snapshot: Snapshot,
) -> Routed | Terminal:
    """Route one record of `inference.requests`. Raises `Unreadable`."""
    try:
        envelope = parse(headers)
    except EnvelopeError as error:
        raise Unreadable(str(error)) from None
    if not 0 <= envelope.reply_partition < REPLIES.partitions:
        raise Unreadable(f"hr-reply-partition {envelope.reply_partition} is not below {REPLIES.partitions}")
    try:
        body = _body.decode(value or b"")
    except msgspec.MsgspecError as error:
        raise Unreadable(f"the body is no chat request: {error}", envelope) from None

    deadline_ms = accepted_ms + int(envelope.deadline_s * 1000)
    if now_ms > min(deadline_ms, accepted_ms + MAX_AGE_MS):
        gone = DeadlineExceeded("The request waited past its deadline before it could be routed; send it again.")
        return refusal(
            envelope, accepted_ms, now_ms, gone, status=Status.EXPIRED, alias=body.model, stream=bool(body.stream)
        )
    model = snapshot.resolve(body.model)
    if model is None:
        unknown = ModelNotFound(
            f"The model {body.model!r} does not exist; GET /v1/models lists those that do.", param="model"
        )
        return refusal(envelope, accepted_ms, now_ms, unknown, alias=body.model, stream=bool(body.stream))
    return Routed(
        request_id=envelope.request_id,
        tenant=envelope.tenant,
        key_id=envelope.key_id,
        model=model.id,
        alias=body.model,
        pool=model.pool,
        reply_partition=envelope.reply_partition,
        ref=BodyRef(partition, offset),
        body=msgspec.Raw(value) if value is not None and len(value) <= INLINE_BODY_BYTES else NOTHING,
        stream=bool(body.stream),
        prompt_tokens_estimate=max(1, len(bytes(body.messages)) // BYTES_PER_TOKEN),
        max_tokens=body.max_completion_tokens or body.max_tokens or model.default_max_tokens,
        accepted_ms=accepted_ms,
        routed_ms=now_ms,
        deadline_ms=deadline_ms,
        resume_s=envelope.resume_s,
        digest=envelope.digest,
        price=model.price,
        traceparent=envelope.traceparent,
    )


def refusal(
    envelope: Envelope,
    accepted_ms: int,
    now_ms: int,
    error: HeadraceError,
    *,
    status: Status = Status.REJECTED,
    alias: str = "",
    stream: bool = False,
) -> Terminal:
    """The terminal of a request that goes no further than the router."""
    return Terminal(
        request_id=envelope.request_id,
        tenant=envelope.tenant,
        attempt=1,
        epoch=0,
        status=status,
        key_id=envelope.key_id,
        alias=alias,
        stream=stream,
        reply_partition=envelope.reply_partition,
        error=error.info(),
        timings=Timings(accepted_ms=accepted_ms, finished_ms=now_ms),
    )


def unreadable_terminal(envelope: Envelope, accepted_ms: int, now_ms: int, reason: str) -> Terminal:
    """The terminal of a request whose body could not be decoded; the message itself is a dead letter."""
    return refusal(envelope, accepted_ms, now_ms, InvalidRequest(f"The request could not be read: {reason}"))
