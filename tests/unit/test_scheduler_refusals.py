"""What is refused, or fails at once: broken providers, loads that failed, and waits beyond what a request may wait."""

from __future__ import annotations

import pytest

from processors.scheduler import lives, messages, policy
from processors.scheduler.messages import Action
from processors.scheduler.policy import step
from processors.scheduler.state import LeaseState, Limits, Pool, Request
from schemas.control import Model
from schemas.events import Priority, Resident, Status, WorkerStatus
from tests.support.one_machine import TERM, Machine, ready, sized


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
        step(pool, messages.LeaseGranted(name, f"b-{name}", "m", epoch), 0)
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
    step(pool, messages.LeaseGranted("w1", "b-w1", "m", 1), 0)
    failed = heartbeat("w1", Resident("m", 1, "failed", error="no"))
    ends = step(pool, failed, 0)
    assert [action.code for action in ends if isinstance(action, messages.End)] == ["provider_error"]
    assert policy.load_error(pool, pool.models["m"]) == "no"
    assert step(pool, failed, lives.RELOAD_AFTER_MS - 1) == []
    again = [type(action) for action in step(pool, messages.Tick(), lives.RELOAD_AFTER_MS)]
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
    waits = [policy.estimated_wait_ms(pool, model, 0)]
    for number in range(6):
        arrive(pool, f"r{number}")
        waits.append(policy.estimated_wait_ms(pool, model, 0))
    assert waits == [0, 0, 500, 1_000, 1_000, 1_000, 1_000], "others of its tenant wait, and it waits for one of them"
    assert policy.estimated_wait_ms(pool, model, 0, "t") == 2_500
    assert policy.estimated_wait_ms(pool, model, 0, "t", Priority.INTERACTIVE) == 500
    assert policy.estimated_wait_ms(pool, model, 0, "other", Priority.BATCH) == 2_500
    pool.weights["other"] = 0.5
    assert policy.estimated_wait_ms(pool, model, 0, "other") == 1_500, "two of a tenant with twice its share"
    pool.weights["large"] = 4.0
    assert policy.estimated_wait_ms(pool, model, 0) == 625, "the least is that of the largest share"


def held_by(*models: Model, free: int = 0, ended: tuple[str, ...] = (), max_wait_ms: int = 20_000) -> Machine:
    """Memory for these and `free` more, each used by a request of its name, which takes 4 s, unless that has `ended`.

    A model `new` of 8 bytes, whose load takes 1 s, has not been asked for.
    """
    size = sum(model.bytes for model in models) + free
    machine = Machine(size, [*models, sized("new", 8), sized("other", 4)], Limits(max_wait_ms=max_wait_ms))
    for model in models:
        machine.ask(model.id, model.id)
    machine.run(4_000)
    for model in models:
        if model.id in ended:
            machine.done(model.id)
        machine.pool.service_ms[model.id] = 4_000.0
    machine.pool.demand.clear()
    return machine


def wait_of(machine: Machine, model: str = "new", priority: Priority = Priority.STANDARD) -> int:
    pool = machine.pool
    return policy.estimated_wait_ms(pool, pool.models[model], machine.now, priority=priority)


ENDS_MS = 1_600
"""What is reckoned with until a request has ended that takes 4 s on average."""


def test_a_model_beside_idle_ones_or_free_memory_waits_for_its_load_only() -> None:
    assert wait_of(held_by(sized("one", 8), free=8)) == 1_000
    assert wait_of(held_by(sized("idle", 8), ended=("idle",))) == 1_000
    assert wait_of(held_by(sized("busy", 8), sized("idle", 8), ended=("idle",))) == 1_000
    assert wait_of(held_by(sized("one", 4), sized("two", 4), ended=("one", "two"))) == 1_000, "both give way"


def test_a_model_behind_busy_ones_is_told_about_the_wait_for_their_memory() -> None:
    assert wait_of(held_by(sized("busy", 8))) == ENDS_MS + 1_000
    assert wait_of(held_by(sized("busy", 4), sized("idle", 4), ended=("idle",))) == ENDS_MS + 1_000
    machine = held_by(sized("busy", 8))
    for number in range(4):
        machine.ask(f"more{number}", "busy")
    assert wait_of(machine) > 2 * ENDS_MS, "of four that run and one that waits the last must have ended"
    [taken, refused] = held_by(sized("busy", 8)), held_by(sized("busy", 8))
    for asked, patience_ms in ((taken, ENDS_MS + 1_000), (refused, ENDS_MS + 999)):
        request = Request("r", "t", "new", asked.now, 10**6, start_by_ms=asked.now + patience_ms)
        asked.tell(messages.Arrived(request))
    assert not taken.ended and "r" in taken.pool.queue("new")
    [end] = refused.ended
    assert (end.status, end.code, end.retry_after_s) == (Status.REJECTED, "service_unavailable", 3)


def test_a_queue_has_waited_for_part_of_the_longest_wait_already() -> None:
    machine = held_by(sized("busy", 8, max_concurrency=1))
    for number in range(20):
        machine.ask(f"more{number}", "busy")
    # W_max less the load, a second of slack and what runs, which is reckoned with twice; then that has ended.
    assert wait_of(machine) == 20_000 - 1_000 - 1_000 - 8_000 + 4_000 + 1_000
    assert wait_of(machine, priority=Priority.BATCH) == 21_000, "batch work waits until it is idle: W_max, and no more"
    machine.ask("first", "new")
    machine.run(3_000)
    assert wait_of(machine) == 20_000 - 3_000 - 1_000 - 1_000 - 8_000 + 4_000 + 1_000
    machine.run(17_000)
    assert machine.pool.leases["w1", "busy"].state is LeaseState.DRAINING
    assert wait_of(machine) == ENDS_MS + 1_000, "what has begun to give way goes when it has ended"


def test_memory_that_never_comes_back_is_waited_for_no_longer_than_any() -> None:
    machine = held_by(sized("kept", 8, pinned=True), sized("busy", 4))
    assert wait_of(machine) == 20_000 + 1_000


def test_memory_on_its_way_back_is_for_those_who_came_before() -> None:
    machine = held_by(sized("busy", 8), sized("used", 4))
    machine.pool.service_ms["used"] = 100_000.0
    machine.tell(messages.UnloadAsked("busy", "asked"))
    assert wait_of(machine) == ENDS_MS + 1_000
    assert wait_of(machine, "other") == ENDS_MS + 1_000
    machine.ask("o", "other")
    machine.run(250)
    assert wait_of(machine, "other") == ENDS_MS + 1_000, "its own queue is not before it"
    assert wait_of(machine) > ENDS_MS + 10_000, "four of the eight bytes are taken by then"


def test_what_is_loaded_there_is_loaded_first_and_counts_for_what_is_left() -> None:
    machine = held_by(sized("idle", 8), sized("slow", 8, 6_000), ended=("idle", "slow"), free=0)
    machine.tell(messages.UnloadAsked("slow", "asked"))
    machine.run(1_000)
    machine.ask("s", "slow")
    assert (wait_of(machine, "slow"), wait_of(machine)) == (6_000, 7_000)
    machine.run(4_000)
    assert (wait_of(machine, "slow"), wait_of(machine)) == (2_000, 3_000)
    machine.run(4_000)
    assert (wait_of(machine, "slow"), wait_of(machine)) == (0, 1_000)


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
