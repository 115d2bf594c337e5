"""The scheduling policy in a small world of workers that load, run, die and come back; what it decides in detail."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from processors.scheduler import messages, placement, policy
from processors.scheduler.messages import Action
from processors.scheduler.policy import step
from processors.scheduler.queues import Queue
from processors.scheduler.state import Limits, Pool, Request, Running
from schemas.control import Model
from schemas.events import Device, Priority, Resident, RunningAttempt, Status, WorkerStatus
from tests.support.one_machine import Machine, sized
from tests.support.scheduler_world import MODELS, TENANTS, WORKERS, World

TERM = 7
_worker = st.sampled_from(WORKERS)
_model = st.sampled_from(sorted(MODELS))


class Walk(RuleBasedStateMachine):
    """Whatever happens, in any order; the world checks what must hold after every step."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.world.healthy("w1")

    @rule(model=_model, patience_ms=st.integers(50, 60_000), tenant=st.sampled_from(TENANTS), data=st.data())
    def arrive(self, model: str, patience_ms: int, tenant: str, data: st.DataObject) -> None:
        self.world.arrive(model, patience_ms, tenant, data.draw(st.sampled_from(Priority)))

    @rule(count=st.integers(2, 6), model=_model)
    def rush(self, count: int, model: str) -> None:
        for _ in range(count):
            self.world.arrive(model, 60_000)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.asked) or ["early"])))

    @rule(name=_worker)
    def boot(self, name: str) -> None:
        self.world.boot(name)

    @rule(name=_worker)
    def healthy(self, name: str) -> None:
        self.world.healthy(name)

    @rule(name=_worker)
    def die(self, name: str) -> None:
        self.world.die(name)

    @rule()
    def take_over(self) -> None:
        self.world.take_over()

    @rule(name=_worker, stopping=st.sampled_from([False, False, False, True]))
    def heartbeat(self, name: str, stopping: bool) -> None:
        self.world.heartbeat(name, stopping=stopping)

    @rule(name=_worker, provider=st.sampled_from(["p", "q"]), is_open=st.booleans())
    def breaker(self, name: str, provider: str, is_open: bool) -> None:
        self.world.breaker(name, provider, is_open=is_open)
        self.world.heartbeat(name)

    @rule()
    def grant(self) -> None:
        self.world.grant()

    @rule(name=_worker, state=st.sampled_from(["active", "active", "failed"]))
    def settle(self, name: str, state: str) -> None:
        self.world.settle(name, state)

    @rule(name=_worker)
    def complete(self, name: str) -> None:
        self.world.generate(name)
        self.world.complete(name)

    @rule()
    def read_log(self) -> None:
        self.world.read_log()

    @rule(empty=st.booleans())
    def recover(self, empty: bool) -> None:
        self.world.recover(empty=empty)

    @rule(model=_model, kind=st.sampled_from(["load", "unload"]))
    def wish(self, model: str, kind: str) -> None:
        self.world.wish(model, kind)

    @rule(name=_worker, model=_model)
    def release(self, name: str, model: str) -> None:
        self.world.release(name, model)

    @rule(ms=st.sampled_from([50, 500, 3_000, 7_000]))
    def pass_time(self, ms: int) -> None:
        self.world.pass_time(ms)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish_all()


Walk.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestWalk = Walk.TestCase


def ready(models: dict[str, Model]) -> Pool:
    """A pool with one worker that holds each model."""
    pool = Pool(term=TERM, models=dict(models))
    status = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"])
    for action in step(pool, messages.WorkerSeen(status), 0):
        assert isinstance(action, messages.Grant)
        step(pool, messages.LeaseGranted(action.worker, action.model, 5), 0)
    status.resident = [Resident(model, 5, "active") for model in models]
    step(pool, messages.WorkerSeen(status), 0)
    return pool


def test_first_come_first_served() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    begun = []
    for number in range(4):
        actions = step(pool, messages.Arrived(Request(f"r{number}", "t", "one", 0, 9_999)), 0)
        begun += [action.request.id for action in actions if isinstance(action, messages.Assign)]
    for _ in range(4):
        actions = step(pool, messages.Finished(begun[-1]), 0)
        begun += [action.request.id for action in actions if isinstance(action, messages.Assign)]
    assert begun == ["r0", "r1", "r2", "r3"]


def test_nothing_is_given_to_a_worker_that_does_not_show_our_term() -> None:
    pool = Pool(term=TERM, models={"two": Model("two", "p", "t")})
    old = WorkerStatus("w1", "b1", "default", TERM - 1, 0, providers=["p"], resident=[Resident("two", 3, "active")])
    assert step(pool, messages.WorkerSeen(old), 0) == [messages.SendTerm("w1")]
    assert step(pool, messages.Arrived(Request("r", "t", "two", 0, 9_999)), 0) == [
        messages.Enqueued(next(iter(pool.queue("two"))))
    ]


def test_a_cancellation_that_overtakes_its_request_ends_it() -> None:
    pool = ready({"one": Model("one", "p", "t")})
    assert step(pool, messages.CancelAsked("r", "left", "t"), 0) == []
    [end] = step(pool, messages.Arrived(Request("r", "t", "one", 0, 9_999)), 1)
    assert isinstance(end, messages.End) and end.status is Status.CANCELLED


def test_a_cancellation_ends_no_request_of_another_tenant() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    assert step(pool, messages.CancelAsked("early", "left", "other"), 0) == []
    for request_id in ("early", "queued"):
        step(pool, messages.Arrived(Request(request_id, "t", "one", 0, 9_999)), 1)
    assert "early" in pool.running and "queued" in pool.queue("one")
    for request_id in ("early", "queued"):
        assert step(pool, messages.CancelAsked(request_id, "left", "other"), 2) == []
    assert "queued" in pool.queue("one") and not pool.running["early"].cancel_asked
    [end] = step(pool, messages.CancelAsked("queued", "left", "t"), 3)
    assert isinstance(end, messages.End) and end.status is Status.CANCELLED


def test_a_full_queue_sheds() -> None:
    pool = Pool(term=TERM, models={"two": Model("two", "p", "t")})
    for number in range(policy.MAX_QUEUE):
        step(pool, messages.Arrived(Request(f"r{number}", "t", "two", 0, 9_999)), 0)
    [end] = step(pool, messages.Arrived(Request("over", "t", "two", 0, 9_999)), 0)
    assert isinstance(end, messages.End) and (end.status, end.code) == (Status.REJECTED, "service_unavailable")


def test_a_deadline_ends_what_waits_and_what_runs() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    for name in ("runs", "waits"):
        step(pool, messages.Arrived(Request(name, "t", "one", 0, 500)), 0)
    assert step(pool, messages.Tick(), 500) == []
    waits, runs = step(pool, messages.Tick(), 501)
    assert isinstance(waits, messages.End) and (waits.request.id, waits.status) == ("waits", Status.EXPIRED)
    assert isinstance(runs, messages.CancelRunning) and (runs.request_id, runs.status) == ("runs", Status.EXPIRED)
    assert step(pool, messages.Tick(), 502) == [], "each is told once"


# --- fairness -----------------------------------------------------------------------------------------------------


def test_tenants_with_a_backlog_are_served_alike_within_the_bound() -> None:
    """|Wf - Wg| <= 2 max(wp L, wq M) over any interval in which both have a backlog (Sheng et al. 2024, theorem 4.4).

    L is the longest prompt, M the most completion tokens of what runs at once.
    """
    chance = random.Random(3)
    longest_prompt, longest_answer, slots = 400, 200, 4
    pool = ready({"one": Model("one", "p", "t", max_concurrency=slots)})
    served = dict.fromkeys(TENANTS, 0.0)
    seen: list[dict[str, float]] = []
    running: list[Request] = []
    asked = 0

    def note(actions: list[Action]) -> None:
        running.extend(action.request for action in actions if isinstance(action, messages.Assign))
        for action in actions:
            if isinstance(action, messages.Assign):
                served[action.request.tenant] += action.request.prompt_tokens

    for _ in range(3_000):
        for tenant in TENANTS:  # the greedy one asks for ten times as much
            while sum(one.tenant == tenant for one in pool.queue("one")) < (50 if tenant == "a" else 5):
                asked += 1
                prompt = chance.randint(1, longest_prompt)
                request = Request(f"r{asked}", tenant, "one", 0, 10**12, prompt_tokens=prompt)
                note(step(pool, messages.Arrived(request), 0))
        done = running.pop(chance.randrange(len(running)))
        answer = chance.randint(1, longest_answer)
        served[done.tenant] += 2 * answer
        note(step(pool, messages.Finished(done.id, done.prompt_tokens, answer), 0))
        seen.append(dict(served))
    bound = 2 * max(longest_prompt, 2 * slots * longest_answer)
    for one in TENANTS:
        for other in TENANTS:
            gaps = [at[one] - at[other] for at in seen]
            assert max(gaps) - min(gaps) <= bound, "no interval has a larger difference"


def test_weights_are_shares() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    pool.weights["a"] = 3.0
    for number in range(80):
        step(pool, messages.Arrived(Request(f"r{number}", "ab"[number % 2], "one", 0, 10**9)), 0)
    served = []
    for _ in range(40):
        [running] = pool.running.values()
        served.append(running.request.tenant)
        step(pool, messages.Finished(running.request.id, 0, 10), 0)
    assert served.count("a") == pytest.approx(30, abs=2)


def test_who_comes_back_has_saved_nothing_up() -> None:
    queue = Queue({})
    queue.add(Request("x", "idle", "m", 0, 1))
    queue.remove("x")
    queue.add(Request("y", "busy", "m", 0, 1))
    queue.charge("busy", 1_000.0)
    queue.add(Request("z", "idle", "m", 0, 1))
    assert queue.counters["idle"] == queue.counters["busy"] == 1_000.0


def test_priorities_go_first_and_batch_leaves_a_slot() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=2)})
    begun: list[str] = []
    for name, priority in (("b1", 2), ("b2", 2), ("s1", 1), ("s2", 1), ("i1", 0)):
        request = Request(name, "t", "one", 0, 10**9, priority=Priority(priority))
        actions = step(pool, messages.Arrived(request), 0)
        begun += [action.request.id for action in actions if isinstance(action, messages.Assign)]
    assert begun == ["b1", "s1"]
    for _ in range(3):
        actions = step(pool, messages.Finished(begun[-1]), 0)
        begun += [action.request.id for action in actions if isinstance(action, messages.Assign)]
    assert begun == ["b1", "s1", "i1", "s2"], "b2 waits for an idle slot beside it"


# --- memory -------------------------------------------------------------------------------------------------------


def test_the_cheapest_idle_set_that_suffices_gives_way() -> None:
    machine = Machine(10, [sized("dear", 4, 9_000), sized("cheap", 4), sized("small", 2), sized("new", 4)])
    for model in ("dear", "cheap", "small"):
        machine.ask(model, model)
        machine.run(10_000)
        machine.done(model)
    machine.run(60_000)
    machine.ask("r", "new")
    machine.run(2_000)
    assert machine.held == {"dear", "small", "new"}, "one of the right size, and the cheaper to load again"


def test_what_can_never_fit_is_refused_at_once() -> None:
    machine = Machine(10, [sized("huge", 11)])
    machine.ask("r", "huge")
    [end] = machine.ended
    assert end.status is Status.REJECTED and "11 bytes" in end.message
    machine.run(1_000)
    assert not machine.loads


def test_a_pinned_model_stays_whoever_waits() -> None:
    machine = Machine(10, [sized("kept", 6, pinned=True), sized("other", 6)])
    machine.run(2_000)
    assert machine.held == {"kept"}, "it is loaded without being asked for"
    machine.ask("r", "other")
    machine.run(300_000)
    assert machine.held == {"kept"}


def test_a_queue_has_its_model_within_the_longest_wait() -> None:
    """Another model is always in use, and its requests never stop coming."""
    limits = Limits(max_wait_ms=20_000, residency_loads=100.0)
    machine = Machine(10, [sized("busy", 8, max_concurrency=1), sized("rare", 8, max_concurrency=1)], limits)
    machine.ask("b0", "busy")
    for number in range(1, 9):
        machine.ask(f"b{number}", "busy")
    machine.run(2_000)
    machine.ask("rare", "rare")
    asked = machine.now
    for _ in range(30):
        machine.run(1_000)
        for running in list(machine.pool.running):
            machine.done(running)
            machine.ask(f"again-{machine.now}-{running}", "busy")
        if any(name == "rare" for _, name in machine.assigned):
            break
    [(at, _)] = [begun for begun in machine.assigned if begun[1] == "rare"]
    assert at - asked <= limits.max_wait_ms


def loads_of(machine: Machine) -> list[str]:
    return [model for _, model in machine.loads]


def waiting_for(limits: Limits, asked: list[tuple[str, int]], load_ms: int = 1_000) -> Machine:
    """All memory is in use, and so many wait for each of other models, the first for 250 ms longer than the others."""
    machine = Machine(10, [sized("used", 8), *(sized(model, 8, load_ms) for model, _ in asked)], limits)
    machine.ask("u", "used")
    machine.run(2_000)
    for model, number in asked:
        for at in range(number):
            machine.ask(f"{model}{at}", model)
        machine.run(250 if model == asked[0][0] else 0)
    return machine


def test_the_model_is_loaded_first_whose_load_gains_most() -> None:
    machine = waiting_for(Limits(), [("one", 1), ("many", 4)])
    machine.run(2_000)
    machine.done("u")
    machine.run(1_000)
    assert loads_of(machine) == ["used", "many"], "four that waited a little less are worth more than one"


def test_a_wait_of_half_the_longest_comes_before_any_gain() -> None:
    machine = waiting_for(Limits(max_wait_ms=20_000), [("one", 1), ("many", 4)])
    machine.run(9_000)
    machine.done("u")
    machine.run(1_000)
    assert loads_of(machine) == ["used", "one"]


@pytest.mark.parametrize(("max_wait_ms", "gone"), [(60_000, False), (10_000, True)], ids=["in time", "late"])
def test_nothing_makes_room_while_its_device_loads_something_else(max_wait_ms: int, gone: bool) -> None:
    models = [sized("idle", 5), sized("slow", 5, 5_000), sized("next", 5)]
    machine = Machine(10, models, Limits(max_wait_ms=max_wait_ms))
    machine.ask("i", "idle")
    machine.run(2_000)
    machine.done("i")
    machine.ask("s", "slow")
    machine.run(250)
    machine.ask("n", "next")
    machine.run(4_250)
    assert ("idle" not in machine.held) is gone
    machine.run(2_000)
    assert machine.held == {"slow", "next"}


def test_batch_work_takes_memory_from_nobody_who_works() -> None:
    machine = Machine(10, [sized("used", 8), sized("batch", 8)])
    machine.ask("u", "used")
    machine.run(2_000)
    machine.ask("b", "batch", Priority.BATCH)
    machine.run(200_000)
    assert machine.held == {"used"}
    machine.done("u")
    machine.run(3_000)
    assert machine.held == {"batch"}


def test_a_model_is_unloaded_when_its_keep_alive_has_passed() -> None:
    machine = Machine(10, [sized("brief", 4, keep_alive_ms=5_000)])
    machine.ask("r", "brief")
    machine.run(10_000)
    assert machine.held == {"brief"}, "it is in use"
    machine.done("r")
    machine.run(4_000)
    assert machine.held == {"brief"}
    machine.run(2_000)
    assert machine.held == set()


def test_memory_that_is_not_seen_to_be_free_is_quarantined() -> None:
    machine = Machine(10, [sized("old", 8), sized("new", 8)])
    machine.ask("o", "old")
    machine.run(2_000)
    machine.done("o")
    machine.run(60_000)
    keeps = machine.resident["old"]
    machine.ask("n", "new")
    machine.resident["old"] = keeps  # told to unload, it still shows the model
    machine.run(40_000)
    assert [model for _, model in machine.loads] == ["old"]
    lease = machine.pool.leases["w1", "old"]
    assert lease.state == "quarantined" and lease.holds == 8
    del machine.resident["old"]
    machine.run(2_000)
    assert machine.held == {"new"}


def test_a_worker_that_joins_holds_what_takes_no_memory_too() -> None:
    pool = ready({"one": Model("one", "p", "t")})
    joined = WorkerStatus("w2", "b1", "default", TERM, 0, providers=["p"])
    assert step(pool, messages.WorkerSeen(joined), 0) == [messages.Grant("w2", "b1", "one")]


def test_a_load_that_failed_is_tried_again_for_the_next_who_asks() -> None:
    machine = Machine(10, [sized("flaky", 4)])
    machine.ask("first", "flaky")
    epoch, _, until = machine.resident["flaky"]
    machine.resident["flaky"] = (epoch, "failed", until)
    machine.run(500)
    [end] = machine.ended
    assert (end.request.id, end.status, end.code) == ("first", Status.FAILED, "provider_error")
    machine.ask("at once", "flaky")
    assert len(machine.ended) == 2, "it is not tried for each"
    machine.run(6_000)
    machine.ask("later", "flaky")
    machine.run(2_000)
    assert [name for _, name in machine.assigned] == ["later"]


def test_a_device_that_shrinks_has_its_cheapest_idle_models_drained() -> None:
    machine = Machine(10, [sized("dear", 4, 9_000), sized("cheap", 4), sized("used", 2)])
    for model in ("dear", "cheap", "used"):
        machine.ask(model, model)
        machine.run(10_000)
    machine.done("dear")
    machine.done("cheap")
    machine.size = 7  # somebody else takes some of it
    machine.run(1_000)
    assert machine.held == {"dear", "used"}
    machine.size = 5
    machine.run(1_000)
    assert machine.held == {"used"}
    machine.size = 1
    machine.run(60_000)
    assert machine.held == {"used"}, "what is in use stays: its memory is taken, whatever we wish"


def test_a_device_that_is_gone_gets_nothing_and_keeps_nothing_idle() -> None:
    machine = Machine(10, [sized("one", 4), sized("two", 4)])
    machine.ask("r", "one")
    machine.run(2_000)
    machine.done("r")
    machine.size = 0
    machine.run(1_000)
    assert machine.held == set()
    machine.ask("s", "two")
    [refused] = machine.ended
    assert refused.status is Status.REJECTED and machine.held == set()


def _worker(name: str, *devices: Device, providers: tuple[str, ...] = ("p",), **fields: Any) -> messages.WorkerSeen:
    status = WorkerStatus(name, "b1", "default", TERM, 0, providers=list(providers), devices=list(devices), **fields)
    return messages.WorkerSeen(status)


def _granted(actions: list[messages.Action]) -> list[tuple[str, str]]:
    return [(action.worker, action.model) for action in actions if isinstance(action, messages.Grant)]


def test_memory_of_one_server_is_granted_once_whoever_reaches_it() -> None:
    models = {name: Model(name, "p", "t", bytes=6, pinned=True) for name in ("one", "two")}
    server = Device("server", 10, ["p"], shared=True)
    pool = Pool(term=TERM, models=models)
    assert _granted(step(pool, _worker("w1", server), 0)) == [("w1", "one")]
    assert _granted(step(pool, _worker("w2", server), 0)) == []
    apart = Pool(term=TERM, models=models)
    step(apart, _worker("w1", Device("card", 10, ["p"])), 0)
    assert _granted(step(apart, _worker("w2", Device("card", 10, ["p"])), 0)) == [("w2", "two")]


def test_workers_of_one_server_share_its_models_and_none_is_held_twice() -> None:
    models = {name: Model(name, "p", "t", max_concurrency=1, bytes=2, preload=False) for name in ("one", "two")}
    server = Device("server", 10, ["p"], shared=True)
    pool = Pool(term=TERM, models=models)
    for worker in ("w1", "w2"):
        step(pool, _worker(worker, server), 0)
    step(pool, messages.Arrived(Request("a", "t", "one", 0, 10**9)), 0)
    step(pool, messages.Arrived(Request("b", "t", "two", 0, 10**9)), 0)
    assert set(pool.leases) == {("w1", "one"), ("w2", "two")}
    for request in "cdef":  # more than it has slots
        step(pool, messages.Arrived(Request(request, "t", "one", 0, 10**9)), 0)
    lease = pool.leases["w1", "one"]
    lease.epoch = 5
    placement.drain(lease, 0, "an operator")
    for now in (1, 2):
        step(pool, messages.Tick(), now)
    assert set(pool.leases) == {("w1", "one"), ("w2", "two")}, "what w1 unloads would be gone for w2"
    own = Pool(term=TERM, models=models)
    for worker in ("w1", "w2"):
        step(own, _worker(worker, Device("ram", 10, ["p"])), 0)
    for request in "abc":
        step(own, messages.Arrived(Request(request, "t", "one", 0, 10**9)), 0)
    step(own, messages.Tick(), 1)
    assert set(own.leases) == {("w1", "one"), ("w2", "one")}, "with memory of its own each may hold it"


def test_only_a_providers_own_devices_hold_its_models() -> None:
    models = {"local": Model("local", "p", "t", bytes=6), "remote": Model("remote", "q", "t")}
    pool = Pool(term=TERM, models=models)
    step(pool, _worker("w1", Device("ram", 10, ["p"]), providers=("p", "q")), 0)
    leases = {model: lease.device for (_, model), lease in pool.leases.items()}
    assert leases == {"local": "ram", "remote": ""}


def test_a_model_of_unknown_size_waits_until_it_is_known() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t")})
    assert _granted(step(pool, _worker("w1", Device("ram", 10, ["p"])), 0)) == []
    sized = messages.ModelsChanged({"one": Model("one", "p", "t", bytes=4)})
    assert _granted(step(pool, sized, 0)) == [("w1", "one")]


def test_what_no_device_holds_is_taken_where_memory_is_not_counted() -> None:
    pool = Pool(term=TERM, models={"huge": Model("huge", "p", "t", bytes=99, preload=False)})
    step(pool, _worker("small", Device("ram", 10, ["p"])), 0)
    [refused] = step(pool, messages.Arrived(Request("r", "t", "huge", 0, 10**9)), 0)
    assert isinstance(refused, messages.End)
    step(pool, _worker("far"), 0)
    taken = step(pool, messages.Arrived(Request("s", "t", "huge", 0, 10**9)), 0)
    assert _granted(taken) == [("far", "huge")]


def test_a_model_on_a_worker_that_leaves_is_loaded_elsewhere() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t", bytes=4)})
    ram = Device("ram", 10, ["p"])
    step(pool, _worker("w1", ram), 0)
    step(pool, messages.LeaseGranted("w1", "one", 1), 0)
    held = [Resident("one", 1, "active", device="ram")]
    assert _granted(step(pool, _worker("w2", ram), 0)) == []
    assert _granted(step(pool, _worker("w1", ram, stopping=True, resident=held), 0)) == [("w2", "one")]


def test_a_lease_grows_with_what_its_model_is_seen_to_take() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t", bytes=4)})
    ram = Device("ram", 10, ["p"])
    step(pool, _worker("w1", ram), 0)
    step(pool, messages.LeaseGranted("w1", "one", 1), 0)
    seen = []
    for size in (3, 5, 4):
        step(pool, _worker("w1", ram, resident=[Resident("one", 1, "active", size, device="ram")]), 0)
        seen.append(pool.leases["w1", "one"].bytes)
    assert seen == [3, 5, 5], "measured, then its peak"


def test_a_prompt_is_charged_once_however_many_workers_die_under_it() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    request = Request("r", "t", "one", 0, 10**9, prompt_tokens=100)
    step(pool, messages.Arrived(request), 0)
    running = [RunningAttempt("r", 1, 5, 10)]
    shown = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], running=running)
    step(pool, messages.WorkerSeen(shown), 0)
    step(pool, messages.WorkerSeen(WorkerStatus("w1", "b2", "default", TERM, 0, providers=["p"])), 0)
    step(pool, messages.AttemptReady("r", 2), 0)
    step(pool, messages.LeaseGranted("w1", "one", 6), 0)
    held = [Resident("one", 6, "active")]
    step(pool, messages.WorkerSeen(WorkerStatus("w1", "b2", "default", TERM, 0, providers=["p"], resident=held)), 0)
    assert "r" in pool.running
    step(pool, messages.Finished("r", 110, 30), 0)
    assert pool.queue("one").counters["t"] == 110 + 2 * 30


def test_time_in_which_the_scheduler_stood_still_does_not_count_against_workers() -> None:
    pool = ready({"one": Model("one", "p", "t")})
    step(pool, messages.Tick(), 1_000)
    step(pool, messages.Tick(), 60_000)
    assert "w1" in pool.workers, "its heartbeats wait to be read"
    for now in range(60_250, 60_000 + policy.WORKER_TIMEOUT_MS, 250):
        step(pool, messages.Tick(), now)
    assert "w1" not in pool.workers


# --- batch work gives way ---------------------------------------------------------------------------------------


def _busy_with_batch(goes_on: bool) -> Pool:
    """A pool whose one slot generates batch work."""
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    step(pool, messages.Arrived(Request("batch", "t", "one", 0, 10**9, priority=Priority.BATCH)), 0)
    assert "batch" in pool.running
    _tell_running(pool, RunningAttempt("batch", 1, 5, 10, goes_on))
    return pool


def _tell_running(pool: Pool, *running: RunningAttempt) -> list[Action]:
    held = [Resident("one", 5, "active")]
    status = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], resident=held, running=list(running))
    return step(pool, messages.WorkerSeen(status), 0)


def test_batch_work_gives_its_slot_to_who_does_not_wait_and_goes_on_later() -> None:
    pool = _busy_with_batch(goes_on=True)
    enqueued, recover = step(pool, messages.Arrived(Request("now", "t", "one", 0, 10**9)), 0)
    assert isinstance(enqueued, messages.Recover) or isinstance(recover, messages.Recover)
    assert "batch" in pool.running, "it keeps its slot until its next attempt is open"
    assert not any(isinstance(action, messages.Recover) for action in step(pool, messages.Tick(), 250)), "once"
    cancel, assign = step(pool, messages.AttemptReady("batch", 2), 0)
    assert cancel == messages.CancelRunning("batch", "w1", "It gave way.", Status.CANCELLED, 1)
    assert isinstance(assign, messages.Assign) and assign.request.id == "now"
    [again] = [a for a in step(pool, messages.Finished("now", 1, 1), 0) if isinstance(a, messages.Assign)]
    assert (again.request.id, again.request.attempt) == ("batch", 2)


def test_batch_work_that_could_not_go_on_elsewhere_keeps_its_slot() -> None:
    pool = _busy_with_batch(goes_on=False)
    actions = step(pool, messages.Arrived(Request("now", "t", "one", 0, 10**9)), 0)
    assert not any(isinstance(action, messages.Recover) for action in actions)


def test_batch_work_gives_way_to_no_batch_work() -> None:
    pool = _busy_with_batch(goes_on=True)
    actions = step(pool, messages.Arrived(Request("too", "t", "one", 0, 10**9, priority=Priority.BATCH)), 0)
    assert not any(isinstance(action, messages.Recover) for action in actions)


def test_a_worker_that_dies_while_its_batch_work_gives_way_costs_no_further_attempt() -> None:
    pool = _busy_with_batch(goes_on=True)
    step(pool, messages.Arrived(Request("now", "t", "one", 0, 10**9)), 0)
    gone = step(pool, messages.WorkerSeen(WorkerStatus("w1", "b2", "default", TERM, 0, providers=["p"])), 0)
    assert not any(isinstance(action, messages.Recover) for action in gone), "its next attempt is being opened"
    step(pool, messages.AttemptReady("batch", 2), 0)
    assert [one.id for one in pool.queue("one")] == ["now", "batch"]


def test_batch_work_gives_its_memory_to_a_model_that_somebody_waits_for() -> None:
    machine = Machine(10, [sized("batch", 8), sized("wanted", 8)])
    machine.ask("b", "batch", Priority.BATCH)
    machine.run(2_000)
    machine.goes_on = {"b"}
    machine.run(500)
    machine.ask("w", "wanted")
    machine.run(5_000)
    assert machine.held == {"wanted"}
    assert [one.id for one in machine.pool.queue("batch")] == ["b"]


def test_what_runs_is_given_up_when_the_log_holds_a_later_attempt_of_it() -> None:
    pool = _busy_with_batch(goes_on=True)
    [recover] = step(pool, messages.Superseded("batch", 2), 0)
    assert isinstance(recover, messages.Recover) and "batch" in pool.recovering
    assert step(pool, messages.Superseded("batch", 3), 0) == [], "that one is ours"


# --- found by reading and by fault tests --------------------------------------------------------------------------


def test_what_is_restored_after_its_worker_was_heard_holds_its_slot() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    restored = Running(Request("old", "t", "one", 0, 10**9), "w1", "b1", 5)
    step(pool, messages.Restored(restored), 0)
    assert step(pool, messages.Arrived(Request("new", "t", "one", 0, 10**9)), 0) == [
        messages.Enqueued(next(iter(pool.queue("one"))))
    ]


def test_a_model_that_is_removed_while_its_grant_is_written_is_not_loaded() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t")})
    [grant] = step(pool, messages.WorkerSeen(WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"])), 0)
    assert isinstance(grant, messages.Grant)
    step(pool, messages.ModelsChanged({}), 0)
    assert step(pool, messages.LeaseGranted("w1", "one", 9), 0) == [
        messages.LeaseMoved("w1", "b1", "one", 9, "free"),
    ]
    assert not pool.leases


@pytest.mark.parametrize(("devices", "granted"), [([], 0), ([Device("d", 10, ["p"])], 8)])
def test_a_lease_that_loads_shows_the_bytes_that_it_was_granted(devices: list[Device], granted: int) -> None:
    pool = Pool(term=TERM, models={"one": sized("one", 8)})
    step(pool, messages.Arrived(Request("r", "t", "one", 0, 10**9)), 0)
    step(pool, messages.WorkerSeen(WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], devices=devices)), 0)
    assert step(pool, messages.LeaseGranted("w1", "one", 9), 0) == [
        messages.Load("w1", "b1", "one", 9, "d" if devices else ""),
        messages.LeaseMoved("w1", "b1", "one", 9, "loading", granted, device="d" if devices else ""),
    ]


def test_a_worker_forgets_a_failed_model_that_was_removed() -> None:
    pool = ready({"one": Model("one", "p", "t")})
    status = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], resident=[Resident("one", 5, "failed")])
    step(pool, messages.WorkerSeen(status), 0)
    assert step(pool, messages.ModelsChanged({}), 0) == [messages.Unload("w1", "b1", "one", 5)]


def heartbeat(name: str, *resident: Resident, broken: tuple[str, ...] = ()) -> messages.WorkerSeen:
    return messages.WorkerSeen(
        WorkerStatus(
            name, f"b-{name}", "default", TERM, 0, providers=["p", "q"], resident=list(resident),
            broken=dict.fromkeys(broken, "it does not answer"),
        )
    )  # fmt: skip


def two_workers() -> tuple[Pool, dict[str, Resident]]:
    """A pool whose two workers hold a model of provider p."""
    pool = Pool(term=TERM, models={"m": Model("m", "p", "t", max_concurrency=1)})
    held: dict[str, Resident] = {}
    for epoch, name in enumerate(("w1", "w2"), start=1):
        step(pool, heartbeat(name), 0)
        step(pool, messages.LeaseGranted(name, "m", epoch), 0)
        held[name] = Resident("m", epoch, "active")
        step(pool, heartbeat(name, held[name]), 0)
    return pool, held


def arrive(pool: Pool, request_id: str, now_ms: int = 0) -> list[Action]:
    return step(pool, messages.Arrived(Request(request_id, "t", "m", now_ms, now_ms + 9_999)), now_ms)


def test_a_worker_whose_provider_is_broken_gets_nothing_of_it() -> None:
    pool, held = two_workers()
    step(pool, heartbeat("w1", held["w1"], broken=("p",)), 0)
    step(pool, heartbeat("w2", held["w2"], broken=("q",)), 0)
    assert [action.worker for action in arrive(pool, "a") if isinstance(action, messages.Assign)] == ["w2"]
    assert [type(action) for action in arrive(pool, "b")] == [messages.Enqueued], "it waits for the one that works"
    assert policy.broken_reason(pool, pool.models["m"]) is None
    again = step(pool, heartbeat("w1", held["w1"]), 0)
    assert [action.worker for action in again if isinstance(action, messages.Assign)] == ["w1"]


def test_what_waits_for_a_provider_that_is_broken_everywhere_fails_at_once() -> None:
    pool, held = two_workers()
    for request_id in ("a", "b", "c"):
        arrive(pool, request_id)
    step(pool, heartbeat("w1", held["w1"], broken=("p",)), 0)
    assert pool.queued == 1
    [end] = step(pool, heartbeat("w2", held["w2"], broken=("p",)), 0)
    assert isinstance(end, messages.End) and end.request.id == "c"
    assert (end.status, end.code, end.retry_after_s) == (Status.FAILED, "provider_error", policy.BROKEN_RETRY_S)
    assert "it does not answer" in end.message
    assert set(pool.running) == {"a", "b"}, "what runs may yet end well"
    [late] = arrive(pool, "d")
    assert isinstance(late, messages.End) and late.code == "provider_error"
    assert policy.broken_reason(pool, pool.models["m"]) == "it does not answer"


def test_a_model_is_not_loaded_where_its_provider_is_broken() -> None:
    pool = Pool(term=TERM, models={"m": Model("m", "p", "t")})
    assert step(pool, heartbeat("w1", broken=("p",)), 0) == []
    assert [type(action) for action in step(pool, heartbeat("w1"), 0)] == [messages.Grant]


@pytest.mark.parametrize("fallbacks", [("other",), ()])
def test_a_load_that_failed_is_tried_again_while_its_requests_go_to_a_fallback(fallbacks: tuple[str, ...]) -> None:
    pool = Pool(term=TERM, models={"m": Model("m", "p", "t", preload=False, fallbacks=fallbacks)})
    step(pool, heartbeat("w1"), 0)
    arrive(pool, "a")
    step(pool, messages.LeaseGranted("w1", "m", 1), 0)
    failed = heartbeat("w1", Resident("m", 1, "failed", error="no"))
    ends = step(pool, failed, 0)
    assert [action.code for action in ends if isinstance(action, messages.End)] == ["provider_error"]
    assert policy.load_error(pool, "m") == "no"
    assert step(pool, failed, placement.RELOAD_AFTER_MS - 1) == []
    again = [type(action) for action in step(pool, messages.Tick(), placement.RELOAD_AFTER_MS)]
    assert again == ([messages.Grant] if fallbacks else []), "without one the next request asks for it"


def test_a_wait_beyond_the_deadline_is_refused_with_an_honest_estimate() -> None:
    pool, _ = two_workers()
    for number in range(6):
        arrive(pool, f"r{number}")
    pool.service_ms["m"] = 5_100.0  # 4 wait for 2 slots, which are taken
    [end] = arrive(pool, "late")
    assert isinstance(end, messages.End) and (end.status, end.code) == (Status.REJECTED, "service_unavailable")
    assert "about 13 s" in end.message and end.retry_after_s == 13


def test_the_wait_of_one_who_goes_first_is_not_that_of_the_queue() -> None:
    pool, _ = two_workers()
    model = pool.models["m"]
    pool.service_ms["m"] = 1_000.0
    waits = [policy.estimated_wait_ms(pool, model)]
    for number in range(6):
        arrive(pool, f"r{number}")
        waits.append(policy.estimated_wait_ms(pool, model))
    assert waits == [0, 0, 500, 1_000, 1_000, 1_000, 1_000], "others of its tenant wait, and it waits for one of them"
    assert policy.estimated_wait_ms(pool, model, "t") == 2_500
    assert policy.estimated_wait_ms(pool, model, "t", Priority.INTERACTIVE) == 500
    assert policy.estimated_wait_ms(pool, model, "other", Priority.BATCH) == 2_500
    pool.weights["other"] = 0.5
    assert policy.estimated_wait_ms(pool, model, "other") == 1_500, "two of a tenant with twice its share"
    pool.weights["large"] = 4.0
    assert policy.estimated_wait_ms(pool, model) == 625, "the least is that of the largest share"


def test_slots_that_batch_work_gives_up_are_no_wait() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    pool.service_ms["one"] = 60_000.0
    step(pool, messages.Arrived(Request("batch", "t", "one", 0, 10**9, priority=Priority.BATCH)), 0)
    model = pool.models["one"]
    assert policy.estimated_wait_ms(pool, model) == 60_000, "it cannot go on elsewhere yet"
    pool.running["batch"].goes_on = True
    assert (
        policy.estimated_wait_ms(pool, model) == policy.estimated_wait_ms(pool, model, "t", Priority.INTERACTIVE) == 0
    )
    assert policy.estimated_wait_ms(pool, model, "t", Priority.BATCH) == 60_000
    [yielded, *_] = step(pool, messages.Arrived(Request("now", "t", "one", 0, 5_000)), 0)
    assert isinstance(yielded, messages.Recover) and yielded.running.request.id == "batch"
    wide = ready({"one": Model("one", "p", "t", max_concurrency=4)})
    wide.service_ms["one"] = 1_000.0
    for number in range(3):
        step(wide, messages.Arrived(Request(f"r{number}", "t", "one", 0, 10**9)), 0)
    assert policy.estimated_wait_ms(wide, wide.models["one"]) == 0
    assert policy.estimated_wait_ms(wide, wide.models["one"], "t", Priority.BATCH) == 250, "it leaves a slot free"


def test_what_ended_before_its_request_came_again_holds_no_slot() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})

    def seen(*running: RunningAttempt) -> None:
        resident = [Resident("one", 5, "active")]
        shown = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], resident=resident, running=list(running))
        step(pool, messages.WorkerSeen(shown), 0)

    seen(RunningAttempt("again", 1, 5))  # the scheduler before gave it, and did not come to write that down
    assert [type(one) for one in step(pool, messages.Arrived(Request("next", "t", "one", 0, 500)), 0)] == [
        messages.Enqueued
    ], "its slot is taken"
    seen()
    assert pool.leases["w1", "one"].running == {"next"}
    assert [type(one) for one in step(pool, messages.Arrived(Request("again", "t", "one", 0, 500)), 0)] == [
        messages.Adopt
    ], "the log tells of its end"
    assert pool.leases["w1", "one"].running == {"next"}


def test_what_need_not_begin_any_more_is_refused_early_or_ends_while_it_waits() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})

    def hurried(name: str, start_by_ms: int, now_ms: int = 0) -> list[Action]:
        return step(pool, messages.Arrived(Request(name, "t", "one", now_ms, 10**6, start_by_ms=start_by_ms)), now_ms)

    assert [type(action) for action in hurried("runs", 500)] == [messages.Assign]
    assert [type(action) for action in hurried("waits", 500)] == [messages.Enqueued]
    assert step(pool, messages.Tick(), 500) == []
    [end] = step(pool, messages.Tick(), 501)
    assert isinstance(end, messages.End) and (end.request.id, end.status) == ("waits", Status.EXPIRED), "and no other"
    assert end.code == "deadline_exceeded" and "was to begin by now" in end.message
    [gone] = hurried("gone", 500, now_ms=501)
    assert isinstance(gone, messages.End) and gone.status is Status.EXPIRED
    pool.service_ms["one"] = 3_000.0
    hurried("patient", 0, now_ms=501)
    [refused] = hurried("cannot", 2_500, now_ms=501)
    assert isinstance(refused, messages.End) and (refused.status, refused.retry_after_s) == (Status.REJECTED, 6)


@pytest.mark.parametrize("begun", [True, False])
def test_an_answer_that_began_in_time_may_go_on_late(begun: bool) -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    step(pool, messages.Arrived(Request("r", "t", "one", 0, 10**6, start_by_ms=20_000)), 0)
    step(pool, messages.Tick(), 10_000)  # the worker was silent: its request is lost
    actions = step(pool, messages.AttemptReady("r", 2, begun=begun), 10_000) + step(pool, messages.Tick(), 20_001)
    ends = [action.status for action in actions if isinstance(action, messages.End)]
    assert (ends, "r" in pool.queue("one")) == ([] if begun else [Status.EXPIRED], begun)


def test_a_stray_is_cancelled_by_its_number_so_that_its_successor_there_is_not() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    step(pool, messages.Arrived(Request("r", "t", "one", 0, 10**9)), 0)
    step(pool, messages.Tick(), 10**6)  # the worker was silent: its request is lost
    step(pool, messages.AttemptReady("r", 2), 10**6)
    woken = [RunningAttempt("r", 1, 5, 10)]
    shown = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], running=woken, fence=pool.fences["w1"])
    strays = [one for one in step(pool, messages.WorkerSeen(shown), 10**6) if isinstance(one, messages.CancelRunning)]
    assert [(one.request_id, one.worker, one.attempt) for one in strays] == [("r", "w1", 1)]
