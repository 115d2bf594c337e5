"""The envelope of `inference.requests`: CloudEvents 1.0 in binary mode, ours prefixed `hr-`.

Header names and meanings are a contract with other systems that publish requests. Unknown headers are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from schemas.events import PRIORITIES

REQUEST_TYPE = "headrace.inference.request.v1"
IDEMPOTENCY_HEADER = "hr-idempotency-key"
MAX_DEADLINE_S = 86_400.0
"""A deadline beyond the retention of `inference.requests` could not be kept."""

Headers = Sequence[tuple[str, bytes]]


class EnvelopeError(ValueError):
    """The headers of a request are missing or wrong; the message says which one and what is expected."""


class Envelope(msgspec.Struct, frozen=True):
    """Who asks, under which id, and where the answer goes."""

    request_id: str
    """`ce_id`: 32 hex digits."""
    source: str
    """`ce_source`: the publisher, e.g. `/headrace/ingress/ingress-1`."""
    time_ms: int
    """`ce_time`, as Unix ms, by the publisher's clock; informational."""
    tenant: str
    key_id: str
    reply_partition: int
    """`hr-reply-partition`: partition of `inference.replies` that the asking ingress reads."""
    digest: str
    """`hr-digest`: SHA-256 of the body, hex."""
    deadline_s: float
    """`hr-deadline`: seconds from acceptance after which nobody waits."""
    resume_s: int = 0
    """`hr-resume`: seconds that the request outlives its last caller; 0 cancels at once."""
    priority: str = "standard"
    """`hr-priority`: one of `schemas.events.PRIORITIES`."""
    idempotency_key: str | None = None
    """`hr-idempotency-key`, as the caller sent it."""
    traceparent: str | None = None
    replay_of: str | None = None
    """`hr-replay-of`: the request that this one repeats, when it was replayed from the dead letters."""
    start_within_s: float | None = None
    """`hr-start-within`: seconds from acceptance after which an answer need not begin; None for the deadline."""

    @property
    def patience_s(self) -> float:
        """How long after its acceptance the request may wait for its turn."""
        return self.deadline_s if self.start_within_s is None else min(self.deadline_s, self.start_within_s)

    user_id: str = ""
    """`hr-user-id`: who owns the key; absent where nobody does."""

    def headers(self) -> list[tuple[str, bytes]]:
        """The Kafka record headers of this envelope."""
        stamp = datetime.fromtimestamp(self.time_ms / 1000, UTC).isoformat(timespec="milliseconds")
        pairs: list[tuple[str, str]] = [
            ("ce_specversion", "1.0"),
            ("ce_id", self.request_id),
            ("ce_type", REQUEST_TYPE),
            ("ce_source", self.source),
            ("ce_time", stamp.replace("+00:00", "Z")),
            ("content-type", "application/json"),
            ("hr-tenant", self.tenant),
            ("hr-key-id", self.key_id),
            ("hr-reply-partition", str(self.reply_partition)),
            ("hr-digest", self.digest),
            ("hr-deadline", f"{self.deadline_s:g}"),
        ]
        if self.resume_s:
            pairs.append(("hr-resume", str(self.resume_s)))
        if self.user_id:
            pairs.append(("hr-user-id", self.user_id))
        if self.priority != "standard":
            pairs.append(("hr-priority", self.priority))
        if self.start_within_s is not None:
            pairs.append(("hr-start-within", f"{self.start_within_s:g}"))
        for name, value in (
            (IDEMPOTENCY_HEADER, self.idempotency_key),
            ("traceparent", self.traceparent),
            ("hr-replay-of", self.replay_of),
        ):
            if value is not None:
                pairs.append((name, value))
        return [(name, value.encode()) for name, value in pairs]


def _required(found: dict[str, str], name: str) -> str:
    try:
        return found[name]
    except KeyError:
        raise EnvelopeError(f"header {name} is missing") from None


def parse(headers: Headers) -> Envelope:
    """The envelope in a record's headers. Raises `EnvelopeError`."""
    try:
        found = {name: value.decode() for name, value in headers if value is not None}
    except UnicodeDecodeError as error:
        raise EnvelopeError(f"a header is not UTF-8: {error}") from None
    kind = _required(found, "ce_type")
    if kind != REQUEST_TYPE:
        raise EnvelopeError(f"ce_type is {kind!r}, expected {REQUEST_TYPE!r}")
    request_id = _required(found, "ce_id")
    if len(request_id) != 32 or not all(digit in "0123456789abcdef" for digit in request_id):
        raise EnvelopeError("ce_id is not a UUID as 32 lower-case hex digits")
    try:
        envelope = Envelope(
            request_id=request_id,
            source=_required(found, "ce_source"),
            time_ms=int(datetime.fromisoformat(_required(found, "ce_time")).timestamp() * 1000),
            tenant=_required(found, "hr-tenant"),
            key_id=_required(found, "hr-key-id"),
            reply_partition=int(_required(found, "hr-reply-partition")),
            digest=_required(found, "hr-digest"),
            deadline_s=float(_required(found, "hr-deadline")),
            resume_s=int(found.get("hr-resume", "0")),
            priority=found.get("hr-priority", "standard"),
            idempotency_key=found.get(IDEMPOTENCY_HEADER),
            traceparent=found.get("traceparent"),
            replay_of=found.get("hr-replay-of"),
            start_within_s=float(found["hr-start-within"]) if "hr-start-within" in found else None,
            user_id=found.get("hr-user-id", ""),
        )
    except EnvelopeError:
        raise
    except ValueError as error:
        raise EnvelopeError(f"a header has a wrong value: {error}") from None
    if not 0 < envelope.deadline_s <= MAX_DEADLINE_S:  # NaN is not either
        raise EnvelopeError(f"hr-deadline must be seconds, above 0 and at most {MAX_DEADLINE_S:g}")
    if envelope.start_within_s is not None and not 0 < envelope.start_within_s <= MAX_DEADLINE_S:
        raise EnvelopeError(f"hr-start-within must be seconds, above 0 and at most {MAX_DEADLINE_S:g}")
    if envelope.priority not in PRIORITIES:
        raise EnvelopeError(f"hr-priority must be one of {', '.join(PRIORITIES)}")
    return envelope
