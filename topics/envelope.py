"""The envelope of `inference.requests`: CloudEvents 1.0 in binary mode, ours prefixed `hr-`.

Header names and meanings are a contract with other systems that publish requests. An ingress names a reply partition,
and seals; a direct publisher (docs/publishing.md) signs, and names nothing that is inside of Headrace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec

from schemas.events import PRIORITIES

REQUEST_TYPE = "headrace.inference.request.v1"
INGRESS = "/headrace/ingress/"
"""Begins `ce_source` where an ingress has admitted the request."""
PUBLISHER_PREFIX = "publisher:"
"""Begins what stands in place of a key's id where a direct publisher asked and named no API key."""
CANCEL_TYPE = "headrace.inference.cancel.v1"
"""A publisher's wish to end the request `ce_id`. It stands on the topic of requests, the only one publishers write."""
DEFAULT_DEADLINE_S = 600.0
MAX_PUBLISHED_DEADLINE_S = 1800.0
"""As for requests over HTTP."""
MAX_NAME_CHARS = 200
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
    """`ce_source`: the publisher, e.g. `/headrace/ingress/ingress-1/3f2a9c1e` (`INGRESS`, instance, boot)."""
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
    stream: bool = False
    """`hr-stream`: whether a publisher wants the answer's chunks too."""

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


class Published(msgspec.Struct, frozen=True):
    """What a direct publisher says in the headers of a request or of a wish to cancel one."""

    envelope: Envelope
    """As an ingress would have written it; `key_id` is `publisher:` and the publisher's, until an API key is found."""
    publisher: str
    """`hr-key-id`: which of the app's public keys fits the signature."""
    api_key_id: str
    """`hr-api-key-id`: the API key whose limits and models hold; empty for the app's alone."""
    cancels: bool
    """Whether it is a wish to cancel."""


class HeaderRefused(EnvelopeError):
    """A header of a message whose sender, id and kind can be told is wrong, so that it can be answered."""

    def __init__(self, reason: str, message: Published) -> None:
        super().__init__(reason)
        self.published = message


def _required(found: dict[str, str], name: str) -> str:
    try:
        return found[name]
    except KeyError:
        raise EnvelopeError(f"header {name} is missing") from None


def _texts(headers: Headers) -> dict[str, str]:
    try:
        return {name: value.decode() for name, value in headers if value is not None}
    except UnicodeDecodeError as error:
        raise EnvelopeError(f"a header is not UTF-8: {error}") from None


def _request_id(found: dict[str, str]) -> str:
    request_id = _required(found, "ce_id")
    if len(request_id) != 32 or not all(digit in "0123456789abcdef" for digit in request_id):
        raise EnvelopeError("ce_id is not a UUID as 32 lower-case hex digits")
    return request_id


def parse(headers: Headers) -> Envelope:
    """The envelope that an ingress wrote into a record's headers. Raises `EnvelopeError`."""
    found = _texts(headers)
    kind = _required(found, "ce_type")
    if kind != REQUEST_TYPE:
        raise EnvelopeError(f"ce_type is {kind!r}, expected {REQUEST_TYPE!r}")
    request_id = _request_id(found)
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


_PUBLISHED = frozenset(
    ("ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time", "ce_datacontenttype", "ce_subject",
     "hr-tenant", "hr-key-id", "hr-api-key-id", "hr-deadline", "hr-priority", "hr-stream", "hr-signature")
)  # fmt: skip
"""The headers that a direct publisher may write, of those that begin with `ce_` or `hr-`."""


def parse_published(headers: Headers, *, reply_partition: Callable[[str], int]) -> Published:
    """What a direct publisher's headers say; `reply_partition` tells that of a request id.

    Raises `HeaderRefused` where only a wish in it is wrong, and another `EnvelopeError` where it is not to be told who
    asks for what.
    """
    found = _texts(headers)
    kind = _required(found, "ce_type")
    if kind not in (REQUEST_TYPE, CANCEL_TYPE):
        raise EnvelopeError(f"ce_type is {kind!r}, expected {REQUEST_TYPE!r} or {CANCEL_TYPE!r}")
    request_id, tenant, publisher = _request_id(found), _required(found, "hr-tenant"), _required(found, "hr-key-id")
    api_key_id = found.get("hr-api-key-id", "")
    if any(len(name) > MAX_NAME_CHARS for name in (tenant, publisher, api_key_id)):
        raise EnvelopeError(f"a name has more than {MAX_NAME_CHARS} characters")
    envelope = Envelope(
        request_id=request_id,
        source=found.get("ce_source", "")[:MAX_NAME_CHARS],
        time_ms=0,
        tenant=tenant,
        key_id=PUBLISHER_PREFIX + publisher,
        reply_partition=reply_partition(request_id),
        digest="",
        deadline_s=DEFAULT_DEADLINE_S,
        traceparent=found.get("traceparent"),
    )
    message = Published(envelope, publisher, api_key_id, kind == CANCEL_TYPE)
    try:
        wishes = _wishes(found)
    except ValueError as error:
        raise HeaderRefused(str(error), message) from None
    return msgspec.structs.replace(message, envelope=msgspec.structs.replace(envelope, **wishes))


def envelope_of(headers: Headers) -> Envelope:
    """The envelope in a record's headers, of whichever sender, be it true or not. Raises `EnvelopeError`."""
    if not any(name == "hr-signature" for name, _ in headers):
        return parse(headers)
    try:
        return parse_published(headers, reply_partition=lambda _: 0).envelope
    except HeaderRefused as error:
        return error.published.envelope


def _wishes(found: dict[str, str]) -> dict[str, float | int | str | bool]:
    """What may be wrong in a message that can be answered. Raises `ValueError` with the reason."""
    unknown = sorted(name for name in found if name.startswith(("ce_", "hr-")) and name not in _PUBLISHED)
    if unknown:
        raise ValueError(f"a publisher may not write the header {unknown[0]}")
    if found.get("ce_specversion") != "1.0":
        raise ValueError("ce_specversion must be 1.0")
    for name in ("ce_source", "ce_time"):
        _required(found, name)
    if len(found["ce_source"]) > MAX_NAME_CHARS:
        raise ValueError(f"ce_source has more than {MAX_NAME_CHARS} characters")
    try:
        moment = datetime.fromisoformat(found["ce_time"])
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError("ce_time must be a time of RFC 3339, with its zone")
    try:
        deadline_s = float(found.get("hr-deadline", DEFAULT_DEADLINE_S))
    except ValueError:
        deadline_s = -1.0
    if not 0 < deadline_s <= MAX_PUBLISHED_DEADLINE_S:
        raise ValueError(f"hr-deadline must be seconds, above 0 and at most {MAX_PUBLISHED_DEADLINE_S:g}")
    priority = found.get("hr-priority", "standard")
    if priority not in PRIORITIES:
        raise ValueError(f"hr-priority must be one of {', '.join(PRIORITIES)}")
    stream = found.get("hr-stream", "false")
    if stream not in ("true", "false"):
        raise ValueError("hr-stream must be true or false")
    return {
        "time_ms": int(moment.timestamp() * 1000),
        "deadline_s": deadline_s,
        "priority": priority,
        "stream": stream == "true",
    }
