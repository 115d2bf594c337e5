"""Reservations of Idempotency-Keys: who published the request first, and where its answer is.

Redis remembers for a day. Should it forget, the request id is the same all the same (a hash of tenant and key), and
the scheduler tells a duplicate: one generation, one usage, whatever Redis holds.
"""

from __future__ import annotations

import time

import msgspec
from redis import asyncio as redis
from redis.exceptions import RedisError

from headrace.errors import IdempotencyConflict, InvalidRequest, Unavailable

PREFIX = "hr:idem:"
KEPT_S = 86_400
PENDING, ACCEPTED = "pending", "accepted"
PENDING_S = 10.0
"""A reservation whose publisher did not confirm it within this time may be published again, under the same id."""
MAX_KEY_CHARS = 255


class Reservation(msgspec.Struct):
    """What Redis holds of a key."""

    digest: str
    reply_partition: int
    created_ms: int
    state: str = PENDING
    """`pending` until the brokers acknowledged the request, then `accepted`."""


class Reservations:
    """Idempotency-Keys over Redis. Every method raises `Unavailable` when Redis is away."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    @staticmethod
    def check_key(key: str) -> str:
        """The key, if it can be one. Raises `InvalidRequest`."""
        if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isprintable():
            raise InvalidRequest(f"Idempotency-Key must be 1 to {MAX_KEY_CHARS} printable characters.")
        return key

    async def reserve(self, tenant: str, request_id: str, digest: str, reply_partition: int) -> Reservation | None:
        """Claim the key. None: it is ours to publish. Otherwise who has it, and the caller attaches there.

        Raises `IdempotencyConflict` when the key was used with another body.
        """
        name = f"{PREFIX}{tenant}:{request_id}"
        now = time.time_ns() // 1_000_000
        mine = msgspec.json.encode(Reservation(digest, reply_partition, now))
        try:
            if await self._redis.set(name, mine, nx=True, ex=KEPT_S):
                return None
            held = await self._redis.get(name)
            if held is None:
                return None
            found = msgspec.json.decode(held, type=Reservation)
            if found.digest != digest:
                raise IdempotencyConflict(
                    "This Idempotency-Key was used with another body within the last 24 hours; use a new key."
                )
            if found.state == PENDING and now - found.created_ms > PENDING_S * 1000:
                # Its ingress died before the brokers had it, or just after: the same id makes both cases right.
                await self._redis.set(name, mine, ex=KEPT_S)
                return None
        except (RedisError, OSError) as error:
            raise Unavailable("Idempotency-Keys cannot be checked now (Redis does not answer).") from error
        return found

    async def confirm(self, tenant: str, request_id: str, digest: str, reply_partition: int, created_ms: int) -> None:
        """The brokers have it. A failure is harmless: the same id would be published again."""
        record = msgspec.json.encode(Reservation(digest, reply_partition, created_ms, ACCEPTED))
        try:
            await self._redis.set(f"{PREFIX}{tenant}:{request_id}", record, ex=KEPT_S)
        except (RedisError, OSError):
            return

    async def release(self, tenant: str, request_id: str) -> None:
        """Nothing was published: the key is free again."""
        try:
            await self._redis.delete(f"{PREFIX}{tenant}:{request_id}")
        except (RedisError, OSError):
            return
