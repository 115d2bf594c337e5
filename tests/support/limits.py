"""Limits on a real Valkey whose clock stands where a test puts it, and a model of them in plain Python."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from redis.asyncio import Redis

from headrace.errors import LimitExceeded
from headrace.limits import lua
from headrace.limits.amounts import Worst
from headrace.limits.limiter import RESERVE, Admission, Limiter, Settled, kept_ms, ref_of
from headrace.limits.months import month_of
from headrace.limits.scopes import Scope
from headrace.redis_client import connect
from tests.support.valkey import Valkey

UNIT = 10**12
WINDOW_US = 60_000_000
START_US = 1_767_225_600_000_000 + 1
"""Just after the first moment of January 2026."""

_CLOCK = "local clock = redis.call('TIME')"
_TEST_CLOCK = (
    "local told = tonumber(redis.call('GET', 'test:now') or '0')\n"
    "local clock = {math.floor(told / 1000000), told % 1000000}"
)


def by_the_tests_clock(script: str) -> str:
    """A script that reads the clock of `Clocked.at`."""
    return script.replace(_CLOCK, _TEST_CLOCK)


class Clocked(Limiter):
    """A limiter whose scripts read a clock that the test sets; all else is as it is."""

    def __init__(self, redis: Redis, **options: object) -> None:
        super().__init__(redis, **options)  # type: ignore[arg-type]
        self.redis = redis
        for name, script in vars(self).items():
            if name.startswith("_") and hasattr(script, "script"):
                assert name == "_invalidate" or _CLOCK in script.script, f"{name} does not read the server's clock"
                setattr(self, name, redis.register_script(by_the_tests_clock(script.script)))

    async def at(self, now_us: int) -> None:
        """Put the clock there."""
        await self.redis.set("test:now", now_us)

    async def take(
        self,
        number: int | str,
        *scopes: Scope,
        tokens: int = 1,
        units: int = 0,
        mode: str = RESERVE,
        model: str = "m",
        month: str = "",
        bound: bool = True,
    ) -> Admission | LimitExceeded:
        """The admission of request `number`, which the brokers then take if `bound`, or why it was refused."""
        worst = Worst(tokens, units, tokens)
        try:
            found = await self.admit("t", rid(number), scopes, worst, model, mode=mode, month=month)
        except LimitExceeded as refused:
            return refused
        if bound:
            await self.bind("t", rid(number))
        return found

    async def end(
        self,
        number: int | str,
        offset: int,
        payers: Sequence[str] = (),
        *,
        tokens: int = 1,
        units: int = 0,
        month: str = "202601",
    ) -> int | None:
        """Settle request `number` by a terminal at `offset` of partition 0."""
        item = Settled(offset, ref_of("t", rid(number)), tokens, units, month, tuple(payers), kept_ms(rid(number)))
        return await self.settle(0, offset, offset + 1, [item])

    async def used(self, scope: Scope) -> tuple[int, int, int, int, int]:
        """Requests, tokens, open, spent and held of a scope."""
        now = await self.standing([scope])
        found = now[0]
        paid = int(found.spent * UNIT)
        return (
            int(found.rate_limit_rpm.used),
            int(found.rate_limit_tpm.used),
            int(found.concurrency_limit.used),
            paid,
            int(found.monthly_budget.used * UNIT) - paid,
        )


def rid(number: int | str) -> str:
    """The id of a request."""
    return number if isinstance(number, str) else f"{number:012x}7{0:019x}"


async def whole(redis: Redis) -> None:
    """Say that what the server holds is complete."""
    await redis.register_script(lua.FLIP)(args=["", "197001", 0])


@asynccontextmanager
async def limiting(home: Path, **options: object) -> AsyncIterator[Clocked]:
    """A limiter on a server of its own."""
    server = Valkey(home)
    server.start()
    redis = connect(server.url)
    try:
        await server.answer(redis)
        await whole(redis)
        made = Clocked(redis, **options)
        await made.at(START_US)
        yield made
    finally:
        await redis.aclose()
        server.kill()


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass
class Reservation:
    """A request that was admitted."""

    scopes: tuple[Scope, ...]
    at: int
    tokens: int
    units: int
    month: str
    pending_until: int | None
    """None once it is bound."""


@dataclass
class Plain:
    """What limits mean, written down once more and slowly: lists that are walked, nothing kept as a sum."""

    now: int = START_US
    open: dict[str, Reservation] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    window: list[tuple[str, str, int, int]] = field(default_factory=list)
    """(scope, request, when, tokens)."""
    spent: dict[tuple[str, str], int] = field(default_factory=dict)

    def sweep(self) -> None:
        for name, held in list(self.open.items()):
            if held.pending_until is not None and held.pending_until <= self.now:
                self.drop(name)

    def drop(self, name: str) -> None:
        del self.open[name]
        self.window = [entry for entry in self.window if entry[1] != name]

    def used(self, scope: Scope) -> tuple[int, int, int, int, int]:
        self.sweep()
        inside = [entry for entry in self.window if entry[0] == scope.name and entry[2] > self.now - WINDOW_US]
        month = month_of(self.now // 1000)
        mine = [held for held in self.open.values() if scope.name in {one.name for one in held.scopes}]
        return (
            len(inside),
            sum(entry[3] for entry in inside),
            len(mine),
            self.spent.get((month, scope.name), 0),
            sum(held.units for held in mine if held.month == month),
        )

    def admit(self, name: str, scopes: tuple[Scope, ...], tokens: int, units: int) -> bool:
        self.sweep()
        if name in self.ended:
            return True
        if (held := self.open.get(name)) is not None:
            if held.pending_until is not None:
                held.pending_until = self.now + lua.PENDING_US
            return True
        for scope in scopes:
            requests, used, running, spent, reserved = self.used(scope)
            if (
                (scope.rpm is not None and requests + 1 > scope.rpm)
                or (scope.tpm is not None and used + tokens > scope.tpm)
                or (scope.concurrency is not None and running + 1 > scope.concurrency)
                or (scope.budget is not None and spent + reserved + units > scope.budget * UNIT)
            ):
                return False
        month = month_of(self.now // 1000)
        self.open[name] = Reservation(scopes, self.now, tokens, units, month, self.now + lua.PENDING_US)
        for scope in scopes:
            if scope.rpm is not None or scope.tpm is not None:
                self.window.append((scope.name, name, self.now, tokens))
        return True

    def bind(self, name: str) -> None:
        # Who is past its time and not yet swept may still be bound: nobody has looked meanwhile.
        if (held := self.open.get(name)) is not None:
            held.pending_until = None

    def settle(self, name: str, payers: Sequence[str], tokens: int, units: int, month: str) -> None:
        for payer in payers:
            self.spent[month, payer] = self.spent.get((month, payer), 0) + units
        if name not in self.open:
            return
        del self.open[name]
        self.ended.add(name)
        self.window = [
            (scope, who, at, tokens) if who == name else (scope, who, at, before)
            for scope, who, at, before in self.window
        ]


def budget(units: int) -> Decimal:
    """So many units of 10⁻¹² as money."""
    return Decimal(units) / UNIT
