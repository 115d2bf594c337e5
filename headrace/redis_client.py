"""The Redis client as every role builds it: answers or fails fast, and reconnects at the first call that can."""

from __future__ import annotations

from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

TIMEOUT_S = 2.0
MAX_CONNECTIONS = 64
"""Calls of one client that are under way at once; further ones wait their turn. Redis itself runs one at a time."""


class Client(Redis):
    """Redis, whose lost connections are `ConnectionError`s whatever the event loop makes of them."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """As the library's. uvloop raises `RuntimeError` for a write to a transport that was closed meanwhile."""
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise RedisConnectionError(f"the connection was lost: {error}") from error


def connect(url: str) -> Redis:
    """A client of the Redis at `url`. It connects with its first call; a broken connection is tried once more at once.

    The library's own retries wait up to 10 s between tries, which would hide from callers that Redis is away; its own
    pool fails the hundred-and-first call at once.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=TIMEOUT_S,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
        health_check_interval=30,
    )
    return Client.from_pool(pool)
