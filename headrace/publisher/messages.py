"""The messages of a direct publisher: headers and signature of a request, and of the wish to cancel one. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from topics.catalogue import REQUESTS
from topics.envelope import CANCEL_TYPE, REQUEST_TYPE
from topics.signing import SIGNATURE, canonical, sign


@dataclass(frozen=True, slots=True)
class Identity:
    """Who publishes."""

    app: str
    key_id: str
    """Which of the app's publishers it is, by the name of its public key."""
    private_key: Ed25519PrivateKey
    api_key_id: str = ""
    """Id of the API key whose limits and models hold; empty for the app's alone."""
    source: str = "/headrace/publisher"


def signed_headers(
    identity: Identity,
    request_id: str,
    body: bytes,
    *,
    now_ms: int,
    wishes: Mapping[str, str] | None = None,
    kind: str = REQUEST_TYPE,
) -> list[tuple[str, bytes]]:
    """The headers of a message under `request_id`; `wishes` are `hr-deadline`, `hr-priority` and `hr-stream`."""
    stamp = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    said = {
        "ce_specversion": "1.0",
        "ce_id": request_id,
        "ce_type": kind,
        "ce_source": identity.source,
        "ce_time": stamp,
        "content-type": "application/json",
        "hr-tenant": identity.app,
        "hr-key-id": identity.key_id,
    }
    if identity.api_key_id:
        said["hr-api-key-id"] = identity.api_key_id
    headers = [(name, value.encode()) for name, value in (said | dict(wishes or {})).items()]
    form = canonical(REQUESTS.name, headers, hashlib.sha256(body).hexdigest())
    return [*headers, (SIGNATURE, sign(identity.private_key, form))]


def cancel_headers(identity: Identity, request_id: str, *, now_ms: int) -> list[tuple[str, bytes]]:
    """The headers of the wish to cancel a request; its body is empty."""
    return signed_headers(identity, request_id, b"", now_ms=now_ms, kind=CANCEL_TYPE)
