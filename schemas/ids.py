"""Identifiers of requests: UUIDv7 for most, a hash for idempotent ones, and the public id that callers see.

The public id `chatcmpl-…` holds the request id, the reply partition and the time, so that any ingress can resume
a stream, or look a request up, without asking a database first.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from typing import NamedTuple

import uuid_utils

_PUBLIC = re.compile(r"chatcmpl-([0-9a-f]{32})([0-9a-f]{4})([0-9a-f]{12})")
_HEX = re.compile(r"[0-9a-f]{32}")


class PublicId(NamedTuple):
    """What a public id holds."""

    request_id: str
    reply_partition: int
    created_ms: int

    def __str__(self) -> str:
        return f"chatcmpl-{self.request_id}{self.reply_partition:04x}{self.created_ms:012x}"

    @classmethod
    def parse(cls, text: str) -> PublicId | None:
        """The parts of a public id, or None when `text` is not one."""
        found = _PUBLIC.fullmatch(text)
        if found is None:
            return None
        return cls(found[1], int(found[2], 16), int(found[3], 16))


def new_request_id() -> str:
    """A new request id: a UUIDv7 (RFC 9562) as 32 hex digits, sortable by time."""
    return uuid_utils.uuid7().hex


def idempotent_request_id(tenant: str, key: str) -> str:
    """The request id of an Idempotency-Key: a UUIDv8 made of SHA-256(tenant, key), the same on every ingress."""
    digest = bytearray(hashlib.sha256(f"{tenant}\0{key}".encode()).digest()[:16])
    digest[6] = (digest[6] & 0x0F) | 0x80
    digest[8] = (digest[8] & 0x3F) | 0x80
    return digest.hex()


def is_idempotent(request_id: str) -> bool:
    """Whether a request id was derived from an Idempotency-Key (UUID version 8)."""
    return request_id[12] == "8"


def tenant_tag(tenant: str) -> str:
    """The last 12 hex digits of every id that a tenant's publishers give: they cannot give one of another tenant's."""
    return hashlib.sha256(f"headrace-tenant:{tenant}".encode()).hexdigest()[:12]


def new_published_id(tenant: str) -> str:
    """A new request id of a direct publisher: a UUIDv7 whose last 48 bits are its tenant's tag.

    The 26 bits before these are random: the library's own ids of one millisecond differ in their last bits only.
    """
    random = secrets.randbits(26)
    return f"{new_request_id()[:12]}7{random >> 14:03x}{0x8000 | random & 0x3FFF:04x}{tenant_tag(tenant)}"


def is_published_id(request_id: str, tenant: str) -> bool:
    """Whether a publisher of this tenant may give this id."""
    return request_id[12] == "7" and request_id[16] in "89ab" and request_id[20:] == tenant_tag(tenant)


def normalise_request_id(text: str) -> str | None:
    """The 32 hex digits of a request id given as UUID, hex or public id; None when it is none of them."""
    public = PublicId.parse(text)
    if public is not None:
        return public.request_id
    bare = text.replace("-", "").lower()
    return bare if _HEX.fullmatch(bare) else None


def created_ms(request_id: str) -> int | None:
    """Unix ms at which a UUIDv7 request id was made; None for an idempotent one, whose id tells no time."""
    return int(request_id[:12], 16) if request_id[12] == "7" else None


def usage_id(tenant: str, request_id: str) -> str:
    """The deterministic id of a request's usage event (UUIDv5)."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"headrace:usage:{tenant}:{request_id}").hex
