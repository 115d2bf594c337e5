"""The ingress's part of admission: reserve before a request is published, bind once the brokers have it."""

from __future__ import annotations

import asyncio
import time

import structlog

from headrace.asked import Asked
from headrace.errors import LimitExceeded, Unavailable
from headrace.limits.amounts import worst_case
from headrace.limits.limiter import UNLIMITED, Admission, Limiter
from headrace.limits.scopes import scopes_of
from headrace.registry import Snapshot
from schemas.control import Key, Model

log = structlog.get_logger(__name__)

AGAIN_S = (0.02, 0.06, 0.16)
"""Waits before a request is tried again that only others which run are in the way of: who has just had an answer may
ask before its terminal has given its place back."""
SOON_S = 1
"""Retry-After of such a refusal."""


class Admissions:
    """Reserves, and tells Redis later what became of it."""

    def __init__(self, limiter: Limiter, default_output: int) -> None:
        self._limiter = limiter
        self._default_output = default_output
        self._telling: set[asyncio.Task[None]] = set()

    async def admit(
        self, snapshot: Snapshot, key: Key, model: Model, request_id: str, asked: Asked, body_bytes: int
    ) -> Admission:
        """Reserve what a request may come to. Raises a `LimitExceeded`, or `Unavailable`."""
        scopes = scopes_of(key, snapshot.apps.get(key.app), model)
        if not scopes:
            return UNLIMITED
        worst = worst_case(asked, body_bytes, model, self._default_output, at_ms=time.time_ns() // 1_000_000)
        for wait_s in AGAIN_S:
            try:
                return await self._limiter.admit(key.app, request_id, scopes, worst, model.id)
            except LimitExceeded as refused:
                if refused.retry_after_s != SOON_S or refused.type not in ("concurrency", "insufficient_quota"):
                    raise
            await asyncio.sleep(wait_s)
        return await self._limiter.admit(key.app, request_id, scopes, worst, model.id)

    def accepted(self, admission: Admission, tenant: str, request_id: str) -> None:
        """The brokers have it. Should Redis not hear of that, the router says so once more."""
        if admission.verdict is not None:
            task = asyncio.create_task(self._bind(tenant, request_id))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _bind(self, tenant: str, request_id: str) -> None:
        try:
            await self._limiter.bind(tenant, request_id)
        except Unavailable as error:
            log.warning("reservation_not_bound", tenant=tenant, request_id=request_id, error=error.message)

    async def stop(self) -> None:
        """Let what is being told be told."""
        await asyncio.gather(*self._telling, return_exceptions=True)
