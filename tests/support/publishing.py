"""Requests as they may stand on `inference.requests`: sealed by an ingress, or signed by a direct publisher."""

from __future__ import annotations

import base64
import hashlib
import time
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from schemas.ids import new_published_id
from topics.catalogue import REQUESTS
from topics.envelope import REQUEST_TYPE, Envelope
from topics.signing import SIGNATURE, Seals, canonical, sign

SEALS = Seals(["the secret of the tests' ingresses"])
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = base64.b64encode(KEY.public_key().public_bytes_raw()).decode()

Headers = list[tuple[str, bytes]]


def sealed(envelope: Envelope, body: bytes, seals: Seals = SEALS) -> Headers:
    """The headers of an ingress's request."""
    return seals.sealed(REQUESTS.name, envelope.headers(), hashlib.sha256(body).hexdigest())


def signed(headers: dict[str, str], body: bytes, key: Ed25519PrivateKey = KEY) -> Headers:
    """The same headers, and the signature of a publisher."""
    pairs = [(name, value.encode()) for name, value in headers.items()]
    form = canonical(REQUESTS.name, pairs, hashlib.sha256(body).hexdigest())
    return [*pairs, (SIGNATURE, sign(key, form))]


def publisher_headers(tenant: str, publisher: str = "p1", **more: str | None) -> dict[str, str]:
    """What a publisher says, unsigned; names in `more` have `_` for `-` but after `ce`; None leaves one out."""
    now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    found: dict[str, str | None] = {
        "ce_specversion": "1.0",
        "ce_id": new_published_id(tenant),
        "ce_type": REQUEST_TYPE,
        "ce_source": "/tests",
        "ce_time": now,
        "hr-tenant": tenant,
        "hr-key-id": publisher,
    }
    found |= {name if name.startswith("ce_") else name.replace("_", "-"): value for name, value in more.items()}
    return {name: value for name, value in found.items() if value is not None}


class Sample:
    """A record that nobody wrote to Kafka."""

    topic, partition, offset = REQUESTS.name, 0, 0

    def __init__(self, headers: Headers, value: bytes, *, key: bytes | None = None, timestamp: int = 0) -> None:
        self.headers, self.value, self.timestamp = headers, value, timestamp
        self.key = key if key is not None else dict(headers).get("ce_id")
