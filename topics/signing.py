"""What proves who wrote a request: the signature of a direct publisher, or the seal of an ingress. Pure.

Both are over one canonical form: netstrings (`<length>:<bytes>,`) of a fixed word, the topic, each `ce_*` and `hr-*`
header's name and value, sorted by name, and the SHA-256 of the body in hex. Lengths make it unambiguous, and it needs
no library. docs/publishing.md shows one byte by byte.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from topics.envelope import EnvelopeError, Headers

SIGNATURE = "hr-signature"
"""Header: Ed25519 signature of a direct publisher, base64."""
SEAL = "hr-seal"
"""Header: HMAC-SHA256 of an ingress, base64."""
MIN_SECRET_CHARS = 32

_WORD = b"headrace-signature-1"
_COVERED = ("ce_", "hr-")
_LEFT_OUT = (SIGNATURE, SEAL, "hr-dl-")
"""The proofs themselves, and what is written beside a dead letter."""


def canonical(topic: str, headers: Headers, body_sha256: str) -> bytes:
    """The bytes that are signed or sealed; `body_sha256` in lower-case hex.

    Raises `EnvelopeError` where a covered header has no value or stands twice: readers could differ in what it means.
    """
    covered = [pair for pair in headers if pair[0].startswith(_COVERED) and not pair[0].startswith(_LEFT_OUT)]
    covered.sort()
    parts = [_WORD, topic.encode()]
    last = ""
    for name, value in covered:
        if name == last or value is None:
            raise EnvelopeError(f"header {name} stands twice, or has no value")
        last = name
        parts += (name.encode("utf-8", "surrogateescape"), value)
    parts.append(body_sha256.encode())
    return b"".join([b"%d:%b," % (len(part), part) for part in parts])


def sign(key: Ed25519PrivateKey, form: bytes) -> bytes:
    """The value of the header `hr-signature` for a canonical form."""
    return base64.b64encode(key.sign(form))


def is_signed(public_key: str, form: bytes, signature: bytes) -> bool:
    """Whether a signature of a canonical form was made with the private half of `public_key` (32 bytes, base64)."""
    try:
        raw = base64.b64decode(signature, validate=True)
        Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key)).verify(raw, form)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


class Seals:
    """The secrets that ingresses and those who read their requests share: the first seals, each is accepted."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """Raises `ValueError` where there is none, or one is shorter than `MIN_SECRET_CHARS`."""
        if not secrets or any(len(secret) < MIN_SECRET_CHARS for secret in secrets):
            raise ValueError(f"each secret must have at least {MIN_SECRET_CHARS} characters")
        self._secrets = [secret.encode() for secret in secrets]

    def sealed(self, topic: str, headers: list[tuple[str, bytes]], body_sha256: str) -> list[tuple[str, bytes]]:
        """The headers with their seal. Raises `EnvelopeError` as `canonical` does."""
        form = canonical(topic, headers, body_sha256)
        return [*headers, (SEAL, base64.b64encode(hmac.digest(self._secrets[0], form, "sha256")))]

    def fit(self, form: bytes, seal: bytes) -> bool:
        """Whether a seal of a canonical form was made with one of the secrets; in time that does not tell which."""
        found = False
        for secret in self._secrets:
            found |= hmac.compare_digest(base64.b64encode(hmac.digest(secret, form, "sha256")), seal)
        return found
