"""Workers that stop in order: what they leave goes on elsewhere at once, and nobody waits until they are missed."""

from __future__ import annotations

from processors.scheduler import messages
from processors.scheduler.messages import Action, Assign, LeaseMoved, Recover
from processors.scheduler.policy import MAX_ATTEMPTS, step
from processors.scheduler.state import Pool, Request, Taking
from schemas.control import Model
from schemas.events import Resident, RunningAttempt, WorkerStatus

TERM = 7
MODEL = Model("m", "p", "t", max_concurrency=4)


def seen(worker: str, *running: tuple[str, int], boot: str = "b", left: bool = False) -> messages.WorkerSeen:
    """A heartbeat of a worker that holds the model and runs these attempts; or its last, with nothing of that."""
    return messages.WorkerSeen(
        WorkerStatus(
            worker,
            boot,
            "default",
            TERM,
            0,
            providers=["p"],
            resident=[] if left else [Resident("m", 3, "active")],
            running=[] if left else [RunningAttempt(name, attempt, 3, 5, True) for name, attempt in running],
            stopping=left,
            left=left,
        )
    )


def pool_of(*workers: str) -> Pool:
    pool = Pool(term=TERM, models={"m": MODEL})
    for worker in workers:
        step(pool, seen(worker), 0)
    return pool


def of_kind(actions: list[Action], kind: type[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def test_what_a_worker_leaves_goes_on_at_once() -> None:
    pool = pool_of("w1")
    step(pool, messages.Arrived(Request("r", "t", "m", 0, 600_000)), 0)
    assert pool.running["r"].worker == "w1"
    step(pool, seen("w2"), 0)
    actions = step(pool, seen("w1", left=True), 10)
    [recover] = of_kind(actions, Recover)
    assert isinstance(recover, Recover) and (recover.may_retry, recover.reason) == (True, "worker w1 stopped")
    [moved] = of_kind(actions, LeaseMoved)
    assert isinstance(moved, LeaseMoved) and (moved.worker, moved.state, moved.reason) == (
        "w1", "lost", "the worker stopped",
    )  # fmt: skip
    assert set(pool.workers) == {"w2"}
    [assign] = of_kind(step(pool, messages.AttemptReady("r", 2, begun=True), 20), Assign)
    assert isinstance(assign, Assign) and (assign.worker, assign.request.attempt) == ("w2", 2)


def test_restarts_of_workers_are_not_held_against_a_request() -> None:
    pool = pool_of("w1")
    step(pool, messages.Arrived(Request("r", "t", "m", 0, 600_000)), 0)
    for round_ in range(MAX_ATTEMPTS + 2):
        boot = f"b{round_}" if round_ else "b"
        [recover] = of_kind(step(pool, seen("w1", boot=boot, left=True), 0), Recover)
        assert isinstance(recover, Recover) and recover.may_retry
        step(pool, seen("w1", boot=f"b{round_ + 1}"), 0)
        step(pool, messages.AttemptReady("r", round_ + 2, begun=True), 0)
        assert pool.running["r"].request.attempt == round_ + 2


def test_the_last_word_of_an_earlier_process_is_not_that_of_the_next() -> None:
    pool = pool_of("w1")
    step(pool, seen("w1", boot="b2"), 0)
    step(pool, messages.Arrived(Request("r", "t", "m", 0, 600_000)), 0)
    assert of_kind(step(pool, seen("w1", boot="b", left=True), 0), Recover) == []
    assert pool.workers["w1"].status.boot == "b2" and "r" in pool.running


def test_who_takes_a_pool_does_not_wait_for_a_worker_that_leaves() -> None:
    pool = Pool(term=TERM, taking=Taking.WAITING, models={"m": MODEL})
    old = seen("w1").status
    old.term = TERM - 1
    step(pool, messages.WorkerSeen(old), 0)
    assert of_kind(step(pool, messages.Heard(), 0), messages.ReadLog) == []
    assert of_kind(step(pool, seen("w1", left=True), 0), messages.ReadLog) == [messages.ReadLog()]
