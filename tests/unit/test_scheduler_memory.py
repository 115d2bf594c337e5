"""Which model gets the memory of which device, who gives it back, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from processors.scheduler import lives, messages
from processors.scheduler.messages import Action
from processors.scheduler.policy import step
from processors.scheduler.report import pool_status
from processors.scheduler.state import Limits, Pool, Request
from schemas.control import Model
from schemas.events import Device, Priority, Resident, Status, WorkerStatus
from tests.support.one_machine import TERM, Machine, ready, sized


def test_the_cheapest_idle_set_that_suffices_gives_way() -> None:
    machine = Machine(10, [sized("dear", 4, 9_000), sized("cheap", 4), sized("small", 2), sized("new", 4)])
    for model in ("dear", "cheap", "small"):
        machine.ask(model, model)
        machine.run(10_000)
        machine.done(model)
    machine.run(60_000)
    machine.ask("r", "new")
    machine.run(2_000)
    assert machine.held == {"dear", "small", "new"}, "one of the right size, and the cheaper to load again"


def test_what_can_never_fit_is_refused_at_once() -> None:
    machine = Machine(10, [sized("huge", 11)])
    machine.ask("r", "huge")
    [end] = machine.ended
    assert end.status is Status.REJECTED and "11 bytes" in end.message
    machine.run(1_000)
    assert not machine.loads
    assert "11 bytes" in pool_status(machine.pool, "p", 0, 0).failed_models["huge"], "who only looks is told too"


def test_a_pinned_model_stays_whoever_waits() -> None:
    machine = Machine(10, [sized("kept", 6, pinned=True), sized("other", 6)])
    machine.run(2_000)
    assert machine.held == {"kept"}, "it is loaded without being asked for"
    machine.ask("r", "other")
    machine.run(300_000)
    assert machine.held == {"kept"}


def test_a_queue_has_its_model_within_the_longest_wait() -> None:
    """Another model is always in use, and its requests never stop coming."""
    limits = Limits(max_wait_ms=20_000, residency_loads=100.0)
    machine = Machine(10, [sized("busy", 8, max_concurrency=1), sized("rare", 8, max_concurrency=1)], limits)
    machine.ask("b0", "busy")
    for number in range(1, 9):
        machine.ask(f"b{number}", "busy")
    machine.run(2_000)
    machine.ask("rare", "rare")
    asked = machine.now
    for _ in range(30):
        machine.run(1_000)
        for running in list(machine.pool.running):
            machine.done(running)
            machine.ask(f"again-{machine.now}-{running}", "busy")
        if any(name == "rare" for _, name in machine.assigned):
            break
    [(at, _)] = [begun for begun in machine.assigned if begun[1] == "rare"]
    assert at - asked <= limits.max_wait_ms


def test_a_queue_has_its_model_within_the_longest_wait_though_its_callers_leave_sooner() -> None:
    """Somebody always waits for the model, and nobody for longer than 5 s, while another is always in use."""
    limits = Limits(max_wait_ms=20_000)
    machine = Machine(10, [sized("busy", 8), sized("rare", 8)], limits)
    machine.ask("b", "busy")
    machine.run(2_000)
    asked = machine.now
    while "rare" not in loads_of(machine) and machine.now < asked + 3 * limits.max_wait_ms:
        number, now = machine.now - asked, machine.now
        request = Request(f"r{number}", "t", "rare", now, now + 10**9, start_by_ms=now + 5_000)
        machine.tell(messages.Arrived(request))
        machine.run(1_000)
        for running in list(machine.pool.running):
            machine.ask(f"b{number}", "busy")
            machine.done(running)
    assert machine.ended, "callers left before"
    [at] = [at for at, model in machine.loads if model == "rare"]
    assert at - asked < limits.max_wait_ms


def loads_of(machine: Machine) -> list[str]:
    return [model for _, model in machine.loads]


def waiting_for(limits: Limits, asked: list[tuple[str, int]], load_ms: int = 1_000) -> Machine:
    """All memory is in use, and so many wait for each of other models, the first for 250 ms longer than the others."""
    machine = Machine(10, [sized("used", 8), *(sized(model, 8, load_ms) for model, _ in asked)], limits)
    machine.ask("u", "used")
    machine.run(2_000)
    for model, number in asked:
        for at in range(number):
            machine.ask(f"{model}{at}", model)
        machine.run(250 if model == asked[0][0] else 0)
    return machine


def test_the_model_is_loaded_first_whose_load_gains_most() -> None:
    machine = waiting_for(Limits(), [("one", 1), ("many", 4)])
    machine.run(2_000)
    machine.done("u")
    machine.run(1_000)
    assert loads_of(machine) == ["used", "many"], "four that waited a little less are worth more than one"


def test_a_wait_of_half_the_longest_comes_before_any_gain() -> None:
    machine = waiting_for(Limits(max_wait_ms=20_000), [("one", 1), ("many", 4)])
    machine.run(9_000)
    machine.done("u")
    machine.run(1_000)
    assert loads_of(machine) == ["used", "one"]


@pytest.mark.parametrize(("max_wait_ms", "gone"), [(60_000, False), (10_000, True)], ids=["in time", "late"])
def test_nothing_makes_room_while_its_device_loads_something_else(max_wait_ms: int, gone: bool) -> None:
    models = [sized("idle", 5), sized("slow", 5, 5_000), sized("next", 5)]
    machine = Machine(10, models, Limits(max_wait_ms=max_wait_ms))
    machine.ask("i", "idle")
    machine.run(2_000)
    machine.done("i")
    machine.ask("s", "slow")
    machine.run(250)
    machine.ask("n", "next")
    machine.run(4_250)
    assert ("idle" not in machine.held) is gone
    machine.run(2_000)
    assert machine.held == {"slow", "next"}


def test_batch_work_takes_memory_from_nobody_who_works() -> None:
    machine = Machine(10, [sized("used", 8), sized("batch", 8)])
    machine.ask("u", "used")
    machine.run(2_000)
    machine.ask("b", "batch", Priority.BATCH)
    machine.run(200_000)
    assert machine.held == {"used"}
    machine.done("u")
    machine.run(3_000)
    assert machine.held == {"batch"}


def test_a_model_is_unloaded_when_its_keep_alive_has_passed() -> None:
    machine = Machine(10, [sized("brief", 4, keep_alive_ms=5_000)])
    machine.ask("r", "brief")
    machine.run(10_000)
    assert machine.held == {"brief"}, "it is in use"
    machine.done("r")
    machine.run(4_000)
    assert machine.held == {"brief"}
    machine.run(2_000)
    assert machine.held == set()


def test_memory_that_is_not_seen_to_be_free_is_quarantined() -> None:
    machine = Machine(10, [sized("old", 8), sized("new", 8)])
    machine.ask("o", "old")
    machine.run(2_000)
    machine.done("o")
    machine.run(60_000)
    keeps = machine.resident["old"]
    machine.ask("n", "new")
    machine.resident["old"] = keeps  # told to unload, it still shows the model
    machine.run(40_000)
    assert [model for _, model in machine.loads] == ["old"]
    lease = machine.pool.leases["w1", "old"]
    assert lease.state == "quarantined" and lease.holds == 8
    del machine.resident["old"]
    machine.run(2_000)
    assert machine.held == {"new"}


def test_a_worker_that_joins_holds_what_takes_no_memory_too() -> None:
    pool = ready({"one": Model("one", "p", "t")})
    joined = WorkerStatus("w2", "b1", "default", TERM, 0, providers=["p"])
    assert step(pool, messages.WorkerSeen(joined), 0) == [messages.Grant("w2", "b1", "one")]


def test_a_load_that_failed_is_tried_again_for_the_next_who_asks() -> None:
    machine = Machine(10, [sized("flaky", 4)])
    machine.ask("first", "flaky")
    epoch, _, until = machine.resident["flaky"]
    machine.resident["flaky"] = (epoch, "failed", until)
    machine.run(500)
    [end] = machine.ended
    assert (end.request.id, end.status, end.code) == ("first", Status.FAILED, "provider_error")
    machine.ask("at once", "flaky")
    assert len(machine.ended) == 2, "it is not tried for each"
    machine.run(6_000)
    machine.ask("later", "flaky")
    machine.run(2_000)
    assert [name for _, name in machine.assigned] == ["later"]


def test_a_device_that_shrinks_has_its_cheapest_idle_models_drained() -> None:
    machine = Machine(10, [sized("dear", 4, 9_000), sized("cheap", 4), sized("used", 2)])
    for model in ("dear", "cheap", "used"):
        machine.ask(model, model)
        machine.run(10_000)
    machine.done("dear")
    machine.done("cheap")
    machine.size = 7  # somebody else takes some of it
    machine.run(1_000)
    assert machine.held == {"dear", "used"}
    machine.size = 5
    machine.run(1_000)
    assert machine.held == {"used"}
    machine.size = 1
    machine.run(60_000)
    assert machine.held == {"used"}, "what is in use stays: its memory is taken, whatever we wish"


def test_a_device_that_is_gone_gets_nothing_and_keeps_nothing_idle() -> None:
    machine = Machine(10, [sized("one", 4), sized("two", 4)])
    machine.ask("r", "one")
    machine.run(2_000)
    machine.done("r")
    machine.size = 0
    machine.run(1_000)
    assert machine.held == set()
    machine.ask("s", "two")
    [refused] = machine.ended
    assert refused.status is Status.REJECTED and machine.held == set()


def _worker(name: str, *devices: Device, providers: tuple[str, ...] = ("p",), **fields: Any) -> messages.WorkerSeen:
    status = WorkerStatus(name, "b1", "default", TERM, 0, providers=list(providers), devices=list(devices), **fields)
    return messages.WorkerSeen(status)


def _granted(actions: list[messages.Action]) -> list[tuple[str, str]]:
    return [(action.worker, action.model) for action in actions if isinstance(action, messages.Grant)]


def test_memory_of_one_server_is_granted_once_whoever_reaches_it() -> None:
    models = {name: Model(name, "p", "t", bytes=6, pinned=True) for name in ("one", "two")}
    server = Device("server", 10, ["p"], shared=True)
    pool = Pool(term=TERM, models=models)
    assert _granted(step(pool, _worker("w1", server), 0)) == [("w1", "one")]
    assert _granted(step(pool, _worker("w2", server), 0)) == []
    apart = Pool(term=TERM, models=models)
    step(apart, _worker("w1", Device("card", 10, ["p"])), 0)
    assert _granted(step(apart, _worker("w2", Device("card", 10, ["p"])), 0)) == [("w2", "two")]


def test_workers_of_one_server_share_its_models_and_none_is_held_twice() -> None:
    models = {name: Model(name, "p", "t", max_concurrency=1, bytes=2, preload=False) for name in ("one", "two")}
    server = Device("server", 10, ["p"], shared=True)
    pool = Pool(term=TERM, models=models)
    for worker in ("w1", "w2"):
        step(pool, _worker(worker, server), 0)
    step(pool, messages.Arrived(Request("a", "t", "one", 0, 10**9)), 0)
    step(pool, messages.Arrived(Request("b", "t", "two", 0, 10**9)), 0)
    assert set(pool.leases) == {("w1", "one"), ("w2", "two")}
    for request in "cdef":  # more than it has slots
        step(pool, messages.Arrived(Request(request, "t", "one", 0, 10**9)), 0)
    lease = pool.leases["w1", "one"]
    lease.epoch = 5
    lives.drain(lease, 0, "an operator")
    for now in (1, 2):
        step(pool, messages.Tick(), now)
    assert set(pool.leases) == {("w1", "one"), ("w2", "two")}, "what w1 unloads would be gone for w2"
    own = Pool(term=TERM, models=models)
    for worker in ("w1", "w2"):
        step(own, _worker(worker, Device("ram", 10, ["p"])), 0)
    for request in "abc":
        step(own, messages.Arrived(Request(request, "t", "one", 0, 10**9)), 0)
    step(own, messages.Tick(), 1)
    assert set(own.leases) == {("w1", "one"), ("w2", "one")}, "with memory of its own each may hold it"


def test_only_a_providers_own_devices_hold_its_models() -> None:
    models = {"local": Model("local", "p", "t", bytes=6), "remote": Model("remote", "q", "t")}
    pool = Pool(term=TERM, models=models)
    step(pool, _worker("w1", Device("ram", 10, ["p"]), providers=("p", "q")), 0)
    leases = {model: lease.device for (_, model), lease in pool.leases.items()}
    assert leases == {"local": "ram", "remote": ""}


def test_a_model_of_unknown_size_waits_until_it_is_known() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t")})
    assert _granted(step(pool, _worker("w1", Device("ram", 10, ["p"])), 0)) == []
    sized = messages.ModelsChanged({"one": Model("one", "p", "t", bytes=4)})
    assert _granted(step(pool, sized, 0)) == [("w1", "one")]


def test_what_no_device_holds_is_taken_where_memory_is_not_counted() -> None:
    pool = Pool(term=TERM, models={"huge": Model("huge", "p", "t", bytes=99, preload=False)})
    step(pool, _worker("small", Device("ram", 10, ["p"])), 0)
    [refused] = step(pool, messages.Arrived(Request("r", "t", "huge", 0, 10**9)), 0)
    assert isinstance(refused, messages.End)
    step(pool, _worker("far"), 0)
    taken = step(pool, messages.Arrived(Request("s", "t", "huge", 0, 10**9)), 0)
    assert _granted(taken) == [("far", "huge")]


def test_a_model_on_a_worker_that_leaves_is_loaded_elsewhere() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t", bytes=4)})
    ram = Device("ram", 10, ["p"])
    step(pool, _worker("w1", ram), 0)
    step(pool, messages.LeaseGranted("w1", "b1", "one", 1), 0)
    held = [Resident("one", 1, "active", device="ram")]
    assert _granted(step(pool, _worker("w2", ram), 0)) == []
    assert _granted(step(pool, _worker("w1", ram, stopping=True, resident=held), 0)) == [("w2", "one")]


def test_a_lease_grows_with_what_its_model_is_seen_to_take() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t", bytes=4)})
    ram = Device("ram", 10, ["p"])
    step(pool, _worker("w1", ram), 0)
    step(pool, messages.LeaseGranted("w1", "b1", "one", 1), 0)
    seen = []
    for size in (3, 5, 4):
        step(pool, _worker("w1", ram, resident=[Resident("one", 1, "active", size, device="ram")]), 0)
        seen.append(pool.leases["w1", "one"].bytes)
    assert seen == [3, 5, 5], "measured, then its peak"


def test_a_model_that_is_removed_while_its_grant_is_written_is_not_loaded() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t")})
    [grant] = step(pool, messages.WorkerSeen(WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"])), 0)
    assert isinstance(grant, messages.Grant)
    step(pool, messages.ModelsChanged({}), 0)
    assert step(pool, messages.LeaseGranted("w1", "b1", "one", 9), 0) == [
        messages.LeaseMoved("w1", "b1", "one", 9, "free"),
    ]
    assert not pool.leases


def test_a_grant_of_a_process_that_is_gone_is_no_lease_of_the_next_one() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t")})
    for boot in ("b1", "b2"):
        granted = step(pool, messages.WorkerSeen(WorkerStatus("w1", boot, "default", TERM, 0, providers=["p"])), 0)
        assert granted == [messages.Grant("w1", boot, "one")]
    assert step(pool, messages.LeaseGranted("w1", "b1", "one", 9), 0) == [
        messages.LeaseMoved("w1", "b1", "one", 9, "lost", reason="the worker's process is gone"),
    ]
    loaded = step(pool, messages.LeaseGranted("w1", "b2", "one", 10), 0)
    assert messages.Load("w1", "b2", "one", 10) in loaded


@pytest.mark.parametrize(("devices", "granted"), [([], 0), ([Device("d", 10, ["p"])], 8)])
def test_a_lease_that_loads_shows_the_bytes_that_it_was_granted(devices: list[Device], granted: int) -> None:
    pool = Pool(term=TERM, models={"one": sized("one", 8)})
    step(pool, messages.Arrived(Request("r", "t", "one", 0, 10**9)), 0)
    step(pool, messages.WorkerSeen(WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], devices=devices)), 0)
    assert step(pool, messages.LeaseGranted("w1", "b1", "one", 9), 0) == [
        messages.Load("w1", "b1", "one", 9, "d" if devices else ""),
        messages.LeaseMoved("w1", "b1", "one", 9, "loading", granted, device="d" if devices else ""),
    ]


def test_a_worker_forgets_a_failed_model_that_was_removed() -> None:
    pool = ready({"one": Model("one", "p", "t")})
    status = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], resident=[Resident("one", 5, "failed")])
    step(pool, messages.WorkerSeen(status), 0)
    assert step(pool, messages.ModelsChanged({}), 0) == [messages.Unload("w1", "b1", "one", 5)]


def on_devices(models: dict[str, int]) -> tuple[Pool, Callable[..., list[Action]]]:
    """A pool of models with their sizes, and what tells it that a worker, with a device of 10 bytes, shows some."""
    made = {id: Model(id, "p", "t", bytes=size, preload=False, max_concurrency=1) for id, size in models.items()}
    pool = Pool(term=TERM, models=made, limits=Limits(max_wait_ms=20_000))

    def show(name: str, now_ms: int, *held: str, size: int = 10, broken: tuple[str, ...] = ()) -> list[Action]:
        resident = [Resident(id, pool.leases[name, id].epoch or 0, "active", models[id], device="ram") for id in held]
        told = dict.fromkeys(broken, "it does not answer")
        return step(pool, messages.WorkerSeen(
            WorkerStatus(name, "b", "d", TERM, 0, ["p"], resident, devices=[Device("ram", size, ["p"])], broken=told)
        ), now_ms)  # fmt: skip

    return pool, show


def test_a_queue_is_late_also_where_its_model_is_held_by_a_worker_whose_provider_is_broken() -> None:
    pool, show = on_devices({"m": 10, "n": 10})
    for name, model in (("w1", "m"), ("w2", "n")):
        show(name, 0)
        step(pool, messages.Arrived(Request(f"{model}0", "t", model, 0, 10**6)), 0)
        step(pool, messages.LeaseGranted(name, "b", model, 1), 0)
        show(name, 0, model)
    step(pool, messages.Finished("m0", 1, 1), 1)
    for number in (1, 2):
        step(pool, messages.Arrived(Request(f"n{number}", "t", "n", 1, 10**6)), 1)
    drained = 0
    for now in range(500, 22_000, 500):
        show("w1", now, "m", broken=("p",))
        if now == 500:
            step(pool, messages.Arrived(Request("m1", "t", "m", now, 10**6)), now)
        told = [*show("w2", now, "n"), *step(pool, messages.Tick(), now)]
        if any(isinstance(one, messages.LeaseMoved) and one.state == "draining" for one in told):
            drained = now
            break
    assert 15_000 < drained <= 20_500


def test_a_device_that_grows_is_granted_at_once_and_progress_alone_plans_nothing() -> None:
    pool, show = on_devices({"m": 10})
    pool.models["m"] = msgspec.structs.replace(pool.models["m"], preload=True)
    assert _granted(show("w1", 0, size=5)) == []
    assert show("w1", 1, size=5) == []
    assert _granted(show("w1", 2, size=20)) == [("w1", "m")]


def test_a_model_keeps_its_memory_for_as_long_as_its_load_took() -> None:
    """Also where that was much longer than expected."""
    pool, show = on_devices({"m": 10, "n": 10})
    show("w1", 0)
    for number in range(9):
        step(pool, messages.Arrived(Request(f"m{number}", "t", "m", 0, 10**7)), 0)
    step(pool, messages.LeaseGranted("w1", "b", "m", 1), 0)
    step(pool, messages.Arrived(Request("n", "t", "n", 0, 10**7)), 0)
    for now, state in ((30_000, "active"), (59_000, "active"), (60_500, "draining")):
        show("w1", now, "m")
        step(pool, messages.Tick(), now)
        assert pool.leases["w1", "m"].state == state, "the other one waits for three times W_max"
