"""What the scheduling policy promises whoever waits, seen after every step of a simulated backlog."""

from __future__ import annotations

import random

import pytest

from bench.scheduler import headrace
from bench.scheduler.policies import simulate
from bench.scheduler.workload import Arrival, DeviceSpec, Workload
from processors.scheduler.messages import Action, Event
from processors.scheduler.state import LeaseState, Limits, Pool
from tests.support.fairness import Served, bound, widest
from tests.support.simulated import model


def backlog(models: list[str], tenants: dict[str, int], seconds: int, seed: int) -> list[Arrival]:
    """More than can be served: each tenant asks for each model that often a second, for short and for long answers."""
    chance = random.Random(seed)
    return [
        Arrival(
            second + (number + chance.random()) / rate, f"{tenant}-{name}-{second}-{number}", tenant, name,
            prompt_tokens=chance.randrange(50, 500), output_tokens=chance.randrange(20, 200), slo_s=3600,
        )
        for second in range(seconds) for name in models for tenant, rate in tenants.items() for number in range(rate)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("loads_s", [[2.0] * 5, [5.0] * 5, [2.0, 9.0, 2.0, 5.0, 2.0]], ids=["short", "long", "unequal"])
def test_no_queue_waits_for_its_model_for_longer_than_w_max(
    loads_s: list[float], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five models on memory for two, and always somebody who waits for each."""
    worst = lacking(monkeypatch)
    names = [f"m{number}" for number in range(5)]
    arrivals = backlog(names, {"one": 1, "other": 1}, 240, seed)
    specs = [model(name, load_s=load_s) for name, load_s in zip(names, loads_s, strict=True)]
    done = simulate(Workload([DeviceSpec("gpu0", 20)], specs, arrivals), "headrace")
    assert worst.keys() == set(names)
    assert max(worst.values()) <= Limits().max_wait_ms
    assert max(worst.values()) > Limits().max_wait_ms / 2, "it was not put to the test"
    assert done.outcomes == {"finished": len(arrivals)}


def test_a_model_that_needs_the_memory_of_two_has_its_turn_among_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = lacking(monkeypatch)
    names = [f"m{number}" for number in range(10)]
    arrivals = backlog([*names, "big"], {"one": 1}, 120, 1)
    specs = [*(model(name, load_s=10.0) for name in names), model("big", size=20, load_s=10.0)]
    done = simulate(Workload([DeviceSpec("gpu0", 20)], specs, arrivals), "headrace")
    assert worst["big"] < 3 * Limits().max_wait_ms, "their turns do not fit into W_max, and it has one all the same"
    assert done.outcomes == {"finished": len(arrivals)}


def lacking(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Model -> the longest that its queue lacked it, in ms; seen after each step of what is simulated from now on."""
    real, since, worst = headrace.step, dict[str, int](), dict[str, int]()

    def step(pool: Pool, event: Event, now_ms: int) -> list[Action]:
        actions = real(pool, event, now_ms)
        for name, queue in pool.queues.items():
            if not queue or any(lease.state is LeaseState.ACTIVE for lease in pool.of_model(name)):
                since.pop(name, None)
            else:
                worst[name] = max(worst.get(name, 0), now_ms - since.setdefault(name, now_ms))
        return actions

    monkeypatch.setattr(headrace, "step", step)
    return worst


@pytest.mark.parametrize("seed", [1, 2])
def test_tenants_with_a_backlog_are_served_alike_within_the_bound(seed: int) -> None:
    """On each of three models that take turns in the memory, over every interval in which two tenants wait for it."""
    slots, names = 3, ["a", "b", "c"]
    arrivals = backlog(names, {"greedy": 4, "modest": 2, "small": 1}, 120, seed)
    specs = [model(name, slots=slots) for name in names]
    done = simulate(Workload([DeviceSpec("gpu0", 20)], specs, arrivals), "headrace")
    asked = {arrival.id: arrival for arrival in arrivals}
    for name in names:
        served = [
            Served(
                one.tenant, round(1000 * one.arrived_s), round(1000 * (one.started_s or 0)), round(1000 * one.ended_s),
                asked[one.id].prompt_tokens, asked[one.id].output_tokens,
            )
            for one in done.requests if one.model == name
        ]  # fmt: skip
        assert 0 < widest(served) <= bound(served, slots), name
