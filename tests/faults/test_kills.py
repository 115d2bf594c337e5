"""SIGKILL of each role in the middle of 50 numbered streams: nothing accepted is lost, nothing is told twice."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests.faults.conftest import Note
from tests.support.accounts import settled, usage_rows
from tests.support.callers import INTERVAL_MS, RAMP_S, TOKENS, Crowd, Outcome
from tests.support.chat import Api
from tests.support.stacks import Stack
from tests.support.waiting import until

CROWD = 50
LENGTH_S = RAMP_S + TOKENS * INTERVAL_MS / 1000
ROLES = ("router", "scheduler", "metering", "sink", "ingress", "worker")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("role", ROLES)
async def test_a_killed_role(victim: Stack, role: str, moments: int, seed: int, note: Note) -> None:
    chance = random.Random(f"{seed}-{role}")
    outcomes: list[Outcome] = []
    for _ in range(moments):
        await victim.ready()
        at_s = chance.uniform(0.05, LENGTH_S * 0.9)
        began = time.monotonic()
        async with Crowd(victim, CROWD, chance) as crowd:
            await asyncio.sleep(at_s)
            killed = time.monotonic()
            await victim.killed(f"{role}-1")
            async with Api(victim) as api:
                await until(api.answers, "a new request is answered", 60)
            answering_s = time.monotonic() - killed
            found = await crowd.outcomes()
        note(
            role=role, at_s=round(at_s, 3), seconds=round(time.monotonic() - began, 1),
            new_request_answered_s=round(answering_s, 2), callers=len(found),
            exact=sum(one.done and one.tokens == one.expected for one in found),
            resumed=sum(one.resumed for one in found), repeated=sum(one.repeated for one in found),
        )  # fmt: skip
        for one in found:
            told_exactly(one)
        outcomes += found
    continued = await accounted(victim, outcomes, again=role == "worker")
    assert continued or role != "worker", "no kill struck in the middle of an answer"


def told_exactly(one: Outcome) -> None:
    """The whole answer, no token lost or doubled."""
    assert one.done, f"{one.request_id} ended with {one.error}"
    assert one.tokens == one.expected, f"{one.request_id} has {one.tokens}"


async def accounted(stack: Stack, outcomes: list[Outcome], *, again: bool = False) -> int:
    """One terminal, one usage and one row for each, of all its tokens; returns how many were generated in parts."""
    ids = {one.request_id: one for one in outcomes}
    assert len(ids) == len(outcomes)
    rows = await usage_rows(stack, ids)
    for request_id, row in rows.items():
        one = ids[request_id]
        assert row["status"] == "completed"
        assert int(str(row["completion_tokens"])) == len(one.expected), one.request_id
    generated = await stack.all_seen()
    continued = 0
    for one in outcomes:
        tries = generated[one.spec.id].tries
        assert len(tries) == 1 or again, f"{one.request_id} was generated {len(tries)} times"
        continued += len(tries) > 1 and tries[-1].tokens < len(one.expected)
    await settled(stack)
    return continued
