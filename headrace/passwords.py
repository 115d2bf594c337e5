"""Passwords: what one must be like, and their Argon2id hashes."""

from __future__ import annotations

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

MIN_CHARS, MAX_BYTES = 8, 1024

_hasher = PasswordHasher()
"""The library's parameters: RFC 9106's for machines with little memory (64 MiB, 3 passes, about 50 ms)."""
_NOBODYS = f"$argon2id$v=19$m={_hasher.memory_cost},t={_hasher.time_cost},p={_hasher.parallelism}${'A' * 22}${'A' * 43}"
"""A hash of no password, to compare with where none is filed: written, not computed, as most processes never ask."""


class WeakPassword(ValueError):
    """The password is too short or too long; the message says so and never shows it."""


def check(password: str) -> str:
    """The password, if it may be one. Raises `WeakPassword`."""
    if len(password) < MIN_CHARS:
        raise WeakPassword(f"a password has at least {MIN_CHARS} characters")
    if len(password.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise WeakPassword(f"a password has at most {MAX_BYTES} bytes")
    return password


def hashed(password: str) -> str:
    """What is filed of a password. Raises `WeakPassword`."""
    return _hasher.hash(check(password).encode("utf-8", "surrogatepass"))


def is_right(password: str, filed: str) -> bool:
    """Whether this is the password whose hash was filed; takes as long where none was (`filed` is empty)."""
    try:
        good = _hasher.verify(filed or _NOBODYS, password.encode("utf-8", "surrogatepass"))
    except (VerificationError, InvalidHashError):
        return False
    return good and bool(filed)
