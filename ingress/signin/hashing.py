"""Hashing passwords beside the event loop: a few at a time, since each takes 64 MiB and a core for 50 ms."""

from __future__ import annotations

import asyncio

from headrace import passwords
from headrace.errors import InvalidRequest

_AT_ONCE = asyncio.Semaphore(4)


async def hashed(password: str, *, field: str) -> str:
    """What is filed of a password. Raises `InvalidRequest`, naming the field of the body, for one that may not be."""
    async with _AT_ONCE:
        try:
            return await asyncio.to_thread(passwords.hashed, password)
        except passwords.WeakPassword as weak:
            raise InvalidRequest(f"{field}: {weak}.", param=field) from None


async def is_right(password: str, filed: str) -> bool:
    """Whether this is the password whose hash was filed; takes as long where none was (`filed` is empty)."""
    async with _AT_ONCE:
        return await asyncio.to_thread(passwords.is_right, password, filed)
