"""The scheduling policy in a small world of workers that load, run, die and come back; what it decides in detail."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from processors.scheduler import messages, policy
from processors.scheduler.messages import Action
from processors.scheduler.policy import step
from processors.scheduler.queues import Queue
from processors.scheduler.state import Pool, Request, Running
from schemas.control import Model
from schemas.events import Priority, Resident, RunningAttempt, Status, WorkerStatus
from tests.support.one_machine import TERM, ready
from tests.support.scheduler_machines import MODELS, SERVED, SIZE, WORKERS
from tests.support.scheduler_world import INGRESSES, TENANTS, World

_worker = st.sampled_from(WORKERS)
_model = st.sampled_from(sorted(MODELS | SERVED))


class Walk(RuleBasedStateMachine):
    """Whatever happens, in any order; the world checks what must hold after every step."""

    @initialize(server=st.booleans())
    def begin(self, server: bool) -> None:
        self.world = World(server=server)
        self.world.healthy("w1")

    @rule(model=_model, patience_ms=st.integers(50, 60_000), tenant=st.sampled_from(TENANTS), data=st.data())
    def arrive(self, model: str, patience_ms: int, tenant: str, data: st.DataObject) -> None:
        model = model if model in self.world.names else "one"
        self.world.arrive(model, patience_ms, tenant, data.draw(st.sampled_from(Priority)))

    @rule(count=st.integers(2, 6), model=_model)
    def rush(self, count: int, model: str) -> None:
        for _ in range(count):
            self.world.arrive(model if model in self.world.names else "one", 60_000)

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

    @rule(names=st.sampled_from([("w1",), ("w2",), WORKERS]), provider=st.sampled_from("pqo"), is_open=st.booleans())
    def breaker(self, names: tuple[str, ...], provider: str, is_open: bool) -> None:
        for name in names:
            self.world.breaker(name, provider, is_open=is_open)
            self.world.heartbeat(name)

    @rule(name=_worker, size=st.integers(-1, SIZE))
    def resize(self, name: str, size: int) -> None:
        if size < 0:
            self.world.fall_off(name)
        else:
            self.world.resize(name, size)
        self.world.heartbeat(name)

    @rule(model=_model, delete=st.sampled_from([None, False, True]))
    def remove(self, model: str, delete: bool | None) -> None:
        if delete is None:
            self.world.restore(model)
        else:
            self.world.remove(model, delete=delete)

    @rule(model=_model, field=st.sampled_from(["bytes", "max_concurrency", "pinned"]), value=st.integers(1, 2))
    def register(self, model: str, field: str, value: int) -> None:
        self.world.register(model, **{field: value == 1 if field == "pinned" else value})

    @rule(tenant=st.sampled_from(TENANTS), app=st.booleans())
    def revoke(self, tenant: str, app: bool) -> None:
        self.world.revoke(tenant, app=app)

    @rule(name=st.sampled_from(INGRESSES), lost=st.booleans())
    def ingress(self, name: str, lost: bool) -> None:
        (self.world.lose_ingress if lost else self.world.boot_ingress)(name)

    @rule(name=st.sampled_from([*SERVED, "?"]), size=st.integers(1, 4))
    def others(self, name: str, size: int) -> None:
        self.world.others_load(name, size)

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


def test_a_prompt_is_charged_once_however_many_workers_die_under_it() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    request = Request("r", "t", "one", 0, 10**9, prompt_tokens=100)
    step(pool, messages.Arrived(request), 0)
    running = [RunningAttempt("r", 1, 5, 10)]
    shown = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], running=running)
    step(pool, messages.WorkerSeen(shown), 0)
    step(pool, messages.WorkerSeen(WorkerStatus("w1", "b2", "default", TERM, 0, providers=["p"])), 0)
    step(pool, messages.AttemptReady("r", 2), 0)
    step(pool, messages.LeaseGranted("w1", "b2", "one", 6), 0)
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


# --- found by reading and by fault tests --------------------------------------------------------------------------


def test_what_is_restored_after_its_worker_was_heard_holds_its_slot() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    restored = Running(Request("old", "t", "one", 0, 10**9), "w1", "b1", 5)
    step(pool, messages.Restored(restored), 0)
    assert step(pool, messages.Arrived(Request("new", "t", "one", 0, 10**9)), 0) == [
        messages.Enqueued(next(iter(pool.queue("one"))))
    ]


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


def test_a_stray_is_cancelled_by_its_number_so_that_its_successor_there_is_not() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    step(pool, messages.Arrived(Request("r", "t", "one", 0, 10**9)), 0)
    step(pool, messages.Tick(), 10**6)  # the worker was silent: its request is lost
    step(pool, messages.AttemptReady("r", 2), 10**6)
    woken = [RunningAttempt("r", 1, 5, 10)]
    shown = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], running=woken, fence=pool.fences["w1"])
    strays = [one for one in step(pool, messages.WorkerSeen(shown), 10**6) if isinstance(one, messages.CancelRunning)]
    assert [(one.request_id, one.worker, one.attempt) for one in strays] == [("r", "w1", 1)]
