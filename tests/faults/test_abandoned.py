"""An ingress dies, and with it all who waited there: what nobody comes back for does not run to its end for nobody."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.gateway.spec import Spec
from tests.faults.conftest import Note
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, body, fresh
from tests.support.stacks import Stack
from tests.support.waiting import until

RESUME_S = 3


@pytest.mark.timeout(200)
async def test_what_nobody_comes_back_for_ends_and_what_is_resumed_goes_on(victim: Stack, note: Note) -> None:
    await victim.ready()
    left = Spec(tokens=2_000, interval_ms=50, id=fresh("left"))
    kept = Spec(tokens=500, interval_ms=50, id=fresh("kept"))
    outlives = {"x-hr-resume": str(RESUME_S)}
    async with Api(victim) as near, Api(victim, ingress=1) as far:
        async with far.open(body(left), outlives) as first, far.open(body(kept), outlives) as second:
            lost, seen = await first.until_tokens(3), await second.until_tokens(3)
            died = time.monotonic()
            await victim.killed("ingress-2")
        rest = asyncio.create_task(near.resume(seen.completion_id, seen.last_id))

        async def ended() -> bool:
            return any(one.outcome == "disconnected" for one in (await victim.seen(left.id)).tries)

        await until(ended, "the engine is told to stop", 40)
        ended_s = time.monotonic() - died
        resumed = await rest
    assert ended_s >= RESUME_S, "not before its caller had the time to come back"
    assert resumed.done and seen.tokens + resumed.tokens == list(range(500))
    rows = await usage_rows(victim, [lost.request_id, seen.request_id])
    assert [rows[one.request_id]["status"] for one in (lost, seen)] == ["cancelled", "completed"]
    await settled(victim)
    note(part="ingress killed, nobody comes back", ended_after_s=round(ended_s, 1), grace_s=RESUME_S)
