"""Who is attached to a request, over all ingresses: when the last caller leaves, the request is cancelled."""

from __future__ import annotations

import asyncio
import time

import msgspec
import structlog
from redis import asyncio as redis
from redis.exceptions import RedisError

from headrace import metrics
from headrace.attached import EXPIRY_S, ORIGIN, PREFIX
from schemas.events import Cancellation
from topics.catalogue import CANCELLATIONS
from topics.clients import Producer

log = structlog.get_logger(__name__)

REFRESH_S = 5.0


class Attachments:
    """Attachments of this ingress, told to the others through Redis for requests that others can attach to."""

    def __init__(self, client: redis.Redis, producer: Producer, instance: str) -> None:
        self._redis = client
        self._producer = producer
        self._instance = instance
        self._local: dict[str, int] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._refresher: asyncio.Task[None] | None = None

    async def attach(self, request_id: str, *, origin_listed: bool) -> None:
        """A caller is attached to a request that others may attach to.

        A publisher's own caller is not listed when nobody is expected to come; the first one who comes lists it.
        """
        self._local[request_id] = self._local.get(request_id, 0) + 1
        if (leaving := self._leaving.pop(request_id, None)) is not None:
            leaving.cancel()
        if self._refresher is None:
            self._refresher = asyncio.create_task(self._refresh())
        await self._tell(request_id)
        if not origin_listed:
            await self._list_origin(request_id, float("inf"), only_new=True)

    async def origin_left(self, request_id: str) -> None:
        """The publisher's own caller, which was not listed from the start, left before the end."""
        await self._list_origin(request_id, 0, only_new=False)

    async def _list_origin(self, request_id: str, until: float, *, only_new: bool) -> None:
        try:
            await self._redis.zadd(PREFIX + request_id, {ORIGIN: until}, nx=only_new, xx=not only_new)
        except (RedisError, OSError) as error:
            log.warning("attachment_not_told", request_id=request_id, error=repr(error))

    async def detach(self, request_id: str) -> None:
        """A caller went, whether its answer was complete or not."""
        left = self._local.get(request_id, 0) - 1
        if left > 0:
            self._local[request_id] = left
            return
        self._local.pop(request_id, None)
        try:
            await self._redis.zrem(PREFIX + request_id, self._instance)
        except (RedisError, OSError) as error:
            log.warning("detach_not_told", request_id=request_id, error=repr(error))

    def left(self, request_id: str, tenant: str, grace_s: float, *, reason: str = "The caller left.") -> None:
        """A caller left before the end: cancel after `grace_s`, unless somebody is attached by then."""
        metrics.CALLERS_LEFT.inc()
        if request_id in self._leaving or request_id in self._local:
            return
        self._leaving[request_id] = asyncio.create_task(self._cancel_later(request_id, tenant, grace_s, reason))

    async def _cancel_later(self, request_id: str, tenant: str, grace_s: float, reason: str) -> None:
        try:
            if grace_s > 0:
                await asyncio.sleep(grace_s)
            if not await self._attached_elsewhere(request_id):
                await self.cancel(request_id, tenant, reason)
        finally:
            if self._leaving.get(request_id) is asyncio.current_task():
                del self._leaving[request_id]

    def revoked(self, request_id: str, tenant: str, reason: str) -> None:
        """Who asked for a request may not have it any more: cancel it, whoever else is attached."""
        if (leaving := self._leaving.pop(request_id, None)) is not None:
            leaving.cancel()
        self._leaving[request_id] = asyncio.create_task(self._cancel_now(request_id, tenant, reason))

    async def _cancel_now(self, request_id: str, tenant: str, reason: str) -> None:
        try:
            await self.cancel(request_id, tenant, reason)
        finally:
            if self._leaving.get(request_id) is asyncio.current_task():
                del self._leaving[request_id]

    async def cancel(self, request_id: str, tenant: str, reason: str) -> None:
        """Ask for the end of a request."""
        wish = Cancellation(request_id, tenant, reason, time.time_ns() // 1_000_000, by=self._instance)
        await self._producer.send(CANCELLATIONS.name, msgspec.json.encode(wish), key=request_id)
        log.info("cancellation_asked", request_id=request_id, reason=reason)

    async def _attached_elsewhere(self, request_id: str) -> bool:
        try:
            alive = await self._redis.zcount(PREFIX + request_id, time.time() - EXPIRY_S, "+inf")
        except (RedisError, OSError):
            # Rather a generation too long than one cut off under a caller that is still there.
            log.warning("attachments_unknown", request_id=request_id)
            return True
        return int(alive) > 0

    async def _tell(self, request_id: str) -> None:
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.zadd(PREFIX + request_id, {self._instance: time.time()})
                pipe.expire(PREFIX + request_id, 900)
                await pipe.execute()
        except (RedisError, OSError) as error:
            log.warning("attachment_not_told", request_id=request_id, error=repr(error))

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            for request_id in list(self._local):
                await self._tell(request_id)

    async def stop(self) -> None:
        """Stop telling. What callers have left, the scheduler ends: it sees that this process is gone."""
        if self._refresher is not None:
            self._refresher.cancel()
        for task in list(self._leaving.values()):
            task.cancel()
