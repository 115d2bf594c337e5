"""Requests that no ingress has seen, of direct publishers: everything that an ingress checks, checked here. Pure."""

from __future__ import annotations

import msgspec

from headrace.asked import needs
from headrace.chat_body import TIERS, check_context, parse
from headrace.choice import StandingOf, choose, named, not_found
from headrace.errors import BodyTooLarge, Forbidden, HeadraceError, InvalidRequest, Unauthorized
from headrace.registry import Snapshot
from headrace.senders import Sent
from processors.router.route import Request, refusal, refused
from schemas.control import TASKS, Key
from schemas.events import BodyRef, Terminal
from schemas.ids import created_ms
from topics.catalogue import MAX_BODY_BYTES
from topics.envelope import Published

SKEW_MS = 120_000
"""How far the time in a publisher's id may be from the brokers'. Twice this and `MAX_AGE_MS` together are less than the
time for which a scheduler remembers ids: no recording of a message is ever taken for a new request."""
CLAIM_MS = 900_000
"""How long an id is known to be taken; past it, its own time is too old."""


def not_acceptable(sent: Sent, accepted_ms: int) -> HeadraceError | None:
    """Why a publisher's message makes no request under its id at all; None where it does.

    Such an id may be another request's: no terminal must be written under it.
    """
    made_ms = created_ms(sent.envelope.request_id)
    if sent.foreign:
        return InvalidRequest(sent.refusal, param="ce_id")
    if made_ms is None or abs(made_ms - accepted_ms) > SKEW_MS:
        return InvalidRequest(
            f"The time in ce_id is more than {SKEW_MS // 1000} s from the brokers'. Set your clock, and give each"
            " request a new id when it is sent.",
            param="ce_id",
        )
    return None


def read_published(
    sent: Sent, published: Published, value: bytes | None, ref: BodyRef, accepted_ms: int, now_ms: int
) -> Request | Terminal:
    """A publisher's request, read and checked as an ingress checks one; or its refusal."""
    raw = value or b""
    try:
        if sent.refusal:
            raise InvalidRequest(f"The message was refused: {sent.refusal}.")
        if len(raw) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"The body is larger than {MAX_BODY_BYTES} bytes.")
        body, asked = parse(raw)
    except HeadraceError as error:
        return refusal(sent.envelope, accepted_ms, now_ms, error, stream=sent.envelope.stream)
    envelope = sent.envelope
    if envelope.priority == "standard":
        envelope = msgspec.structs.replace(envelope, priority=TIERS.get(body.service_tier or "", "standard"))
    return Request(envelope, asked, raw, ref, accepted_ms, published, body)


def key_of(published: Published, found: Key | None, snapshot: Snapshot, now_s: float) -> Key:
    """The key whose rights a publisher's request has: the API key that it names, else one that may use all models.

    `found` is the key that it names. Raises `Forbidden` or `Unauthorized`.
    """
    tenant = published.envelope.tenant
    if not snapshot.apps[tenant].enabled:
        raise Forbidden("The app is not enabled.")
    if not published.api_key_id:
        return Key(id=published.envelope.key_id, sha256="", name=published.publisher, app=tenant)
    if found is None or not found.enabled or found.app != tenant:
        raise Unauthorized("hr-api-key-id names no API key of this app that is in force.", param="hr-api-key-id")
    if found.expires_at is not None and found.expires_at <= now_s:
        raise Unauthorized("The API key that hr-api-key-id names has expired.", param="hr-api-key-id")
    return found


def check_model(
    request: Request, key: Key, snapshot: Snapshot, standing_of: StandingOf, now_ms: int
) -> Terminal | None:
    """The refusal of a request that its key may have no model for, that none can hold or that none serves now."""
    name = request.asked.model
    if now_ms > request.late_ms:
        return None  # It is refused as expired, whatever it asks for.
    try:
        if name not in TASKS:
            model = named(snapshot, name)
            if model is None or not key.may_use(model):
                raise not_found(name)
            if request.body is not None:
                check_context(request.body, model)
        standing = choose(snapshot, key, name, needs(request.asked), standing_of).standing
        if standing.down is not None and not standing.may_try:
            raise standing.down
    except HeadraceError as error:
        return refused(request, now_ms, error)
    return None
