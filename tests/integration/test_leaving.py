"""Callers who leave: the last one's leaving ends the generation, within a second and metered, unless it has a grace."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.gateway.spec import Spec
from tests.support.accounts import usage_rows
from tests.support.chat import Api, body, fresh
from tests.support.stacks import Stack
from tests.support.waiting import until

LONG = 600
"""Tokens of a stream that nobody waits for the end of."""


def long(name: str) -> Spec:
    return Spec(tokens=LONG, interval_ms=25, id=fresh(name))


async def gone_after(stack: Stack, spec: Spec, left_ns: int, within_s: float = 10) -> float:
    """Seconds from `left_ns` (CLOCK_MONOTONIC) to the end of the generation at the upstream."""

    async def ended() -> int | None:
        return (await stack.seen(spec.id)).tries[0].ended_ns

    return (await until(ended, "the generation ends", within_s) - left_ns) / 1e9


async def cancelled(stack: Stack, api: Api, spec: Spec, request_id: str) -> None:
    """The terminal and the usage say `cancelled`, with the tokens that were generated."""
    generated = (await stack.seen(spec.id)).tokens
    assert 0 < generated < LONG
    row = (await usage_rows(stack, [request_id]))[request_id]
    assert row["status"] == "cancelled"
    # The last tokens may be on their way from the upstream when the connection is closed.
    assert generated - 2 <= int(str(row["completion_tokens"])) <= generated
    assert int(str(row["prompt_tokens"])) > 0
    assert float(str(row["cost"])) > 0
    assert (await api.get(f"/v1/requests/{request_id}")).json()["status"] == "cancelled"


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_caller_who_leaves_ends_the_generation_within_a_second(stack: Stack, api: Api, streamed: bool) -> None:
    spec = long("leaves")
    if streamed:
        async with api.open(body(spec)) as reader:
            seen = await reader.until_tokens(5)
        left_ns = time.monotonic_ns()
        assert await gone_after(stack, spec, left_ns) < 1.0
        await cancelled(stack, api, spec, seen.request_id)
        return
    asking = asyncio.create_task(api.ask(body(spec)))

    async def runs() -> bool:
        tries = (await stack.seen(spec.id)).tries
        return bool(tries) and time.monotonic_ns() - tries[0].received_ns > 300_000_000

    await until(runs, "the generation runs")
    asking.cancel()
    left_ns = time.monotonic_ns()
    assert await gone_after(stack, spec, left_ns) < 1.0


async def test_a_cancelled_requests_life_shows_who_asked_and_why(stack: Stack, api: Api) -> None:
    spec = long("asked")
    async with api.open(body(spec)) as reader:
        seen = await reader.until_tokens(3)

    async def life() -> list[dict[str, object]] | None:
        steps = (await api.get(f"/v1/requests/{seen.request_id}")).json()["steps"]
        return steps if {"cancel_asked", "terminal"} <= {step["stage"] for step in steps} else None

    steps = await until(life, "the wish and the terminal are told")
    assert [step["stage"] for step in steps[-2:]] == ["cancel_asked", "terminal"]
    asked, first_token = steps[-2], steps[-3]
    assert asked["role"] == "scheduler"
    assert asked["detail"] == {"by": "ingress-1", "reason": "The caller left."}
    assert int(str(first_token["at_ms"])) <= int(str(asked["at_ms"])) <= int(str(steps[-1]["at_ms"]))


async def test_only_the_last_one_to_leave_ends_it(stack: Stack, api: Api, other: Api) -> None:
    spec = long("last")
    headers = {"idempotency-key": spec.id, "x-hr-resume": "0"}
    async with other.open(body(spec), headers) as second:
        async with api.open(body(spec), headers) as first:
            await asyncio.gather(first.until_tokens(5), second.until_tokens(5))
        # The first has left; the second still reads, at the other ingress.
        seen = await second.until_tokens(60)
        assert (await stack.seen(spec.id)).tries[0].ended_ns is None
    left_ns = time.monotonic_ns()
    assert await gone_after(stack, spec, left_ns) < 1.0
    assert seen.tokens == list(range(len(seen.tokens)))
    await cancelled(stack, api, spec, seen.request_id)


async def test_who_only_watches_neither_ends_it_nor_keeps_it_from_its_end(stack: Stack, api: Api, other: Api) -> None:
    spec = long("watched")
    async with api.open(body(spec)) as reader:
        first = await reader.until_tokens(5)
        async with other.follow(first.completion_id) as watcher:
            await watcher.until_tokens(5)
        await reader.until_tokens(60)
        assert (await stack.seen(spec.id)).tries[0].ended_ns is None, "a watcher's leaving ended it"
        async with other.follow(first.completion_id) as watcher:
            await watcher.until_tokens(5)
            await reader.close()
            await watcher.until_tokens(100)
            assert (await stack.seen(spec.id)).tries[0].ended_ns is None, "a watcher is still there"
        left_ns = time.monotonic_ns()
    assert await gone_after(stack, spec, left_ns) < 1.0


async def test_a_grace_is_kept_and_then_over(stack: Stack, api: Api) -> None:
    spec = long("grace")
    async with api.open(body(spec), {"x-hr-resume": "2"}) as reader:
        seen = await reader.until_tokens(5)
    left_ns = time.monotonic_ns()
    assert 1.7 < await gone_after(stack, spec, left_ns) < 3.5
    await cancelled(stack, api, spec, seen.request_id)


async def test_coming_back_within_the_grace_keeps_it_running(stack: Stack, api: Api, other: Api) -> None:
    spec = Spec(tokens=120, interval_ms=25, id=fresh("back"))
    async with api.open(body(spec), {"x-hr-resume": "1"}) as reader:
        first = await reader.until_tokens(5)
    second = await other.resume(first.completion_id, first.last_id)
    assert second.done and first.tokens + second.tokens == list(range(120))
    assert (await stack.seen(spec.id)).tries[0].outcome == "finished"


async def test_who_waits_in_the_queue_and_leaves_is_never_generated(stack: Stack, api: Api) -> None:
    running = long("running")
    waiting = long("waiting")
    async with api.open(body(running, model="narrow")) as reader:
        await reader.until_tokens(2)
        asking = asyncio.create_task(api.stream(body(waiting, model="narrow")))
        query = "SELECT request_id FROM request_events WHERE stage = 'queued' ORDER BY at DESC LIMIT 1"
        await until(lambda: asyncio.to_thread(stack.rows, query), "it is queued", 15)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    last = await api.stream(body(Spec(tokens=2, interval_ms=1), model="narrow"))
    assert last.done, last.error
    assert (await stack.seen(waiting.id)).requests == 0
