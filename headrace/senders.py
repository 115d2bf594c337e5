"""Who sent a record of `inference.requests`: an ingress, by its seal, or a direct publisher, by its signature. Pure.

Whoever may write to the topic can write anything, so nothing in a record counts before it is known whose it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import msgspec

from schemas.control import App
from schemas.ids import is_published_id
from topics.catalogue import REQUESTS, published_partition
from topics.envelope import Envelope, EnvelopeError, HeaderRefused, Headers, Published, parse, parse_published
from topics.signing import SEAL, SIGNATURE, Seals, canonical, is_signed


class NotAuthentic(EnvelopeError):
    """Nobody that we know wrote the record as it is: it counts for nothing, and nobody is answered."""


class Sent(NamedTuple):
    """A record whose sender is known."""

    envelope: Envelope
    published: Published | None
    """What a direct publisher said; None for a request of an ingress, which has admitted it."""
    refusal: str = ""
    """What is wrong with a publisher's headers; empty where all is well."""
    foreign: bool = False
    """Whether the id is none that a publisher of its app may give: it may be another request's."""


class Message(Protocol):
    """A record, or a dead letter of one, as far as its sender is told by it."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


def sender(record: Message, seals: Seals, apps: Mapping[str, App]) -> Sent:
    """The envelope of a record that is as its sender wrote it, with the digest of its body.

    Raises `NotAuthentic`, or another `EnvelopeError` where an ingress's own envelope cannot be read.
    """
    headers, body = record.headers, record.value or b""
    digest = hashlib.sha256(body).hexdigest()
    proofs = [(name, value) for name, value in headers if name in (SEAL, SIGNATURE)]
    if len(proofs) != 1 or proofs[0][1] is None:
        raise NotAuthentic(f"a request bears one of {SEAL} and {SIGNATURE}, once")
    [(kind, proof)] = proofs
    try:
        form = canonical(REQUESTS.name, headers, digest)
        if kind == SEAL:
            if not seals.fit(form, proof):
                raise NotAuthentic("the seal is of no ingress, or the message was changed")
            return _sealed(record, digest)
        return _signed(record, digest, form, proof, apps)
    except NotAuthentic:
        raise
    except EnvelopeError as error:
        raise NotAuthentic(str(error)) from None


def _sealed(record: Message, digest: str) -> Sent:
    envelope = parse(record.headers)
    return Sent(msgspec.structs.replace(envelope, digest=digest), None)


def _signed(record: Message, digest: str, form: bytes, signature: bytes, apps: Mapping[str, App]) -> Sent:
    refusal = ""
    try:
        message = parse_published(record.headers, reply_partition=published_partition)
    except HeaderRefused as error:
        message, refusal = error.published, str(error)
    envelope = message.envelope
    app = apps.get(envelope.tenant)
    public_key = app.publishers.get(message.publisher) if app is not None else None
    if public_key is None or not is_signed(public_key, form, signature):
        raise NotAuthentic("the signature is of no publisher of that app, or the message was changed")
    if record.key != envelope.request_id.encode():
        raise NotAuthentic("the record's key is not its ce_id")
    envelope = msgspec.structs.replace(envelope, digest=digest)
    message = msgspec.structs.replace(message, envelope=envelope)
    foreign = not message.cancels and not is_published_id(envelope.request_id, envelope.tenant)
    if foreign:
        refusal = (
            "ce_id must be a UUID of version 7 that ends with the first 12 digits of the SHA-256 of 'headrace-tenant:' "
            "and the value of hr-tenant"
        )
    return Sent(envelope, message, refusal, foreign)
