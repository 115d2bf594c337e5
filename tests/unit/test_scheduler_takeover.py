"""Taking a pool: what the scheduler before had given to workers and not written down, and what it still does itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
import pytest

from processors.scheduler import messages
from processors.scheduler.messages import Action, Adopt, Assign, CancelRunning, Event, ReadLog, SendTerm
from processors.scheduler.policy import STRAYS_MS, WORKER_TIMEOUT_MS, step
from processors.scheduler.state import Pool, Request, Taking
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
