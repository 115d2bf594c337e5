"""How long admission takes beside a plain PING, on a Redis of the same host, at a steady rate of arrivals.

    python -m bench.limits [--rate 1000] [--seconds 20]

Arrivals come on their own clock, as callers do, so that a slow answer delays none of the next ones and hides nothing
(no coordinated omission). The same loop sends PINGs before and after; what the machine itself adds is in both.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import msgspec
import typer
import uvloop
from redis.asyncio import Redis
from redis.exceptions import RedisError
from rich.table import Table

from bench.limits.server import running_valkey
from bench.output import new_console, save
from headrace.errors import HeadraceError
from headrace.limits import lua
from headrace.limits.amounts import Worst
from headrace.limits.limiter import Limiter, Settled, kept_ms, ref_of
from headrace.limits.months import month_of
from headrace.limits.scopes import Scope
from headrace.redis_client import connect
from schemas.ids import new_request_id

WARM_S = 2.0
KEYS = 20
"""Keys of one app that take turns."""
SCOPES = tuple(
    (
        Scope("key", f"k{number}", rpm=10**6, tpm=10**9, concurrency=10**6, budget=Decimal(10**6)),
        Scope("app", "a", rpm=10**6, tpm=10**9, concurrency=10**6, budget=Decimal(10**6)),
        Scope("model", "m", rpm=10**6, tpm=10**9, concurrency=10**6),
    )
    for number in range(KEYS)
)
WORST = Worst(tokens=1500, units=12_345_678_901, completion=1000)


class Figures(msgspec.Struct):
    """One kind of call at one rate. Times are milliseconds, from when it was due to its answer."""

    call: str
    rate: int
    p50_ms: float
    p99_ms: float
    most_ms: float
    redis_us: float
    """CPU of the server for one call, in microseconds."""
    bytes: int
    """Memory of the server for one request of the last minute, whose reservation is open."""


class Report(msgspec.Struct):
    """What is kept of a run."""

    started: str
    figures: list[Figures]


async def at_rate(call: Callable[[int], Awaitable[object]], rate: int, seconds: float) -> list[float]:
    """Seconds that each call took, from when it was due."""
    loop, took = asyncio.get_running_loop(), list[float]()
    running: set[asyncio.Task[None]] = set()

    async def one(number: int, due: float) -> None:
        with contextlib.suppress(HeadraceError, RedisError):  # no answer in time is in the figures by its time
            await call(number)
        took.append(time.perf_counter() - due)

    began = time.perf_counter()
    for number in range(int(rate * seconds)):
        due = began + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = loop.create_task(one(number, due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return took


async def used(redis: Redis) -> tuple[float, int]:
    """Seconds of CPU, and bytes, that the server has used."""
    cpu, memory = await redis.info("cpu"), await redis.info("memory")
    return cpu["used_cpu_user"] + cpu["used_cpu_sys"], memory["used_memory"]


async def measure(name: str, call: Callable[[int], Awaitable[object]], redis: Redis, rate: int, s: float) -> Figures:
    """The figures of one kind of call, after a warm-up."""
    await at_rate(call, rate, WARM_S)
    cpu, memory = await used(redis)
    took = sorted(await at_rate(call, rate, s))
    after_cpu, after_memory = await used(redis)
    p50, p99, most = (round(1000 * took[math.ceil(len(took) * part) - 1], 3) for part in (0.5, 0.99, 1))
    each = 1e6 * (after_cpu - cpu) / len(took)
    size = max(0, after_memory - memory) // len(took)
    return Figures(name, rate, p50, p99, most, round(each, 1), size)


async def run(rate: int, seconds: float) -> list[Figures]:
    """PING, admission, its whole life, admission without limits, and PING once more."""
    with tempfile.TemporaryDirectory() as home, running_valkey(Path(home)) as url:
        redis = connect(url)
        try:
            await redis.register_script(lua.FLIP)(args=["", month_of(time.time_ns() // 1_000_000), 0])  # it is complete
            limiter, offset = Limiter(redis), iter(range(10**9))

            async def admit(number: int) -> str:
                request_id = new_request_id()
                await limiter.admit("a", request_id, SCOPES[number % KEYS], WORST, "m")
                return request_id

            async def life(number: int) -> None:
                request_id, at = await admit(number), next(offset)
                await limiter.bind("a", request_id)
                paid = (f"key:k{number % KEYS}", "app:a")
                ref, month = ref_of("a", request_id), month_of(time.time_ns() // 1_000_000)
                # A partition each: here they may end in any order.
                await limiter.settle(at, 0, 1, [Settled(0, ref, 900, 10**9, month, paid, kept_ms(request_id))])

            async def unlimited(number: int) -> None:
                await limiter.admit("a", new_request_id(), (), WORST, "m")

            async def ping(number: int) -> None:
                await redis.ping()

            found = []
            for name, call in (
                ("ping", ping),
                ("admit, three scopes of all limits", admit),
                ("admit, bind and settle", life),
                ("admit without limits", unlimited),
                ("ping again", ping),
            ):
                found.append(await measure(name, call, redis, rate, seconds))
            return found
        finally:
            await redis.aclose()


def main(
    rate: Annotated[int, typer.Option(help="Calls a second.")] = 1000,
    seconds: Annotated[float, typer.Option(help="How long each kind of call is measured.")] = 20,
) -> None:
    """Measure, show and keep the figures."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    rows = uvloop.run(run(rate, seconds))
    table = Table(*Figures.__struct_fields__)
    for row in rows:
        table.add_row(*map(str, msgspec.structs.astuple(row)))
    new_console(120).print(table)
    print(save(Report(started, rows), "limits", started))


if __name__ == "__main__":
    typer.run(main)
