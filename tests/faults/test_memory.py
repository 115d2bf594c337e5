"""Models share memory while those who load, hold and plan them are killed, or stopped and let go on.

It is never oversold, and all who asked are answered or told.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.conftest import MakeStack
from tests.faults.conftest import Note
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, body
from tests.support.engines import engines
from tests.support.shared_memory import CONFIG, FIT, MODELS, Watch, expected, watched
from tests.support.stacks import Stack
from tests.support.waiting import until

VICTIMS = ("worker-1", "scheduler-1", "engine", "router-1")
ZOMBIES = ("worker-1", "scheduler-1")
STOPPED_S = 15.0
"""How long a zombie is away: a worker is missed after 3 s, a scheduler by its group after 6 s."""
CALLERS = 4
APART_S = (4.0, 8.0)
"""Seconds from when all is well again to the next kill."""
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def need() -> int:
    return expected()


@pytest.fixture(scope="module")
def tight(make_stack: MakeStack, need: int) -> Stack:
    """A stack with three models on memory for two."""
    return make_stack(models=CONFIG, env={"HEADRACE_WORKER_MEMORY": str(int(FIT * need))})


class Crowd:
    """Callers who ask one model after the other, each again when it has its answer."""

    def __init__(self, api: Api, chance: random.Random) -> None:
        self.answered: list[str] = []
        self.failed: list[httpx.Response] = []
        self.models: Counter[str] = Counter()
        self.stop = asyncio.Event()
        self._api = api
        self._chance = chance

    async def ask(self) -> None:
        """Ask until told to stop."""
        while not self.stop.is_set():
            model, number = self._chance.choice(MODELS), self._chance.randrange(1_000)
            question = body(f"Tell a story of {number} ships.", model=model, max_tokens=self._chance.randrange(8, 40))
            answer = await self._api.ask(question)
            if answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] in ("stop", "length"):
                self.answered.append(answer.headers["x-request-id"])
                self.models[model] += 1
            else:
                self.failed.append(answer)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stop.wait(), int(answer.headers.get("retry-after", 0)))


async def kill(stack: Stack, victim: str) -> None:
    """SIGKILL; returns when its successor runs."""
    if victim == "engine":
        [engine, *_] = await until(lambda: engines(stack.process.tree()), "there is an engine", 60)
        engine.kill()
    else:
        await stack.killed(victim)


@contextlib.asynccontextmanager
async def busy(stack: Stack, need: int, chance: random.Random) -> AsyncIterator[tuple[Crowd, Watch]]:
    """Callers ask while the block runs; then memory was never oversold, and each was answered or told, and billed."""
    budget = int(FIT * need)
    async with Api(stack) as api, watched(stack) as watch:
        crowd = Crowd(api, chance)
        asking = [asyncio.create_task(crowd.ask()) for _ in range(CALLERS)]
        try:
            yield crowd, watch
        finally:
            crowd.stop.set()
            await asyncio.gather(*asking)
    assert set(crowd.models) == set(MODELS)
    assert need < watch.most <= budget, f"{watch.most // MIB} MiB were held of {budget // MIB}"
    taken = []
    for one in crowd.failed:  # of an engine that died while it loaded, or in the middle of a whole answer
        assert one.status_code in (502, 503), one.text
        code = one.json()["error"]["code"]
        assert code == "provider_error" or (code, one.status_code) == ("service_unavailable", 503), one.text
        if code == "provider_error":  # Else no worker was there for longer than it is waited for, and it was refused.
            taken.append(one.headers["x-request-id"])
    await settled(stack)
    ids = [*crowd.answered, *taken]
    rows = await usage_rows(stack, ids)
    assert Counter(str(row["status"]) for row in rows.values()) == Counter(
        {"completed": len(crowd.answered), "failed": len(taken)}
    ) - Counter({"failed": 0})


async def go_on(crowd: Crowd) -> float:
    """Waits until everybody could have one answer more; returns the seconds that took."""
    began, before = time.monotonic(), len(crowd.answered)
    await until(lambda: len(crowd.answered) >= before + CALLERS, "answers go on", 90)
    return round(time.monotonic() - began, 2)


@pytest.mark.timeout(1800)
async def test_memory_is_never_oversold_whoever_is_killed(
    tight: Stack, need: int, moments: int, seed: int, note: Note
) -> None:
    chance = random.Random(f"{seed}-memory")
    async with busy(tight, need, chance) as (crowd, watch):
        for victim in VICTIMS * -(-moments // len(VICTIMS)):
            await asyncio.sleep(chance.uniform(*APART_S))
            killed = time.monotonic()
            await kill(tight, victim)
            await go_on(crowd)
            note(
                role=f"{victim.removesuffix('-1')} on shared memory",
                answers_go_on_s=round(time.monotonic() - killed, 2), failed=len(crowd.failed),
                most_mib=watch.most // MIB, budget_mib=int(FIT * need) // MIB,
            )  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("zombie", ZOMBIES)
async def test_memory_is_never_oversold_when_who_was_away_comes_back(
    tight: Stack, need: int, zombie: str, moments: int, seed: int, note: Note
) -> None:
    """Once where the others are killed up to ten times: each time takes more than 20 s."""
    await tight.ready()
    chance = random.Random(f"{seed}-memory-{zombie}")
    async with busy(tight, need, chance) as (crowd, watch):
        for _ in range(-(-moments // 10)):
            await asyncio.sleep(chance.uniform(*APART_S))
            answered = len(crowd.answered)
            pid = tight.signal(zombie, signal.SIGSTOP)
            try:
                await asyncio.sleep(STOPPED_S)
                assert len(crowd.answered) <= answered + CALLERS, "nobody does its work meanwhile"
            finally:
                tight.signal(zombie, signal.SIGCONT)
            took_s = await go_on(crowd)
            note(
                role=f"{zombie.removesuffix('-1')} stopped for a while on shared memory", answers_go_on_s=took_s,
                failed=len(crowd.failed), same_process=tight.pid(zombie) == pid,
                most_mib=watch.most // MIB, budget_mib=int(FIT * need) // MIB,
            )  # fmt: skip
