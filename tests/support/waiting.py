"""Waiting for what happens in other processes: poll with a deadline, and say what was awaited when it did not come."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.05


async def until(
    look: Callable[[], T | None] | Callable[[], Awaitable[T | None]], what: str, within_s: float = 20.0
) -> T:
    """The first truthy answer of `look`. Raises `AssertionError` with the last answer after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while True:
        found = look()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found  # type: ignore[return-value]
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: {what}; last seen: {found!r}")
        await asyncio.sleep(POLL_S)
