"""The router's part of admission: it confirms what an ingress reserved, and admits what came without one."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import structlog

from headrace.errors import Unavailable
from headrace.limits.amounts import worst_case
from headrace.limits.limiter import ROUTE, Limiter
from headrace.limits.months import month_of
from headrace.limits.scopes import counts_output, scopes_of
from headrace.registry import Snapshot
from processors.router.route import Request
from schemas.control import Key, Model
from topics.outcomes import now_ms

log = structlog.get_logger(__name__)

RETRY_S = 0.25


class Admitted(NamedTuple):
    """A request that goes on."""

    model: Model
    """The one that it was admitted for when it was routed first."""
    cap: int | None
    """Tokens of a choice, where they count."""


class RouterAdmission:
    """Asks the same scripts as the ingress, under the same name of the request: it is charged once."""

    def __init__(self, limiter: Limiter, default_output: int) -> None:
        self._limiter = limiter
        self._default_output = default_output

    async def admit(self, request: Request, key: Key | None, model: Model, snapshot: Snapshot) -> Admitted:
        """Admit a request on a model, for as long as that takes: what was accepted is not refused for Redis's sake.

        Raises a `LimitExceeded`; `Unavailable` once it is too late to route the request.
        """
        tenant, request_id = request.envelope.tenant, request.envelope.request_id
        mine = key if key is not None and key.app == tenant else None
        scopes = scopes_of(mine, snapshot.apps.get(tenant), model)
        if not scopes:
            return Admitted(model, None)
        worst = worst_case(request.asked, len(request.value), model, self._default_output, at_ms=request.accepted_ms)
        month = month_of(request.accepted_ms)
        while True:
            try:
                found = await self._limiter.admit(tenant, request_id, scopes, worst, model.id, mode=ROUTE, month=month)
                break
            except Unavailable as error:
                if now_ms() > request.late_ms:
                    raise
                log.warning("limits_unavailable", request_id=request_id, error=error.message)
                await asyncio.sleep(RETRY_S)
        cap = worst.completion
        if found.verdict is not None:
            model, cap = snapshot.models.get(found.verdict.model, model), found.verdict.completion
        return Admitted(model, cap or None if counts_output(scopes) else None)
