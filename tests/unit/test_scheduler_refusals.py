"""What is refused, or fails at once: broken providers, loads that failed, and waits beyond what a request may wait."""

from __future__ import annotations

import pytest

from processors.scheduler import lives, messages, policy
from processors.scheduler.messages import Action
from processors.scheduler.policy import step
from processors.scheduler.state import Pool, Request
from schemas.control import Model
from schemas.events import Priority, Resident, Status, WorkerStatus
from tests.support.one_machine import TERM, ready


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
