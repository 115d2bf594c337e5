"""SIGKILL of each role in the middle of 50 numbered streams: nothing accepted is lost, nothing is told twice."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests.faults.conftest import Note
from tests.support.accounts import settled, usage_rows
from tests.support.callers import INTERVAL_MS, RAMP_S, TOKENS, Crowd, Outcome
from tests.support.stacks import Stack

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
            await victim.killed(f"{role}-1")
            found = await crowd.outcomes()
        note(
            role=role, at_s=round(at_s, 3), seconds=round(time.monotonic() - began, 1), callers=len(found),
            exact=sum(one.done and one.tokens == one.expected for one in found),
            failed=sum(one.error is not None for one in found),
            resumed=sum(one.resumed for one in found), repeated=sum(one.repeated for one in found),
        )  # fmt: skip
        for one in found:
            told_exactly(one, may_fail=role == "worker")
        outcomes += found
    await accounted(victim, outcomes, again=role == "worker")


def told_exactly(one: Outcome, *, may_fail: bool) -> None:
    """No token lost or doubled in what a caller saw; a stream that ended in an error has a gapless beginning."""
    if one.done:
        assert one.tokens == one.expected, f"{one.request_id} has {one.tokens}"
    else:
        assert may_fail and one.error == "worker_lost", f"{one.request_id} ended with {one.error}"
        assert one.tokens and one.tokens == one.expected[: len(one.tokens)], f"{one.request_id} has {one.tokens}"


async def accounted(stack: Stack, outcomes: list[Outcome], *, again: bool = False) -> None:
    """One terminal, one usage and one row for each, of as many tokens as its caller saw."""
    ids = {one.request_id: one for one in outcomes}
    assert len(ids) == len(outcomes)
    rows = await usage_rows(stack, ids)
    for request_id, row in rows.items():
        one = ids[request_id]
        assert row["status"] == ("completed" if one.done else "failed")
        assert int(str(row["completion_tokens"])) == len(one.tokens), one.request_id
    generated = await stack.all_seen()
    for one in outcomes:
        times = generated[one.spec.id].requests
        assert times == 1 or again, f"{one.request_id} was generated {times} times"
    await settled(stack)
