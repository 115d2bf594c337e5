"""The client of the scripts: what ingress, router and metering ask of the limits in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headrace import metrics
from headrace.errors import Unavailable
from headrace.limits import lua, verdict
from headrace.limits.amounts import PICO, Worst, pico
from headrace.limits.scopes import Scope
from headrace.limits.standing import Standing, Used, standing
from headrace.limits.verdict import Verdict
from headrace.projection import text
from schemas.ids import is_idempotent

log = structlog.get_logger(__name__)
T = TypeVar("T")

TIMEOUT_S = 2.0
KEPT_MS = 900_000
"""How long it is known that a request has ended: no router reads its record again after more than 10 minutes."""
KEPT_IDEMPOTENT_MS = 86_400_000
"""The same where a caller may send it again."""

RESERVE, ROUTE, RESTORE, RESTORE_ACCEPTED = "reserve", "route", "restore", "restore accepted"


class Admission(NamedTuple):
    """A request that may run."""

    verdict: Verdict | None
    """None where its limits could not be asked and the configuration lets it through."""
    headers: Mapping[str, str]
    """`x-ratelimit-*` of its answer."""


UNLIMITED = Admission(None, {})


class Settled(NamedTuple):
    """One deciding terminal, as it is charged."""

    offset: int
    ref: str
    tokens: int
    units: int
    """Money, in units of 10⁻¹²."""
    month: str
    payers: tuple[str, ...]
    """Names of the scopes that it is charged to."""
    kept_ms: int


class Open(NamedTuple):
    """Reservations that are not given back yet."""

    pending: int
    bound: int
    oldest: list[tuple[str, int]]
    """(ref, µs at which it was bound)."""


class State(NamedTuple):
    """How complete the limits in Redis are."""

    whole: bool
    now_us: int
    offsets: dict[int, int]
    """Partition of `inference.log` -> next offset to settle."""


def ref_of(tenant: str, request_id: str) -> str:
    """How Redis knows a request."""
    return f"{tenant}:{request_id}"


def kept_ms(request_id: str) -> int:
    """How long it is remembered that a request has ended."""
    return KEPT_IDEMPOTENT_MS if is_idempotent(request_id) else KEPT_MS


class Limiter:
    """Admits, binds and settles. What asks Redis in vain raises `Unavailable`."""

    def __init__(self, redis: Redis, *, allow_on_outage: bool = False, pending_us: int = lua.PENDING_US) -> None:
        """`allow_on_outage` lets requests through whose limits cannot be asked; their terminals are charged later."""
        self._allow = allow_on_outage
        self._pending_us = pending_us
        self._admit = redis.register_script(lua.ADMIT)
        self._bind = redis.register_script(lua.BIND)
        self._cancel = redis.register_script(lua.CANCEL)
        self._settle = redis.register_script(lua.SETTLE)
        self._reap = redis.register_script(lua.REAP)
        self._open = redis.register_script(lua.OPEN)
        self._standing = redis.register_script(lua.STANDING)
        self._state = redis.register_script(lua.STATE)
        self._invalidate = redis.register_script(lua.INVALIDATE)

    async def admit(
        self,
        tenant: str,
        request_id: str,
        scopes: Sequence[Scope],
        worst: Worst,
        model: str,
        *,
        mode: str = RESERVE,
        month: str = "",
    ) -> Admission:
        """Admit a request against all its scopes at once; asks nothing where there is none.

        `month` is that of its acceptance where that is known. Raises a `LimitExceeded`, or `Unavailable`.
        """
        if not scopes:
            return UNLIMITED
        arguments = admit_arguments(
            tenant, request_id, scopes, worst, model, mode=mode, month=month, pending_us=self._pending_us
        )
        try:
            told = verdict.read(await _asked(self._admit(args=arguments)))
            if told.kind == "incomplete":
                raise Unavailable("Limits cannot be checked yet: Redis is being filled. Try again in a moment.")
        except Unavailable as error:
            if not self._allow:
                raise
            metrics.LIMITS_BYPASSED.inc()
            log.warning("limits_bypassed", tenant=tenant, request_id=request_id, error=error.message)
            return UNLIMITED
        shown = verdict.headers(scopes, told.windows)
        if told.refusal is not None:
            refused = verdict.refused(told, told.refusal, worst.tokens, worst.units)
            refused.headers = shown
            scope = told.refusal.scope.partition(":")[0]
            metrics.LIMIT_REFUSALS.labels(limit=told.refusal.limit, scope=scope).inc()
            raise refused
        return Admission(told, shown)

    async def bind(self, tenant: str, request_id: str) -> None:
        """The brokers have the request: only its terminal gives its reservation back from here on."""
        await _asked(self._bind(args=[ref_of(tenant, request_id)]))

    async def cancel(self, tenant: str, request_id: str) -> None:
        """It was not published, and never will be."""
        await _asked(self._cancel(args=[ref_of(tenant, request_id)]))

    async def settle(self, partition: int, first: int, next_offset: int, items: Sequence[Settled]) -> int | None:
        """Charge terminals of one partition of the log, of which `first` to `next_offset` was read.

        Returns the offset to go on from, which is lower than `next_offset` when something is missing before `first`;
        None while Redis is not complete.
        """
        arguments: list[str | int] = [partition, first, next_offset]
        for item in items:
            whole, rest = divmod(item.units, PICO)
            payers = "\n".join(item.payers)
            arguments += [item.offset, item.ref, item.tokens, whole, rest, item.month, payers, item.kept_ms]
        status, offset, given_back = await _asked(self._settle(args=arguments))
        if text(status) == "incomplete":
            return None
        metrics.RESERVATIONS_SETTLED.inc(int(given_back))
        return int(offset)

    async def reap(self, ref: str) -> bool:
        """Give back the reservation of a request that has its terminal; whether there was one."""
        return bool(await _asked(self._reap(args=[ref, kept_ms(ref.rpartition(":")[2])])))

    async def open(self, *, bound_us: int, limit: int) -> Open:
        """Reservations that are not given back, and those bound for at least `bound_us`."""
        pending, bound, oldest = await _asked(self._open(args=[bound_us, limit]))
        pairs = zip(oldest[::2], oldest[1::2], strict=True)
        return Open(int(pending), int(bound), [(text(ref), int(float(at))) for ref, at in pairs])

    async def state(self) -> State:
        """How complete the limits are."""
        whole, now_us, pairs = await _asked(self._state())
        return State(bool(whole), int(now_us), {int(a): int(b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)})

    async def invalidate(self) -> None:
        """Let all be made anew from Kafka."""
        await _asked(self._invalidate())

    async def standing(self, scopes: Sequence[Scope]) -> list[Standing]:
        """How scopes stand to their limits now."""
        told = await _asked(self._standing(args=[scope.name for scope in scopes]))
        return [
            standing(
                scope,
                Used(
                    int(used[0]), int(used[1]), int(used[2]),
                    verdict.units_of(text(used[3])), verdict.units_of(text(used[4])),
                ),
            )
            for scope, used in zip(scopes, told[2:], strict=True)
        ]  # fmt: skip


def admit_arguments(
    tenant: str,
    request_id: str,
    scopes: Sequence[Scope],
    worst: Worst,
    model: str,
    *,
    mode: str,
    month: str = "",
    accepted_us: int = 0,
    pending_us: int = lua.PENDING_US,
) -> list[str | int]:
    """The arguments of `lua.ADMIT`."""
    whole, rest = divmod(worst.units, PICO)
    arguments: list[str | int] = [
        ref_of(tenant, request_id), mode, month, worst.tokens, whole, rest, worst.completion, model,
        pending_us, accepted_us, kept_ms(request_id),
    ]  # fmt: skip
    for scope in scopes:
        budget = divmod(pico(scope.budget), PICO) if scope.budget is not None else ("", "")
        limits = ("" if limit is None else limit for limit in (scope.rpm, scope.tpm, scope.concurrency))
        arguments += [scope.name, *limits, *budget]
    return arguments


async def _asked(asking: Awaitable[Any]) -> Any:
    """What a script answers. Raises `Unavailable`."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await asking
    except (RedisError, OSError, TimeoutError) as error:
        log.warning("limits_unanswered", error=repr(error))
        raise Unavailable("Limits cannot be checked now (Redis does not answer). Try again in a moment.") from error
