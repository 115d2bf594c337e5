"""Two schedulers, the pool's owner gone for a while: the other takes the pool, and the one that wakes up does nothing.

One that is killed is in `test_kills.py`, where it is the only one.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Iterator
from functools import partial

import msgspec
import pytest

from schemas.events import PoolTerm
from tests.faults.conftest import Note
from tests.faults.test_kills import accounted, told_exactly
from tests.support.callers import Crowd
from tests.support.chat import Api
from tests.support.kafka import records
from tests.support.stacks import Stack, running_stack
from tests.support.waiting import until
from topics.catalogue import POOL_TERMS

CROWD = 100
STOPPED_S = 15.0


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[Stack]:
    """A stack with two schedulers and two workers."""
    replicas = {"scheduler": 2, "worker": 2}
    with running_stack(tmp_path_factory.mktemp("twins"), upstream_url, replicas=replicas) as made:
        yield made


async def owner(stack: Stack) -> str:
    """The instance whose term of the pool is the newest."""
    found = [record for record in await records(stack.settings, POOL_TERMS) if record.key == b"default"]
    return msgspec.json.decode(found[-1].value or b"", type=PoolTerm).instance


async def other_owns(stack: Stack, first: str) -> bool:
    """Whether the pool went from `first` to another."""
    return await owner(stack) != first


@pytest.mark.timeout(900)
async def test_a_scheduler_that_wakes_up_from_the_dead_decides_nothing_more(
    twins: Stack, moments: int, seed: int, note: Note
) -> None:
    """Stopped until the other has the pool, and longer; then continued, in the middle of more load."""
    chance = random.Random(f"{seed}-zombie-scheduler")
    for _ in range(-(-moments // 3)):  # Each takes long.
        await twins.ready()
        first = await owner(twins)
        async with Crowd(twins, CROWD, chance) as crowd:
            await asyncio.sleep(at_s := chance.uniform(0.1, 0.9))
            await twins.pause(first)
            stopped = time.monotonic()
            try:
                await until(partial(other_owns, twins, first), "the other has the pool", 15)
                taken_s = time.monotonic() - stopped
                async with Api(twins) as api:
                    await until(api.answers, "a new request is answered", 30)
                answered_s = time.monotonic() - stopped
                async with Crowd(twins, CROWD, chance) as more:
                    await asyncio.sleep(max(0.0, STOPPED_S - (time.monotonic() - stopped)))
                    twins.signal(first, signal.SIGCONT)
                    late = await more.outcomes()
            finally:
                twins.signal(first, signal.SIGCONT)
            found = await crowd.outcomes()
        for one in (*found, *late):
            told_exactly(one)
        note(
            part="zombie scheduler", at_s=round(at_s, 3), taken_s=round(taken_s, 2),
            new_request_answered_s=round(answered_s, 2), callers=len(found) + len(late),
            exact=sum(one.done for one in (*found, *late)),
        )  # fmt: skip
        await accounted(twins, [*found, *late])
