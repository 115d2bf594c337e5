"""Models share memory while those who load, hold and plan them are killed: it is never oversold, and all are told."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import httpx
import pytest

from tests.conftest import MakeStack
from tests.faults.conftest import Note
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, body
from tests.support.engines import engines
from tests.support.shared_memory import CONFIG, FIT, MODELS, expected, watched
from tests.support.stacks import Stack
from tests.support.waiting import until

VICTIMS = ("worker-1", "scheduler-1", "engine", "router-1")
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


async def kill(stack: Stack, victim: str) -> None:
    """SIGKILL; returns when its successor runs."""
    if victim == "engine":
        [engine, *_] = await until(lambda: engines(stack.process.tree()), "there is an engine", 60)
        engine.kill()
    else:
        await stack.killed(victim)


@pytest.mark.timeout(1800)
async def test_memory_is_never_oversold_whoever_is_killed(
    tight: Stack, need: int, moments: int, seed: int, note: Note
) -> None:
    chance, budget = random.Random(f"{seed}-memory"), int(FIT * need)
    async with Api(tight) as api, watched(tight) as watch:
        crowd = Crowd(api, chance)
        asking = [asyncio.create_task(crowd.ask()) for _ in range(CALLERS)]
        try:
            for victim in VICTIMS * -(-moments // len(VICTIMS)):
                await asyncio.sleep(chance.uniform(*APART_S))
                killed = time.monotonic()
                await kill(tight, victim)
                before = len(crowd.answered)
                await until(lambda before=before: len(crowd.answered) >= before + CALLERS, "answers go on", 90)
                note(
                    role=f"{victim.removesuffix('-1')} on shared memory",
                    answers_go_on_s=round(time.monotonic() - killed, 2), failed=len(crowd.failed),
                    most_mib=watch.most // MIB, budget_mib=budget // MIB,
                )  # fmt: skip
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
    await settled(tight)
    ids = [*crowd.answered, *taken]
    rows = await usage_rows(tight, ids)
    assert Counter(str(row["status"]) for row in rows.values()) == Counter(
        {"completed": len(crowd.answered), "failed": len(taken)}
    ) - Counter({"failed": 0})
