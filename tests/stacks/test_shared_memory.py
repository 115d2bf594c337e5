"""Three models of llama.cpp on memory that holds two: everybody is answered, and the memory is never oversold.

What was measured is kept in `tests/results/shared-memory.json`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest

from bench.gateway.figures import percentile
from headrace.control_client import command, control_client
from schemas.control import App, Key
from tests.support.chat import Api
from tests.support.fairness import Served, bound, widest
from tests.support.results import Note, noted
from tests.support.shared_memory import CONFIG, FIT, MODELS, SLOTS, expected, watched
from tests.support.stacks import Stack, running_stack
from tests.support.waiting import until

SECONDS = 60.0
CALLERS = {"greedy": 6, "modest": 2, "quiet": 1}
"""Tenant -> callers, each of whom asks again when it has its answer."""
LOADS_A_MINUTE = 30
"""Most switches: a model comes when a queue waits for it, and those who wait for it are served together."""
MIB = 1024 * 1024


@dataclass
class Book:
    """What the callers saw."""

    answered: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Tenant -> seconds until each answer."""

    def mean_wait(self, tenant: str) -> float:
        return sum(self.waits[tenant]) / len(self.waits[tenant])

    def p95_wait(self, *tenants: str) -> float:
        return percentile(sorted(wait for tenant in tenants for wait in self.waits[tenant]), 0.95)


@pytest.fixture(scope="module")
def need() -> int:
    return expected()


@pytest.fixture(scope="module")
def note() -> Iterator[Note]:
    """Takes what a test measured."""
    with noted("shared-memory", "figures", load_s=SECONDS, callers=CALLERS) as take:
        yield take


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, upstream_url: str, need: int) -> Iterator[Stack]:
    env = {"HEADRACE_WORKER_MEMORY": str(int(FIT * need))}
    directory = tmp_path_factory.mktemp("small")
    with running_stack(directory, upstream_url, models=CONFIG, env=env) as made:
        yield made


async def caller(api: Api, tenant: str, chance: random.Random, until_s: float, book: Book) -> None:
    while time.monotonic() < until_s:
        # The first is asked for most, as in life; all three are asked for all the time.
        model = chance.choices(MODELS, weights=(4, 2, 1))[0]
        question = {"model": model, "messages": [{"role": "user", "content": f"Count to {chance.randrange(5, 30)}."}]}
        began = time.monotonic()
        answer = await api.ask({**question, "max_tokens": chance.randrange(4, 24)})
        if answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] in ("stop", "length"):
            book.answered[model] += 1
            book.waits[tenant].append(time.monotonic() - began)
        else:
            book.refused.append(answer.text)


@pytest.mark.timeout(240)
async def test_three_models_on_memory_for_two(small: Stack, need: int, note: Note) -> None:
    async with control_client(small.settings) as control:
        for tenant in CALLERS:
            text = f"hr-{tenant}"
            key = Key(f"k-{tenant}", hashlib.sha256(text.encode()).hexdigest(), tenant, tenant)
            await control.submit([command(App(tenant, tenant), actor="test"), command(key, actor="test")])
    book, budget = Book(), int(FIT * need)

    async def crowd(tenant: str) -> None:
        async with Api(small, key=f"hr-{tenant}") as api:
            chances = [random.Random(f"{tenant}{n}") for n in range(CALLERS[tenant])]
            await asyncio.gather(*(caller(api, tenant, chance, end, book) for chance in chances))

    end = time.monotonic() + SECONDS
    async with watched(small) as watch:
        await asyncio.gather(*map(crowd, CALLERS))
    note(
        answered=dict(book.answered), refused=len(book.refused),
        most_mib=watch.most // MIB, budget_mib=budget // MIB, model_mib=need // MIB,
        mean_wait_s={tenant: round(book.mean_wait(tenant), 2) for tenant in CALLERS},
        p95_wait_s={"all": round(book.p95_wait(*CALLERS), 2)}
        | {tenant: round(book.p95_wait(tenant), 2) for tenant in CALLERS},
    )  # fmt: skip
    assert not book.refused
    assert set(book.answered) == set(MODELS), "nobody's model was left out"
    assert need < watch.most <= budget, f"{watch.most // MIB} MiB were held of {budget // MIB}"
    assert book.mean_wait("quiet") <= book.mean_wait("greedy"), "who asks for more waits for longer"
    assert small.ledger()["in_flight"] == 0


async def leases(stack: Stack) -> list[dict[str, object]]:
    return await asyncio.to_thread(
        stack.rows, "SELECT model, device, bytes, state, reason FROM leases WHERE device = 'ram' ORDER BY granted_at"
    )


@pytest.mark.timeout(120)
async def test_what_leases_held_can_be_asked_in_sql(small: Stack, need: int, note: Note) -> None:
    async def shown() -> list[dict[str, object]] | None:
        rows = await leases(small)
        return rows if {row["model"] for row in rows} >= set(MODELS) else None

    rows = await until(shown, "leases of all three models are in ClickHouse", 30)
    assert all(0.5 * need < int(str(row["bytes"])) <= 1.1 * need for row in rows), rows
    gone = [row for row in rows if row["state"] == "free"]
    note(loads=len(rows), made_room=len(gone))
    assert gone and all("makes room" in str(row["reason"]) for row in gone), rows
    assert len(rows) <= LOADS_A_MINUTE * SECONDS / 60, "models are not swapped all the time"


@pytest.mark.timeout(120)
async def test_tenants_that_waited_for_one_model_were_served_alike_within_the_bound(small: Stack, note: Note) -> None:
    def done() -> list[dict[str, object]]:
        return small.rows(
            "SELECT model, tenant, toUnixTimestamp64Milli(accepted_at) AS came,"
            " toUnixTimestamp64Milli(assigned_at) AS began, toUnixTimestamp64Milli(finished_at) AS ended,"
            " prompt_tokens AS prompt, completion_tokens AS completion"
            " FROM requests WHERE status = 'completed' AND tenant IN ('greedy', 'modest', 'quiet')"
        )

    by_model: dict[str, list[Served]] = defaultdict(list)
    for row in await asyncio.to_thread(done):
        by_model[str(row.pop("model"))].append(msgspec.convert(row, Served))
    gaps = {model: (widest(served), bound(served, SLOTS)) for model, served in by_model.items()}
    note(service_gaps={model: {"widest": gap, "bound": most} for model, (gap, most) in gaps.items()})
    assert set(gaps) == set(MODELS)
    assert max(gap for gap, _ in gaps.values()) > 0, "two tenants waited for one model at the same time"
    assert all(gap <= most for gap, most in gaps.values()), gaps
