"""Batch work gives its slots and its memory to others, and goes on later."""

from __future__ import annotations

from processors.scheduler import messages, policy
from processors.scheduler.messages import Action
from processors.scheduler.policy import step
from processors.scheduler.state import Pool, Request
from schemas.control import Model
from schemas.events import Priority, Resident, RunningAttempt, Status, WorkerStatus
from tests.support.one_machine import TERM, Machine, ready, sized


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


def test_slots_that_batch_work_gives_up_are_no_wait() -> None:
    pool = ready({"one": Model("one", "p", "t", max_concurrency=1)})
    pool.service_ms["one"] = 60_000.0
    step(pool, messages.Arrived(Request("batch", "t", "one", 0, 10**9, priority=Priority.BATCH)), 0)
    model = pool.models["one"]
    assert policy.estimated_wait_ms(pool, model, 0) == 60_000, "it cannot go on elsewhere yet"
    pool.running["batch"].goes_on = True
    waits = [
        policy.estimated_wait_ms(pool, model, 0),
        policy.estimated_wait_ms(pool, model, 0, "t", Priority.INTERACTIVE),
    ]
    assert waits == [0, 0]
    assert policy.estimated_wait_ms(pool, model, 0, "t", Priority.BATCH) == 60_000
    [yielded, *_] = step(pool, messages.Arrived(Request("now", "t", "one", 0, 5_000)), 0)
    assert isinstance(yielded, messages.Recover) and yielded.running.request.id == "batch"
    wide = ready({"one": Model("one", "p", "t", max_concurrency=4)})
    wide.service_ms["one"] = 1_000.0
    for number in range(3):
        step(wide, messages.Arrived(Request(f"r{number}", "t", "one", 0, 10**9)), 0)
    assert policy.estimated_wait_ms(wide, wide.models["one"], 0) == 0
    assert policy.estimated_wait_ms(wide, wide.models["one"], 0, "t", Priority.BATCH) == 250, "it leaves a slot free"
