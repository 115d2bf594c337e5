"""The memory of a server that several workers use: what lies there counts, whoever had it loaded."""

from __future__ import annotations

from processors.scheduler import messages
from processors.scheduler.messages import Action, Grant, Load, Unload
from processors.scheduler.policy import step
from processors.scheduler.servers import SEEN_WITHIN_MS, UNLOAD_AFTER_MS
from processors.scheduler.state import Pool, Request
from schemas.control import Model
from schemas.events import NO_EPOCH, Device, Resident, ServerHeld, WorkerStatus

TERM = 7
SIZE = 20


def model(name: str, size: int = 8, *, preload: bool = False) -> Model:
    return Model(name, "box", f"tag-{name}", bytes=size, load_ms=1_000, preload=preload)


def pool_of(*models: Model) -> Pool:
    return Pool(term=TERM, models={one.id: one for one in models})


def seen(
    worker: str, *residents: tuple[str, int], held: dict[str, int] | None = None, boot: str = "b", left: bool = False
) -> messages.WorkerSeen:
    """A heartbeat of a worker before the server, of what the server holds; names that begin with `?` are others'."""
    told = [ServerHeld([] if name.startswith("?") else name.split("+"), size) for name, size in (held or {}).items()]
    device = Device("box", SIZE, ["box"], shared=True, held=told)
    return messages.WorkerSeen(
        WorkerStatus(
            worker, boot, "default", TERM, 0, providers=["box"], devices=[device], stopping=left, left=left,
            resident=[Resident(name, epoch, "active", 8, device="box") for name, epoch in residents],
        )
    )  # fmt: skip


def asked(pool: Pool, name: str, now_ms: int = 0) -> list[Action]:
    return step(pool, messages.Arrived(Request(f"r-{name}-{now_ms}", "t", name, now_ms, now_ms + 600_000)), now_ms)


def grants(actions: list[Action]) -> list[tuple[str, str]]:
    return [(one.worker, one.model) for one in actions if isinstance(one, Grant)]


def unloads(actions: list[Action]) -> list[tuple[str, str, int]]:
    return [(one.worker, one.model, one.epoch) for one in actions if isinstance(one, Unload)]


def hold(pool: Pool, worker: str, name: str, epoch: int, held: dict[str, int]) -> None:
    """Have a worker load a model that was just granted to it."""
    actions = step(pool, messages.LeaseGranted(worker, "b", name, epoch), 0)
    assert any(isinstance(one, Load) for one in actions)
    step(pool, seen(worker, (name, epoch), held=held), 0)


def test_what_a_lost_worker_had_loaded_is_not_granted_again_while_the_server_holds_it() -> None:
    pool = pool_of(model("one"), model("two"), model("three"))
    step(pool, seen("w1"), 0)
    assert grants(asked(pool, "one")) == [("w1", "one")]
    hold(pool, "w1", "one", 1, {"one": 8})
    step(pool, seen("w2", held={"one": 8}), 0)
    assert step(pool, seen("w1", boot="b2", held={"one": 8}), 10) is not None
    assert ("w1", "one") not in pool.leases, "its process is gone"
    assert grants(asked(pool, "two", 20)) != []
    assert grants(asked(pool, "three", 20)) == [], "8 of 20 lie there, and 8 are granted"
    step(pool, seen("w2"), 30)
    assert grants(step(pool, messages.Tick(), 40)) == [], "the other worker has not seen yet that they are free"
    found = grants(step(pool, seen("w1", boot="b2"), 50))
    assert [name for _, name in found] == ["three"]


def test_what_a_lost_worker_was_loading_counts_until_it_is_seen_or_must_have_been() -> None:
    pool = pool_of(model("one", 12), model("two", 12))
    step(pool, seen("w1"), 0)
    step(pool, seen("w2"), 0)
    [(loader, _)] = grants(asked(pool, "one"))
    assert any(isinstance(one, Load) for one in step(pool, messages.LeaseGranted(loader, "b", "one", 1), 0))
    pool.queue("one").remove("r-one-0")
    step(pool, seen(loader, boot="b2"), 10)
    assert grants(asked(pool, "two", 20)) == [], "the server goes on with the load"
    boots = {"w1": "b", "w2": "b"} | {loader: "b2"}
    for worker, boot in boots.items():
        assert grants(step(pool, seen(worker, boot=boot, held={"one": 12}), 900)) == [], "there it is"
    found = [one for worker, boot in boots.items() for one in grants(step(pool, seen(worker, boot=boot), 1_000))]
    assert [name for _, name in found] == ["two"], "it is seen no more"

    pool = pool_of(model("one", 12), model("two", 12))
    step(pool, seen("w1"), 0)
    asked(pool, "one")
    step(pool, messages.LeaseGranted("w1", "b", "one", 1), 0)
    pool.queue("one").remove("r-one-0")
    step(pool, seen("w1", boot="b2"), 0)
    asked(pool, "two", 0)
    late = 2 * 1_000 + SEEN_WITHIN_MS
    at: list[tuple[int, str, str]] = []
    for now_ms in range(500, late + 1_000, 500):
        at += [(now_ms, *one) for one in grants(step(pool, seen("w1", boot="b2"), now_ms))]
        at += [(now_ms, *one) for one in grants(step(pool, messages.Tick(), now_ms))]
    assert at == [(late, "w1", "two")], "nobody ever saw it: the load was given up"


def test_what_lies_there_is_leased_where_it_is_wanted_though_nothing_is_free() -> None:
    pool = pool_of(model("one"), model("two"))
    step(pool, seen("w1", held={"one": 8, "?": 12}), 0)
    assert grants(asked(pool, "two")) == [], "others hold the rest"
    assert grants(asked(pool, "one")) == [("w1", "one")], "it takes no more than it does"


def test_two_names_of_one_model_are_there_once() -> None:
    pool = pool_of(model("one"), model("uno"), model("two"))
    step(pool, seen("w1", held={"one+uno": 8}), 0)
    assert grants(asked(pool, "uno")) == [("w1", "uno")]
    hold(pool, "w1", "uno", 1, {"one+uno": 8})
    assert grants(asked(pool, "two")) == [("w1", "two")], "it is accounted for by the lease"


def test_what_nobody_wants_is_unloaded_after_a_while() -> None:
    pool = pool_of(model("one"), model("two"))
    step(pool, seen("w1", held={"one": 8, "?": 4}), 0)
    late = UNLOAD_AFTER_MS
    actions = [
        action
        for now_ms in range(0, late + 1_500, 500)
        for action in (*step(pool, seen("w1", held={"one": 8, "?": 4}), now_ms), *step(pool, messages.Tick(), now_ms))
    ]
    assert unloads(actions) == [("w1", "one", NO_EPOCH)], "once, and nothing of others"
    assert grants(asked(pool, "one", late + 1_500)) == [], "it is about to go"
    assert grants(step(pool, seen("w1", held={"?": 4}), late + 2_000)) == [("w1", "one")]


def test_what_is_wanted_is_not_unloaded() -> None:
    pool = pool_of(model("one", preload=True))
    pool.parked.add("one")
    step(pool, seen("w1", held={"one": 8}), 0)
    pool.parked.clear()
    step(pool, seen("w1", held={"one": 8}), UNLOAD_AFTER_MS)
    actions = step(pool, messages.Tick(), UNLOAD_AFTER_MS)
    assert (grants(actions), unloads(actions)) == ([("w1", "one")], [])
    assert unloads(step(pool, seen("w1", held={"one": 8}), 2 * UNLOAD_AFTER_MS)) == []


def test_a_failed_lease_holds_nothing_that_lies_there() -> None:
    pool = pool_of(model("one", 12), model("two", 12))
    step(pool, seen("w1"), 0)
    asked(pool, "one")
    step(pool, messages.LeaseGranted("w1", "b", "one", 1), 0)
    failed = seen("w1", held={"one": 12})
    failed.status.resident = [Resident("one", 1, "failed", error="late", device="box")]
    step(pool, failed, 10)
    assert grants(asked(pool, "two", 20)) == [], "the server holds it all the same"


def run(pool: Pool, until_ms: int, *heartbeats: messages.WorkerSeen) -> list[tuple[int, Action]]:
    """What the scheduler does while workers tell the same each half second, and when."""
    return [
        (now_ms, action)
        for now_ms in range(0, until_ms + 1, 500)
        for event in (*heartbeats, messages.Tick())
        for action in step(pool, event, now_ms)
    ]


def test_what_is_left_of_a_load_that_failed_is_unloaded_by_who_has_it_in_its_books() -> None:
    pool = pool_of(model("one", 12))
    step(pool, seen("w1"), 0)
    asked(pool, "one")
    step(pool, messages.LeaseGranted("w1", "b", "one", 4), 0)
    failed = seen("w1", held={"one": 12})
    failed.status.resident = [Resident("one", 4, "failed", error="late", device="box")]
    told = run(pool, UNLOAD_AFTER_MS + 500, failed)
    assert unloads([action for _, action in told]) == [("w1", "one", 4)], "it obeys no earlier epoch"


def test_what_a_worker_has_unloaded_is_gone_though_others_have_not_looked_since() -> None:
    pool = pool_of(model("idle", 8, preload=True), model("asked", 14))
    step(pool, seen("w1"), 0)
    hold(pool, "w1", "idle", 1, {"idle": 8})
    step(pool, seen("w2", held={"idle": 8}), 0)
    assert unloads(asked(pool, "asked")) == [("w1", "idle", 1)]
    assert [name for _, name in grants(step(pool, seen("w1"), 100))] == ["asked"], "and not what was to make room"


def test_what_lies_there_is_leased_with_what_it_takes() -> None:
    pool = pool_of(model("one", 4), model("two", 14))
    step(pool, seen("w1", held={"one": 8}), 0)
    asked(pool, "one")
    assert pool.leases["w1", "one"].bytes == 8, "its record says less"
    assert grants(asked(pool, "two")) == []


def test_room_is_made_beside_what_a_model_takes_there_already() -> None:
    pool = pool_of(model("idle", 6, preload=True), model("grown", 14))
    step(pool, seen("w1"), 0)
    hold(pool, "w1", "idle", 1, {"idle": 6})
    step(pool, seen("w1", ("idle", 1), held={"idle": 6, "grown": 6, "?": 4}), 0)
    assert unloads(asked(pool, "grown")) == [("w1", "idle", 1)]


def test_what_is_wanted_and_cannot_be_leased_as_it_lies_is_unloaded() -> None:
    pool = pool_of(model("grown", 16, preload=True))
    told = run(pool, 2 * UNLOAD_AFTER_MS + 500, seen("w1", held={"grown": 8, "?": 8}))
    assert [(at, unloads([action])) for at, action in told if unloads([action])] == [
        (2 * UNLOAD_AFTER_MS, [("w1", "grown", NO_EPOCH)])
    ]


def test_what_was_unloaded_and_loaded_again_counts_when_its_worker_is_gone() -> None:
    pool = pool_of(model("one", 12), model("two", 12))
    for worker in ("w1", "w2"):
        step(pool, seen(worker), 0)
    [(loader, _)] = grants(asked(pool, "one"))
    [other] = {"w1", "w2"} - {loader}
    hold(pool, loader, "one", 1, {"one": 12})
    step(pool, messages.Finished("r-one-0", 1, 1), 5)
    assert unloads(step(pool, messages.UnloadAsked("one", "by hand"), 10)) == [(loader, "one", 1)]
    step(pool, seen(loader), 20)
    assert grants(asked(pool, "one", 30)) == [(loader, "one")]
    hold(pool, loader, "one", 2, {"one": 12})
    step(pool, seen(other, held={"one": 12}), 40)
    step(pool, seen(loader, left=True), 50)
    assert grants(asked(pool, "two", 60)) == [], "the other worker shows it, and it is not what was unloaded before"
