"""What the scheduling policy promises whoever waits, seen after every step of a simulated backlog."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from msgspec.structs import replace

from bench.scheduler import headrace
from bench.scheduler.figures import Figures
from bench.scheduler.generators import SHAPES, generate
from bench.scheduler.policies import simulate
from bench.scheduler.workload import Arrival, DeviceSpec, Workload
from processors.scheduler.messages import Action, Event, LeaseMoved
from processors.scheduler.state import LeaseState, Limits, Pool
from tests.support.fairness import Served, bound, widest
from tests.support.simulated import model

LANES = ["interactive", "standard", "batch"]
MAKES_ROOM = "makes room for "
POLICIES = ["headrace", "headrace-untold"]
"""Callers of the one leave when their SLO is over, of the other after three times as long."""


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
    worst = watched(monkeypatch).worst
    names = [f"m{number}" for number in range(5)]
    arrivals = backlog(names, {"one": 1, "other": 1}, 240, seed)
    specs = [model(name, load_s=load_s) for name, load_s in zip(names, loads_s, strict=True)]
    done = simulate(Workload([DeviceSpec("gpu0", 20)], specs, arrivals), "headrace")
    assert worst.keys() == set(names)
    assert max(worst.values()) <= Limits().max_wait_ms
    assert max(worst.values()) > Limits().max_wait_ms / 2, "it was not put to the test"
    assert done.outcomes == {"finished": len(arrivals)}


def test_a_model_that_needs_the_memory_of_two_has_its_turn_among_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = watched(monkeypatch).worst
    names = [f"m{number}" for number in range(10)]
    arrivals = backlog([*names, "big"], {"one": 1}, 120, 1)
    specs = [*(model(name, load_s=10.0) for name in names), model("big", size=20, load_s=10.0)]
    done = simulate(Workload([DeviceSpec("gpu0", 20)], specs, arrivals), "headrace")
    assert worst["big"] < 3 * Limits().max_wait_ms, "their turns do not fit into W_max, and it has one all the same"
    assert done.outcomes == {"finished": len(arrivals)}


def published(name: str, load: float = 1.0) -> Workload:
    """A built-in workload, at `load` times a load near the most that the policy bears."""
    seconds = {"bursts": 900, "zipf-30": 150}.get(name, 240)
    return generate(name, rate=load * SHAPES[name].near, seed=1, seconds=seconds)


@pytest.mark.parametrize(
    ("name", "at_least_s"),
    [
        ("uncontended", 0), ("poisson", 50), ("bursts", 25), ("zipf-10", 60), ("zipf-30", 60), ("tenants", 45),
        ("training", 0), ("faults", 60),
    ],
)  # fmt: skip
def test_no_queue_of_a_published_workload_waits_for_its_model_for_longer_than_can_be_promised(
    name: str, at_least_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W_max, and a load that has begun and the turn after it, since what is loaded is not taken before its turn.

    Beside that only what nobody can know: how long those still run who have the memory. `at_least_s` says how far the
    promise was put to the test; the models of some workloads fall idle long before W_max.
    """
    turn_ms = 2000 * max(spec.load_s for spec in SHAPES[name].models)
    worst: list[int] = []
    for load, policy in product((1.0, 1.5), POLICIES):
        with monkeypatch.context() as patched:
            watch = watched(patched)
            simulate(published(name, load), policy)
        assert max(watch.owed.values()) <= Limits().max_wait_ms + turn_ms, (load, policy, watch.owed)
        worst += watch.worst.values()
    assert max(worst) >= 1000 * at_least_s, "it was not put to the test"


class Watch:
    """Sees after each step of what is simulated how long queues have lacked their models. Times are ms."""

    def __init__(self) -> None:
        self.worst: dict[str, int] = {}
        """Model -> the longest that somebody waited for it, not with batch work, while nobody had it loaded."""
        self.owed: dict[str, float] = {}
        """The same, less by how much longer than expected requests ran on the models that gave way to it."""
        self._since: dict[str, int] = {}
        self._drains: dict[tuple[str, str], tuple[str, float]] = {}
        """Worker and model that gives way -> the model that it makes room for, and when it is expected to have."""
        self._overran: dict[str, float] = {}

    def see(self, pool: Pool, actions: list[Action], now_ms: int) -> None:
        """What a step did, and the pool after it."""
        for action in actions:
            if isinstance(action, LeaseMoved):
                self._moved(pool, action, now_ms)
        for name, queue in pool.queues.items():
            if not queue.pressing or any(lease.state is LeaseState.ACTIVE for lease in pool.of_model(name)):
                self._since.pop(name, None)
                self._overran.pop(name, None)
            else:
                lacked = now_ms - self._since.setdefault(name, now_ms)
                self.worst[name] = max(self.worst.get(name, 0), lacked)
                self.owed[name] = max(self.owed.get(name, 0.0), lacked - self._overran.get(name, 0.0))

    def _moved(self, pool: Pool, moved: LeaseMoved, now_ms: int) -> None:
        place = (moved.worker, moved.model)
        if moved.state == "draining" and moved.reason.startswith(MAKES_ROOM):
            ends_ms = now_ms + 2 * pool.service_ms.get(moved.model, 0.0)
            self._drains[place] = (moved.reason.removeprefix(MAKES_ROOM), ends_ms)
        elif moved.state == "releasing" and place in self._drains:
            for_whom, ends_ms = self._drains.pop(place)
            self._overran[for_whom] = max(self._overran.get(for_whom, 0.0), now_ms - ends_ms)


def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Watches what is simulated from now on."""
    real, watch = headrace.step, Watch()

    def step(pool: Pool, event: Event, now_ms: int) -> list[Action]:
        actions = real(pool, event, now_ms)
        watch.see(pool, actions, now_ms)
        return actions

    monkeypatch.setattr(headrace, "step", step)
    return watch


@pytest.mark.parametrize("seed", [1, 2])
def test_tenants_with_a_backlog_are_served_alike_within_the_bound(seed: int) -> None:
    """On each of three models that take turns in the memory, over every interval in which two tenants wait for it."""
    slots, names = 3, ["a", "b", "c"]
    arrivals = backlog(names, {"greedy": 4, "modest": 2, "small": 1}, 120, seed)
    specs = [model(name, slots=slots) for name in names]
    workload = Workload([DeviceSpec("gpu0", 20)], specs, arrivals)
    done = simulate(workload, "headrace")
    for name in names:
        assert 0 < widest(served := served_by(workload, done, name)) <= bound(served, slots), name


@pytest.mark.parametrize(
    ("one_priority", "load"), [(False, 1.0), (True, 2.0)], ids=["as published", "of one priority, twice the load"]
)
@pytest.mark.parametrize("name", SHAPES)
def test_tenants_of_a_published_workload_are_served_alike_within_the_bound(
    name: str, one_priority: bool, load: float
) -> None:
    """Near the load that the policy bears, where few wait for long, and where requests of one priority pile up."""
    workload = published(name, load)
    if one_priority:
        alike = [replace(arrival, priority="standard", slo_s=60.0) for arrival in workload.arrivals]
        workload = replace(workload, arrivals=alike)
    done = simulate(workload, "headrace-untold")
    shares = []
    for spec in workload.models:
        served = served_by(workload, done, spec.id)
        if any(one.completion for one in served):
            shares.append(widest(served) / bound(served, spec.max_concurrency * len(workload.devices)))
    assert 0.1 < max(shares) <= 1, "it does not hold, or was not put to the test"


def served_by(workload: Workload, done: Figures, name: str) -> list[Served]:
    """What came for a model, and what was served of it; who left without a token has been served none."""
    asked = {arrival.id: arrival for arrival in workload.arrivals}
    rate = next(spec.decode_tokens_s for spec in workload.models if spec.id == name)
    served = []
    for one in done.requests:
        if one.model == name:
            spec = asked[one.id]
            wrote = 0 if one.first_token_s is None else min(
                spec.output_tokens, math.ceil((one.ended_s - one.first_token_s) * rate)
            )  # fmt: skip
            began_s = one.ended_s if one.started_s is None else one.started_s
            prompt = 0 if one.started_s is None else spec.prompt_tokens
            times = (round(1000 * at) for at in (one.arrived_s, began_s, one.ended_s))
            served.append(Served(one.tenant, *times, prompt, wrote, lane=LANES.index(spec.priority)))
    return served
