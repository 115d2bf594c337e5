"""The router's decisions, pure: a request record becomes a routed request, a terminal, or a dead letter."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from headrace.access import key_refusal
from headrace.asked import Asked, needs, read
from headrace.choice import Choice, Standing, choose, may_lead_elsewhere
from headrace.errors import DeadlineExceeded, HeadraceError, InvalidRequest
from headrace.registry import Snapshot
from headrace.senders import Sent
from processors.router.continuable import choices, continuable
from schemas.control import Key, Model
from schemas.events import INLINE_BODY_BYTES, NOTHING, BodyRef, Routed, Status, Terminal, Timings
from schemas.openai import ChatCompletionRequest
from topics.catalogue import REPLIES
from topics.envelope import INGRESS, Envelope, Published

MAX_AGE_MS = 600_000
"""A request that waited longer than this at the broker is refused as `expired`: nobody waits for it any more."""


class Unreadable(Exception):
    """The record is no request that we could answer: its sender is not known, or its body cannot be decoded."""

    def __init__(self, reason: str, envelope: Envelope | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.envelope = envelope


class Request(NamedTuple):
    """A record of `inference.requests`, read."""

    envelope: Envelope
    asked: Asked
    value: bytes
    ref: BodyRef
    accepted_ms: int
    published: Published | None = None
    """What its sender said, where that is a direct publisher; None where an ingress has admitted it."""
    body: ChatCompletionRequest | None = None
    """The whole body, where no ingress has checked it."""

    @property
    def deadline_ms(self) -> int:
        """Unix ms after which nobody waits for an answer."""
        return self.accepted_ms + int(self.envelope.deadline_s * 1000)

    @property
    def patient_ms(self) -> int:
        """Unix ms until which it may wait for its turn."""
        return self.accepted_ms + int(self.envelope.patience_s * 1000)

    @property
    def late_ms(self) -> int:
        """Unix ms after which it is not routed any more."""
        return min(self.patient_ms, self.accepted_ms + MAX_AGE_MS)

    def may_lead_elsewhere(self, snapshot: Snapshot) -> bool:
        """Whether another model than the one named could serve it, so that its key must be known."""
        return may_lead_elsewhere(snapshot, self.asked.model)


def decode(sent: Sent, value: bytes | None, *, partition: int, offset: int, accepted_ms: int) -> Request:
    """Read the request of an ingress. Raises `Unreadable`."""
    envelope = sent.envelope
    if not 0 <= envelope.reply_partition < REPLIES.partitions:
        raise Unreadable(f"hr-reply-partition {envelope.reply_partition} is not below {REPLIES.partitions}")
    try:
        asked = read(value or b"")
    except msgspec.MsgspecError as error:
        raise Unreadable(f"the body is no chat request: {error}", envelope) from None
    return Request(envelope, asked, value or b"", BodyRef(partition, offset), accepted_ms)


def route(
    request: Request, *, now_ms: int, snapshot: Snapshot, key: Key | None, standing_of: Callable[[Model], Standing]
) -> Choice | Terminal:
    """Choose a request's model, or refuse it; `key` is the one it was sent under, None where that is not known."""
    if now_ms > request.late_ms:
        gone = DeadlineExceeded("The request waited for longer than it may before it could be routed; send it again.")
        return refused(request, now_ms, gone, status=Status.EXPIRED)
    if (revoked := _revoked(key, request, snapshot)) is not None:
        return refused(request, now_ms, revoked)
    try:
        asked, at_ms = request.asked, request.accepted_ms
        return choose(snapshot, _in_force(key, request), asked.model, needs(asked), standing_of, at_ms=at_ms)
    except HeadraceError as error:
        return refused(request, now_ms, error)


def _revoked(key: Key | None, request: Request, snapshot: Snapshot) -> HeadraceError | None:
    """Why a request is refused that was accepted under a key which has been revoked since, or whose app has."""
    if key is None or key.app != request.envelope.tenant:
        return None
    return key_refusal(key, snapshot.apps, now_s=0)


def _in_force(key: Key | None, request: Request) -> Key | None:
    """The key, if it still counts: it may have been revoked since, and an envelope could name another tenant's."""
    return key if key is not None and key.enabled and key.app == request.envelope.tenant else None


def routed(request: Request, model: Model, now_ms: int, cap: int | None = None) -> Routed:
    """The request as the scheduler gets it, for a model and at the price in force when it was accepted.

    `cap` is what was reserved for each choice, where that counts and the caller names no cap.
    """
    envelope, asked = request.envelope, request.asked
    return Routed(
        request_id=envelope.request_id,
        tenant=envelope.tenant,
        key_id=envelope.key_id,
        user_id=envelope.user_id,
        model=model.id,
        alias=asked.model,
        pool=model.pool,
        reply_partition=envelope.reply_partition,
        ref=request.ref,
        body=msgspec.Raw(request.value) if len(request.value) <= INLINE_BODY_BYTES else NOTHING,
        stream=streams(request),
        prompt_tokens_estimate=asked.prompt_tokens,
        max_tokens=asked.limit or cap or model.default_max_tokens,
        priority=envelope.priority,
        accepted_ms=request.accepted_ms,
        routed_ms=now_ms,
        deadline_ms=request.deadline_ms,
        resume_s=envelope.resume_s,
        digest=envelope.digest,
        price=model.price_at(request.accepted_ms),
        traceparent=envelope.traceparent,
        choices=choices(asked),
        continuable=continuable(asked),
        adapter=model.adapter(asked.model),
        start_by_ms=request.patient_ms if envelope.start_within_s is not None else 0,
        publisher=request.published.publisher if request.published is not None else "",
        ingress=envelope.source.removeprefix(INGRESS) if request.published is None else "",
    )


def streams(request: Request) -> bool:
    """Whether its answer is told piece by piece."""
    return bool(request.asked.stream) or request.envelope.stream


def refused(request: Request, now_ms: int, error: HeadraceError, *, status: Status = Status.REJECTED) -> Terminal:
    """The terminal of a request that was read and goes no further."""
    asked = request.asked
    return refusal(
        request.envelope, request.accepted_ms, now_ms, error,
        status=status, alias=asked.model, stream=streams(request),
    )  # fmt: skip


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
        user_id=envelope.user_id,
        alias=alias,
        stream=stream,
        reply_partition=envelope.reply_partition,
        error=error.info(),
        timings=Timings(accepted_ms=accepted_ms, finished_ms=now_ms),
    )


def unreadable_terminal(envelope: Envelope, accepted_ms: int, now_ms: int, reason: str) -> Terminal:
    """The terminal of a request whose body could not be decoded; the message itself is a dead letter."""
    return refusal(envelope, accepted_ms, now_ms, InvalidRequest(f"The request could not be read: {reason}"))
