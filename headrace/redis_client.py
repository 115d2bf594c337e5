"""The Redis client as every role builds it: answers or fails fast, and reconnects at the first call that can."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

TIMEOUT_S = 2.0


def connect(url: str) -> Redis:
    """A client of the Redis at `url`. It connects with its first call; a broken connection is tried once more at once.

    The library's own retries wait up to 10 s between tries, which would hide from callers that Redis is away.
    """
    return Redis.from_url(
        url,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
        health_check_interval=30,
    )
