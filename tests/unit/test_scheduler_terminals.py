"""Ends that a scheduler writes: which times of an answer whose worker was lost they tell, and how those are metered."""

from __future__ import annotations

import pytest

from processors.metering.meter import usage_of
from processors.scheduler import messages
from processors.scheduler.policy import step
from processors.scheduler.sent import Sent
from processors.scheduler.state import Pool, Request, Running, Taking
from processors.scheduler.takeover import restored
from processors.scheduler.terminals import assigned_at, terminal_of
from schemas.control import Model
from schemas.events import BodyRef, LiveRequest, Resident, Routed, RunningAttempt, Status, WorkerStatus
from topics.frames import Delta, Kind

RID = "0" * 32
ROUTED = Routed(RID, "t", "k", "m", "m", "pool", 0, BodyRef(0, 0), accepted_ms=1_000, routed_ms=1_010)
NOTHING = Sent()
TEXT = Sent()
TEXT.add(Delta(bytes(16), 1, 1, Kind.TEXT, 0, "a", 1), 1_500)
TEXT.add(Delta(bytes(16), 1, 2, Kind.TEXT, 0, "b", 1), 1_900)


@pytest.mark.parametrize(
    ("sent", "assigned_ms", "started_ms", "queue_ms"),
    [
        (TEXT, 1_200, 1_200, 200),
        (TEXT, 0, 1_500, 500),
        (TEXT, 1_700, 1_500, 500),
        (NOTHING, 1_200, 0, 0),
        (None, 0, 0, 0),
    ],
    ids=["assigned", "taken over", "went on after its first token", "nothing was sent", "never had a worker"],
)
def test_the_times_of_an_answer_whose_worker_was_lost_are_those_that_are_known(
    sent: Sent | None, assigned_ms: int, started_ms: int, queue_ms: int
) -> None:
    terminal = terminal_of(ROUTED, 2, Status.FAILED, sent=sent, assigned_ms=assigned_ms)
    assert (terminal.timings.assigned_ms, terminal.timings.started_ms) == (assigned_ms, started_ms)
    usage = usage_of(terminal)
    assert usage.queue_ms == queue_ms
    assert usage.ttft_ms == (500 if sent is TEXT else 0)
    assert usage.generation_ms == (terminal.timings.finished_ms - started_ms if started_ms else 0)
    assert usage.load_ms == 0


def pool() -> Pool:
    model = Model("m", "p", "t", max_concurrency=4)
    made = Pool(term=7, taking=Taking.WAITING, models={"m": model})
    step(made, messages.Heard(), 100)
    return made


def seen(*running: str) -> messages.WorkerSeen:
    attempts = [RunningAttempt(name, 1, 3) for name in running]
    return messages.WorkerSeen(
        WorkerStatus("w", "b", "pool", 7, 0, ["p"], [Resident("m", 3, "active")], running=attempts)
    )


def request() -> Request:
    return Request(RID, "t", "m", 100, 600_000)


def running(*events: tuple[int, messages.Event]) -> Running:
    """The request as it runs after events, each with the time when it comes."""
    made = pool()
    for now_ms, event in events:
        step(made, event, now_ms)
    return made.running[RID]


def test_what_this_scheduler_assigned_has_the_time_of_that() -> None:
    found = running((150, seen()), (180, messages.LogRead()), (200, messages.Arrived(request())))
    assert (found.worker, assigned_at(found)) == ("w", 200)


def test_what_a_worker_had_from_the_scheduler_before_has_none() -> None:
    found = running((200, seen(RID)), (200, messages.Arrived(request())))
    assert (found.worker, found.began_ms, assigned_at(found)) == ("w", 200, 0)


def test_neither_has_what_was_restored_until_it_is_assigned_anew() -> None:
    live = LiveRequest(RID, "t", "pool", "m", 0, 0, 1_000, "", 0, worker="w", boot="b", epoch=3)
    before = restored(live, ROUTED)
    assert before.began_ms > 0 and assigned_at(before) == 0
    before.request.deadline_ms = 600_000
    anew = running(
        (150, messages.Restored(before)),
        (160, seen()),
        (180, messages.LogRead()),
        (200, messages.AttemptReady(RID, 2)),
    )
    assert (anew.request.attempt, assigned_at(anew)) == (2, 200)


def test_who_had_no_worker_was_not_assigned() -> None:
    waited = request()
    waited.waiting_ms = 100
    assert assigned_at(Running(waited, "", "", 0, began_ms=200)) == 0
