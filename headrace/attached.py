"""Who is attached to requests that several callers may follow: a sorted set in Redis for each, told by ingresses."""

from __future__ import annotations

import time
from collections.abc import Sequence

from redis.asyncio import Redis

PREFIX = "hr:attached:"
ORIGIN = "origin"
"""Member of a set that stands for the publisher's own caller."""
EXPIRY_S = 12.0
"""An attachment that its ingress did not refresh for this long is gone with that ingress."""


async def followed(redis: Redis, request_ids: Sequence[str]) -> set[str]:
    """Those of the requests that a caller follows who has come back for it, at any ingress. Raises `RedisError`."""
    async with redis.pipeline(transaction=False) as pipe:
        for request_id in request_ids:
            pipe.zrangebyscore(PREFIX + request_id, time.time() - EXPIRY_S, "+inf")
        found = await pipe.execute()
    return {
        request_id
        for request_id, members in zip(request_ids, found, strict=True)
        if any(member not in (ORIGIN, ORIGIN.encode()) for member in members)
    }
