"""Taking a pool: what the scheduler before had given to workers and not written down, and what it still does itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
import pytest

from processors.scheduler import messages
from processors.scheduler.messages import Action, Adopt, Assign, CancelRunning, Event, ReadLog, SendTerm
from processors.scheduler.policy import STRAYS_MS, WORKER_TIMEOUT_MS, step
from processors.scheduler.state import Pool, Request, Stray, Taking
from processors.scheduler.takeover import live_of
from processors.scheduler.tenure import UNSURE_MS, Deposed, Tenure
from schemas.control import Model
from schemas.events import LiveRequest, Resident, RunningAttempt, Status, WorkerStatus

TERM = 7
MODEL = Model("m", "p", "t", max_concurrency=4)


def request(name: str) -> Request:
    return Request(name, "t", "m", 0, 600_000)


def seen(worker: str, *running: str, term: int = TERM) -> messages.WorkerSeen:
    """A heartbeat of a worker that holds the model and runs these requests."""
    attempts = [RunningAttempt(name, 1, 3) for name in running]
    return messages.WorkerSeen(
        WorkerStatus(worker, "b", "pool", term, 0, ["p"], [Resident("m", 3, "active")], running=attempts)
    )


def taking(*workers: str) -> Pool:
    """A pool that is being taken, with workers that have not shown the term yet."""
    pool = Pool(term=TERM, taking=Taking.WAITING, models={"m": MODEL})
    for worker in workers:
        step(pool, seen(worker, term=TERM - 1), 0)
    assert step(pool, messages.Heard(), 0) == []
    return pool


def told(pool: Pool, *events: Event, now_ms: int = 0) -> list[Action]:
    return [
        action
        for event in events
        for action in step(pool, event, now_ms)
        if not isinstance(action, messages.LeaseMoved)
    ]


def passing(pool: Pool, worker: str, since_ms: int, until_ms: int) -> list[Action]:
    """Time passes, in which only this worker is heard."""
    return [
        action
        for now_ms in range(since_ms, until_ms, 500)
        for action in told(pool, seen(worker), messages.Tick(), now_ms=now_ms)
    ]


def test_nothing_is_assigned_before_every_worker_has_shown_the_term_and_the_log_is_read() -> None:
    pool = taking("w1", "w2")
    assert not any(isinstance(one, Assign) for one in told(pool, messages.Arrived(request("r")), seen("w1")))
    assert told(pool, seen("w2")) == [ReadLog()]
    assert told(pool, seen("w1"), messages.Tick()) == [], "it is asked for once"
    [assigned] = told(pool, messages.LogRead())
    assert isinstance(assigned, Assign)


def test_a_worker_that_is_gone_is_not_waited_for() -> None:
    pool = taking("w1", "w2")
    assert passing(pool, "w1", 0, WORKER_TIMEOUT_MS) == []
    assert passing(pool, "w1", WORKER_TIMEOUT_MS, WORKER_TIMEOUT_MS + 501) == [ReadLog()]


@pytest.mark.parametrize("when", ["before the worker is heard", "after it is heard", "after the pool is taken"])
def test_what_a_worker_runs_already_is_not_given_again(when: str) -> None:
    pool = taking("w1", "w2")
    actions: list[Action] = []
    if when == "before the worker is heard":
        actions += told(pool, messages.Arrived(request("r")))
    actions += told(pool, seen("w1", "r"), seen("w2"))
    if when == "after it is heard":
        actions += told(pool, messages.Arrived(request("r")))
    actions += told(pool, messages.LogRead(), seen("w1", "r"))
    if when == "after the pool is taken":
        actions += told(pool, messages.Arrived(request("r")))
    actions += told(pool, seen("w1", "r"), seen("w2"))
    adopted = [one for one in actions if isinstance(one, Adopt)]
    assert [(one.request.id, one.worker, one.epoch) for one in adopted] == [("r", "w1", 3)]
    assert not any(isinstance(one, Assign | CancelRunning) for one in actions)
    assert pool.leases["w1", "m"].running == {"r"} and pool.leases["w1", "m"].used == 1


def test_what_nobody_comes_for_is_ended() -> None:
    pool = taking("w1")
    told(pool, seen("w1", "r"), messages.LogRead())
    assert told(pool, seen("w1", "r"), now_ms=STRAYS_MS - 1) == []
    assert pool.leases["w1", "m"].used == 1, "it has a slot meanwhile"
    told(pool, messages.Tick(), now_ms=STRAYS_MS + 1)
    [ended] = [one for one in told(pool, seen("w1", "r"), now_ms=STRAYS_MS + 2) if not isinstance(one, SendTerm)]
    assert ended == CancelRunning("r", "w1", "The attempt was superseded.", Status.CANCELLED, 1)


def test_a_model_is_not_unloaded_under_what_nobody_came_for() -> None:
    pool = taking("w1")
    told(pool, seen("w1", "r"), messages.LogRead())
    told(pool, seen("w1", "r"), messages.UnloadAsked("m", "an operator"), now_ms=STRAYS_MS - 1)
    assert told(pool, messages.Tick(), now_ms=STRAYS_MS + 1) == [], "it runs until its worker is told to end it"
    ended = told(pool, seen("w1", "r"), now_ms=STRAYS_MS + 2)
    assert [type(one) for one in ended] == [CancelRunning, messages.Unload], "which comes first"


def test_a_caller_who_left_meanwhile_is_not_forgotten() -> None:
    pool = taking("w1")
    told(pool, seen("w1", "r"), messages.LogRead(), messages.CancelAsked("r", "left", "t"))
    _, cancelled = told(pool, messages.Arrived(request("r")))
    assert cancelled == CancelRunning("r", "w1", "left", Status.CANCELLED)


def test_what_an_adopted_attempt_s_worker_had_is_lost_with_it() -> None:
    pool = taking("w1", "w2")
    told(pool, seen("w1", "r"), seen("w2"), messages.LogRead())
    passing(pool, "w2", 0, WORKER_TIMEOUT_MS + 501)
    assert "w1" not in pool.workers
    [adopted] = told(pool, messages.Arrived(request("r")), now_ms=WORKER_TIMEOUT_MS + 501)
    assert isinstance(adopted, Adopt)
    [lost] = told(pool, messages.Tick(), now_ms=WORKER_TIMEOUT_MS + 502)
    assert isinstance(lost, messages.Recover) and lost.running.request.id == "r"


# --- what nothing but the commands tells ---------------------------------------------------------------------------


def opened(name: str, attempt: int) -> Request:
    return Request(name, "t", "m", 0, 600_000, attempt=attempt, opened_before=True)


@pytest.mark.parametrize("when", ["before the pool is taken", "after it is taken"])
def test_what_a_silent_worker_was_given_is_lost_with_it_and_not_given_again_as_it_is(when: str) -> None:
    pool = taking("w1")
    pool.given["r", 1] = Stray("gone", "b", 3)
    came, taken = messages.Arrived(request("r")), [seen("w1"), messages.LogRead()]
    actions = told(pool, *([came, *taken] if when == "before the pool is taken" else [*taken, came]))
    assert Adopt(pool.running["r"].request, "gone", "b", 3) in actions, "its record outlives us"
    [lost] = passing(pool, "w1", WORKER_TIMEOUT_MS, WORKER_TIMEOUT_MS + 501)
    assert isinstance(lost, messages.Recover) and lost.running.request.id == "r"
    [given] = told(pool, messages.AttemptReady("r", 2), now_ms=WORKER_TIMEOUT_MS + 501)
    assert isinstance(given, Assign) and (given.worker, given.request.attempt) == ("w1", 2)


def test_what_a_worker_was_given_and_has_ended_is_not_given_again() -> None:
    pool = taking("w1")
    pool.given["r", 1] = Stray("w1", "b", 3)
    *_, lost, read = told(pool, messages.Arrived(request("r")), seen("w1"))
    assert isinstance(lost, messages.Recover) and read == ReadLog()
    assert told(pool, messages.Finished("r", 1, 1), messages.LogRead()) == []
    assert not pool.recovering


def test_what_a_worker_was_told_too_late_and_refused_is_not_waited_for() -> None:
    pool = taking("w1")
    pool.given["r", 1] = Stray("w1", "b", 3)
    actions = told(pool, seen("w1"), messages.LogRead(), messages.Arrived(request("r")))
    assert [type(one) for one in actions] == [ReadLog, messages.Enqueued, messages.Recover]
    assert "r" not in pool.running


def test_what_runs_is_not_ended_before_its_next_attempt_is_open() -> None:
    pool = taking("w1", "w2")
    told(pool, messages.Arrived(request("r")), seen("w1", "r"), seen("w2"), messages.LogRead())
    told(pool, messages.Superseded("r", 2))
    assert told(pool, seen("w1", "r")) == [], "an end that it told of would be the request's"
    told(pool, messages.AttemptReady("r", 2))
    [ended] = [one for one in told(pool, seen("w1", "r")) if isinstance(one, CancelRunning)]
    assert ended.attempt == 1


def test_an_attempt_that_was_opened_and_given_to_nobody_is_not_given_either() -> None:
    pool = taking("w1")
    *_, fenced = told(pool, messages.Arrived(opened("r", 2)), seen("w1"), messages.LogRead())
    assert isinstance(fenced, messages.Recover) and fenced.running.request.attempt == 2
    told(pool, messages.AttemptReady("r", 3))
    assert pool.running["r"].request.attempt == 3


def test_one_that_was_opened_and_comes_after_the_pool_is_taken_is_written_down_first() -> None:
    pool = taking("w1")
    enqueued, fenced = told(pool, seen("w1"), messages.LogRead(), messages.Arrived(opened("r", 2)))[1:]
    assert isinstance(enqueued, messages.Enqueued) and isinstance(fenced, messages.Recover)


def test_an_attempt_that_was_opened_and_that_its_worker_shows_goes_on() -> None:
    pool = taking("w1")
    told(pool, messages.Arrived(opened("r", 2)))
    status = msgspec.structs.replace(seen("w1").status, running=[RunningAttempt("r", 2, 3)])
    [adopted, read] = told(pool, messages.WorkerSeen(status))
    assert isinstance(adopted, Adopt) and read == ReadLog()
    assert told(pool, messages.LogRead()) == []


def test_an_opening_that_comes_late_supersedes_what_waits() -> None:
    pool = taking("w1")
    told(pool, messages.Arrived(request("r")))
    [fenced] = told(pool, messages.Superseded("r", 2))
    assert isinstance(fenced, messages.Recover)
    assert told(pool, messages.Superseded("r", 2)) == [], "once"


def test_of_two_that_have_the_same_attempt_neither_counts() -> None:
    pool = taking("w1", "w2")
    told(pool, messages.Arrived(request("r")), seen("w1", "r"), seen("w2"), messages.LogRead())
    [lost] = told(pool, seen("w2", "r"))
    assert isinstance(lost, messages.Recover) and lost.running.worker == "w1"
    assert told(pool, seen("w1", "r"), seen("w2", "r")) == []
    told(pool, messages.AttemptReady("r", 2))
    ends = told(pool, seen("w1", "r"), seen("w2", "r"))
    assert {(one.worker, one.attempt) for one in ends if isinstance(one, CancelRunning)} == {("w1", 1), ("w2", 1)}


@pytest.mark.parametrize("when", ["before it came", "while its attempt is opened"])
def test_what_was_opened_and_given_to_nobody_can_be_cancelled(when: str) -> None:
    pool = taking("w1")
    left = messages.CancelAsked("r", "left", "t")
    told(pool, seen("w1"), messages.LogRead())
    events = [left, messages.Arrived(opened("r", 2))]
    actions = told(pool, *(events if when == "before it came" else reversed(events)))
    assert [type(one) for one in actions] == [messages.Enqueued, messages.Recover], "there is no worker to be told"
    [ended] = told(pool, messages.AttemptReady("r", 3))
    assert isinstance(ended, messages.End) and (ended.status, ended.request.attempt) == (Status.CANCELLED, 3)


def test_what_waits_for_a_new_attempt_keeps_its_order_and_its_deadline() -> None:
    pool = taking("w1")
    names = [f"r{number}" for number in range(6)]
    told(pool, *(messages.Arrived(opened(name, 2)) for name in names), seen("w1"), messages.LogRead())
    assert list(pool.recovering) == names, "as they came"
    [late] = told(pool, messages.AttemptReady("r5", 3), now_ms=600_001)
    assert isinstance(late, messages.End) and late.status is Status.EXPIRED
    told(pool, *(messages.AttemptReady(name, 3) for name in names[:5]))
    assert list(pool.running) == names[:4] and "r4" in pool.queues["m"]


# --- the live set ---------------------------------------------------------------------------------------------------


@dataclass
class Written:
    """A record of `scheduler.live`."""

    key: bytes | None
    value: bytes | None
    timestamp: int = 5
    topic: str = "scheduler.live"
    partition: int = 0
    offset: int = 0
    headers: list[tuple[str, bytes]] = field(default_factory=list)


def live(worker: str, term: int) -> Written:
    found = LiveRequest("r", "t", "pool", "m", 0, 0, 0, "", 0, attempt=1, worker=worker, term=term)
    return Written(b"r", msgspec.json.encode(found))


def test_what_a_deposed_scheduler_still_writes_does_not_count() -> None:
    [found] = live_of([live("w1", 3), live("w2", 4), live("w1", 3)]).requests
    assert found.worker == "w2"
    [found] = live_of([live("w1", 3), live("w2", 3)]).requests
    assert found.worker == "w2"
    assert live_of([live("w1", 3), Written(b"r", None)]).finished == {"r": 5}


# --- tenure -----------------------------------------------------------------------------------------------------------


class Brokers:
    """What they say of terms, and how often they were asked."""

    def __init__(self, *answers: Mapping[str, int]) -> None:
        self._answers: Iterator[Mapping[str, int]] = iter(answers)
        self.asked = 0

    async def newest(self) -> Mapping[str, int]:
        self.asked += 1
        return next(self._answers)


async def test_who_was_away_looks_before_it_decides() -> None:
    brokers, now = Brokers({"pool": TERM}, {"pool": TERM + 1, "other": 99}), [0]
    tenure = Tenure(brokers.newest, lambda: {"pool": TERM}, lambda: now[0])
    await tenure.hold()
    now[0] = UNSURE_MS - 1
    tenure.sure(now[0])
    now[0] = 2 * UNSURE_MS - 2
    await tenure.hold()
    assert brokers.asked == 0, "the brokers answered a moment ago"
    now[0] += 1
    await tenure.hold()
    await tenure.hold()
    assert brokers.asked == 1, "once is enough"
    now[0] += 15_000
    with pytest.raises(Deposed, match="pool was taken by another scheduler under term 8"):
        await tenure.hold()
    brokers = Brokers({"pool": TERM + 1})
    tenure = Tenure(brokers.newest, dict, lambda: now[0])
    now[0] -= 60_000  # a clock that was set back tells nothing
    await tenure.hold()
    assert brokers.asked == 1, "a term of a pool that is not ours does not concern us"
