"""Pools, workers and leases folded from records; what people are shown of them; what they may ask for."""

from __future__ import annotations

import time

import msgspec
import pytest

from headrace import steer
from headrace.errors import Conflict, HeadraceError, ModelNotFound, NotFound, Unavailable
from headrace.fleet import Fleet
from headrace.leases import LeaseBook
from headrace.waiting import Awaited, NotDone, came_true
from processors.scheduler.report import model_states, pool_status
from processors.scheduler.state import Lease, LeaseState, Pool, Request, Running, Worker
from schemas.control import Model
from schemas.events import (
    Device,
    LeaseEvent,
    ModelCard,
    ModelState,
    PoolCommand,
    PoolCommandKind,
    PoolStatus,
    PoolWishes,
    Resident,
    RunningAttempt,
    WorkerStatus,
)

NOW = 1_790_000_000_000
MODELS = {
    "one": Model("one", "p", "t", aliases=("uno",), bytes=8, keep_alive_ms=5, preload=False),
    "two": Model("two", "p", "t", pinned=True),
    "gone": Model("gone", "p", "t", aliases=("uno",), enabled=False),
    "far": Model("far", "p", "t", pool="other"),
}


def lease(model: str, state: str, **fields: object) -> LeaseEvent:
    made = LeaseEvent(f"w1:{model}", "default", 3, "w1", model, state, NOW, bytes=8, device="d0", boot="b")
    return msgspec.structs.replace(made, **fields)


def status(**fields: object) -> PoolStatus:
    made = PoolStatus(
        "default", 3, NOW, ready_models=["one"], servable_models=["one", "two"], failed_models={"two": "no file"},
        waits_ms={"one": 40, "two": 0},
        models=[ModelState("one", "active", 2, 3, NOW - 9_000), ModelState("two", "failed")],
        wishes=PoolWishes(7, load={"two": NOW + 5}),
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


def fleet(*records: object, at_ms: int = NOW) -> Fleet:
    made = Fleet()
    topics = {LeaseEvent: "vram.leases", WorkerStatus: "worker.status", PoolStatus: "pool.status"}
    for offset, record in enumerate(records, start=20):
        if isinstance(record, PoolStatus):
            record = msgspec.structs.replace(record, at_ms=at_ms)
        made.take(topics[type(record)], msgspec.json.encode(record), offset)
    return made


WORKER = WorkerStatus(
    "w1", "b", "default", 3, NOW - 2_000, ["p"], devices=[Device("d0", 20), Device("d1", 20)],
    resident=[Resident("one", 20, "active", 8, device="d0")], running=[RunningAttempt("r", 1, 20)],
)  # fmt: skip


def test_a_model_is_shown_as_it_is_configured_and_stands() -> None:
    found = fleet(lease("one", "granted"), lease("one", "active", epoch=20, at_ms=NOW - 60_000), status())
    views = {view.id: view for view in found.model_views(MODELS.values(), NOW)}
    one = views["one"]
    assert (one.state, one.queued, one.running, one.estimated_wait_ms, one.last_used_ms) == (
        "active", 2, 3, 40, NOW - 9_000,
    )  # fmt: skip
    [held] = one.leases
    assert (held.worker, held.device, held.state, held.bytes, held.epoch, held.since_ms) == (
        "w1", "d0", "active", 8, 20, NOW - 60_000,
    )  # fmt: skip
    assert (one.asked, views["two"].asked) == (None, "load")
    assert (views["two"].state, views["two"].error, views["two"].last_used_ms) == ("failed", "no file", None)
    assert (views["gone"].state, views["far"].state) == ("unloaded", "unknown")
    assert views["far"].estimated_wait_ms is None


def test_a_model_is_shown_with_what_it_is_and_how_far_its_load_is() -> None:
    told = ModelCard("w1", "one", "p", "t", NOW - 5, architecture="llama", context_length=2048, template_digest="ab")
    loading = Resident("two", 21, "loading", progress="downloading: 25 % of 4.0 GiB")
    found = fleet(status(), msgspec.structs.replace(WORKER, resident=[loading]))
    models = {**MODELS, "one": msgspec.structs.replace(MODELS["one"], context_length=4096, capabilities=())}
    views = {view.id: view for view in found.model_views(models.values(), NOW, [told])}
    one, two = views["one"], views["two"]
    assert one.facts is not None and two.facts is None
    assert (one.facts.told_ms, one.facts.architecture, one.facts.template_digest) == (NOW - 5, "llama", "ab")
    assert one.warnings == ["context_length is 4096, more than the 2048 tokens of the model itself: lower it"]
    assert (one.progress, two.progress, two.warnings) == (None, "downloading: 25 % of 4.0 GiB", [])


def test_a_pool_that_is_not_heard_is_unknown() -> None:
    found = fleet(status())
    assert found.model_views([MODELS["one"]], NOW + 4_900)[0].state == "active"
    [stale] = found.model_views([MODELS["one"]], NOW + 5_100)
    assert (stale.state, stale.queued, stale.estimated_wait_ms, stale.asked) == ("unknown", 0, None, None)


def test_a_zombies_status_does_not_count() -> None:
    found = fleet(status(term=9), status(term=8, models=[]))
    assert found.pools["default"].term == 9


def test_a_worker_is_shown_with_what_is_held_of_its_memory() -> None:
    found = fleet(WORKER, lease("one", "granted"), lease("two", "quarantined", epoch=5), lease("x", "free", epoch=6))
    [view] = found.worker_views(NOW)
    assert (view.status, view.age_ms, view.running) == ("ready", 2_000, 1)
    assert [(one.id, one.bytes, one.held_bytes) for one in view.devices] == [("d0", 20, 16), ("d1", 20, 0)]
    [resident] = view.residents
    assert (resident.model, resident.state, resident.error) == ("one", "active", None)
    assert [one.status for one in found.worker_views(NOW + 5_000)] == ["silent"]
    assert found.worker_views(NOW + 3_700_000) == [], "it is forgotten"
    assert [one.status for one in fleet(msgspec.structs.replace(WORKER, stopping=True)).worker_views(NOW)] == [
        "stopping"
    ]


def test_a_worker_that_has_left_is_not_shown() -> None:
    found = fleet(WORKER, msgspec.structs.replace(WORKER, resident=[], running=[], stopping=True, left=True))
    assert found.worker_views(NOW) == []
    assert [one.status for one in fleet(WORKER, msgspec.structs.replace(WORKER, boot="b9")).worker_views(NOW)] == [
        "ready"
    ]


def test_a_higher_term_says_more_of_a_lease_than_a_later_record() -> None:
    book = LeaseBook()
    for offset, event in enumerate([lease("one", "active", term=5, epoch=3), lease("one", "free", term=4, epoch=3)]):
        book.take(event, offset)
    assert [held.state for held in book.held()] == ["active"]


# --- asking -------------------------------------------------------------------------------------------------------


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def test_a_wish_is_for_the_pool_of_the_model_that_is_named() -> None:
    heard = fleet(status(), at_ms=now_ms())
    model = steer.find(MODELS, "uno")
    wish = steer.load(heard, model, actor="a", reason="b")
    assert (wish.kind, wish.pool, wish.model, wish.worker, wish.actor, wish.reason) == (
        PoolCommandKind.LOAD, "default", "one", "", "a", "b",
    )  # fmt: skip
    assert steer.unload(heard, model, actor="a").kind is PoolCommandKind.UNLOAD
    assert steer.find(MODELS, "gone").id == "gone", "disabled ones are found by their id"


def test_what_nobody_would_obey_is_refused() -> None:
    heard = fleet(status(), lease("one", "quarantined", epoch=4), lease("two", "active", epoch=5), at_ms=now_ms())
    with pytest.raises(ModelNotFound, match="no model 'nope'"):
        steer.find(MODELS, "nope")
    with pytest.raises(Conflict, match="is not enabled"):
        steer.load(heard, MODELS["gone"], actor="a")
    with pytest.raises(Conflict, match="is pinned; unpin it first"):
        steer.unload(heard, MODELS["two"], actor="a")
    for ask in (steer.load, steer.unload):
        with pytest.raises(Unavailable, match="pool 'other' is not heard"):
            ask(heard, MODELS["far"], actor="a")
    with pytest.raises(NotFound, match="no lease"):
        steer.release(heard, "w9", "one", actor="a", reason="b")
    with pytest.raises(Conflict, match="is active; only quarantined"):
        steer.release(heard, "w1", "two", actor="a", reason="b")
    wish = steer.release(heard, "w1", "one", actor="a", reason="b")
    assert (wish.kind, wish.worker, wish.pool) == (PoolCommandKind.RELEASE, "w1", "default")


async def outcome(found: Fleet, kind: PoolCommandKind, model: str, *, offset: int = 6) -> str:
    wish = PoolCommand("id", "default", kind, model, "w1")
    return await came_true(found, Awaited(wish, offset), timeout_s=0.02)


async def test_what_comes_of_a_wish() -> None:
    held = fleet(status(), lease("one", "active", epoch=4))
    assert await outcome(held, PoolCommandKind.LOAD, "one") == "one is loaded"
    assert await outcome(held, PoolCommandKind.UNLOAD, "two") == "two is unloaded"
    assert await outcome(held, PoolCommandKind.RELEASE, "two") == "the bytes of two on w1 are free"
    failures: list[tuple[PoolCommandKind, str, int, type[HeadraceError], str]] = [
        (PoolCommandKind.LOAD, "two", 6, NotDone, "two could not be loaded: no file"),
        (PoolCommandKind.LOAD, "three", 6, NotDone, "no memory for it"),
        (PoolCommandKind.UNLOAD, "one", 6, NotDone, "one is active"),
        (PoolCommandKind.LOAD, "one", 7, Unavailable, "has not taken the wish"),
    ]
    for kind, model, offset, error, match in failures:
        with pytest.raises(error, match=match):
            await outcome(held, kind, model, offset=offset)


# --- what a scheduler tells ---------------------------------------------------------------------------------------


def test_a_scheduler_tells_how_each_model_stands() -> None:
    pool = Pool(term=3, models={name: Model(name, "p", "t") for name in ("a", "b", "c", "d", "e")})
    pool.workers["w1"] = Worker(WORKER, NOW, trusted=True)
    pool.leases["w1", "a"] = Lease("w1", "b", "a", state=LeaseState.ACTIVE, used_ms=5)
    pool.leases["w2", "a"] = Lease("w2", "b", "a", state=LeaseState.LOADING, used_ms=9)
    pool.leases["w1", "b"] = Lease("w1", "b", "b", state=LeaseState.REQUESTED)
    pool.leases["w1", "c"] = Lease("w1", "b", "c", state=LeaseState.QUARANTINED)
    pool.leases["w1", "d"] = Lease("w1", "b", "d", state=LeaseState.FAILED, error="no file")
    pool.running["r"] = Running(Request("r", "t", "a", 0, 9), "w1", "b", 1)
    pool.queue("b").add(Request("q", "t", "b", 0, 9))
    assert model_states(pool) == [
        ModelState("a", "active", 0, 1, 9),
        ModelState("b", "loading", 1),
        ModelState("c", "draining"),
        ModelState("d", "failed"),
        ModelState("e"),
    ]
    pool.parked.add("e")
    told = pool_status(pool, "default", NOW, next_wish=4)
    assert (told.term, told.ready_models, told.failed_models) == (3, ["a"], {"d": "no file"})
    assert (told.queued, told.running, told.workers) == (1, 1, ["w1"])
    assert (told.wishes, told.waits_ms.keys()) == (PoolWishes(4, unloaded=["e"]), pool.models.keys())
    assert told.interactive_waits_ms == told.waits_ms
