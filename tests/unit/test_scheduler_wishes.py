"""What an operator asks of a pool: loads, unloads and releases, and that the next scheduler knows of them."""

from __future__ import annotations

import msgspec

from processors.scheduler import messages, wishes
from processors.scheduler.messages import LeaseMoved
from processors.scheduler.policy import step
from processors.scheduler.state import Pool
from schemas.control import Model
from schemas.events import Device, PoolWishes, Resident, WorkerStatus
from tests.support.one_machine import TERM, Machine, sized

GIVEN_UP_MS = 60_000


def load(machine: Machine, model: str) -> None:
    machine.tell(messages.LoadAsked(model, machine.now + GIVEN_UP_MS))


def test_a_load_takes_the_memory_of_idle_models() -> None:
    machine = Machine(10, [sized("idle", 8), sized("asked", 8)])
    load(machine, "idle")
    machine.run(2_000)
    assert machine.held == {"idle"}, "nobody waits for it"
    load(machine, "asked")
    machine.run(2_000)
    assert machine.held == {"asked"}
    assert not machine.pool.wanted, "what was wished for is there"


def test_a_load_waits_for_a_model_in_use_and_is_given_up_after_a_minute() -> None:
    machine = Machine(10, [sized("used", 8), sized("asked", 8)])
    machine.ask("r", "used")
    machine.run(2_000)
    load(machine, "asked")
    machine.run(GIVEN_UP_MS - 5_000)
    assert machine.held == {"used"}
    machine.done("r")
    machine.run(3_000)
    assert machine.held == {"asked"}
    machine.ask("s", "asked")
    load(machine, "used")
    machine.run(GIVEN_UP_MS + 1_000)
    machine.done("s")
    machine.run(5_000)
    assert machine.held == {"asked"}, "the wish was given up before its memory was free"


def test_a_load_never_takes_a_pinned_model() -> None:
    machine = Machine(10, [sized("kept", 8, pinned=True), sized("asked", 8)])
    machine.run(2_000)
    load(machine, "asked")
    machine.run(30_000)
    assert machine.held == {"kept"}


def test_a_load_that_is_asked_for_twice_is_made_once() -> None:
    machine = Machine(10, [sized("asked", 8)])
    load(machine, "asked")
    load(machine, "asked")
    machine.run(5_000)
    load(machine, "asked")
    machine.run(5_000)
    assert [model for _, model in machine.loads] == ["asked"]


def test_a_load_that_failed_is_tried_again_at_once() -> None:
    machine = Machine(10, [sized("flaky", 4)])
    load(machine, "flaky")
    epoch, _, until = machine.resident["flaky"]
    machine.resident["flaky"] = (epoch, "failed", until)
    machine.run(500)
    assert len(machine.loads) == 1
    load(machine, "flaky")
    assert len(machine.loads) == 2
    machine.run(2_000)
    assert machine.pool.leases["w1", "flaky"].state == "active"


def test_an_unloaded_model_stays_out_though_it_is_preloaded_until_somebody_asks() -> None:
    preloaded = msgspec.structs.replace(sized("one", 8), preload=True)
    machine = Machine(10, [preloaded])
    machine.run(2_000)
    assert machine.held == {"one"}
    machine.tell(messages.UnloadAsked("one", "room for a game"))
    assert machine.held == set()
    machine.run(120_000)
    assert machine.held == set() and len(machine.loads) == 1
    machine.ask("r", "one")
    machine.run(2_000)
    assert [name for _, name in machine.assigned] == ["r"]
    machine.done("r")
    machine.run(60_000)
    assert machine.held == {"one"}, "the wish ended with the next request"


def test_an_unload_lets_running_requests_end_and_a_waiting_one_load_it_again() -> None:
    machine = Machine(10, [sized("one", 8, max_concurrency=1)])
    machine.ask("runs", "one")
    machine.run(2_000)
    machine.ask("waits", "one")
    machine.tell(messages.UnloadAsked("one", "by hand"))
    machine.run(5_000)
    assert machine.held == {"one"} and [name for _, name in machine.assigned] == ["runs"]
    machine.done("runs")
    assert machine.held == set()
    machine.run(3_000)
    assert [name for _, name in machine.assigned] == ["runs", "waits"]
    assert len(machine.loads) == 2


def test_a_model_is_unloaded_also_while_its_grant_is_written() -> None:
    pool = Pool(term=TERM, models={"one": Model("one", "p", "t")})
    [grant] = step(pool, messages.WorkerSeen(WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"])), 0)
    assert isinstance(grant, messages.Grant)
    assert step(pool, messages.UnloadAsked("one", "by hand"), 0) == []
    step(pool, messages.LeaseGranted("w1", "b1", "one", 9), 0)
    assert step(pool, messages.Tick(), 0) == [], "a worker that does not show it may not have read that it is to load"
    shown = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"], resident=[Resident("one", 9, "loading")])
    assert messages.Unload("w1", "b1", "one", 9) in step(pool, messages.WorkerSeen(shown), 0)


def test_a_pinned_model_is_not_unloaded() -> None:
    machine = Machine(10, [sized("kept", 8, pinned=True)])
    machine.run(2_000)
    machine.tell(messages.UnloadAsked("kept", "by hand"))
    machine.run(5_000)
    assert machine.held == {"kept"} and len(machine.loads) == 1 and not machine.pool.parked


def test_of_two_wishes_the_later_one_holds() -> None:
    machine = Machine(10, [sized("used", 8), sized("asked", 8)])
    machine.ask("r", "used")
    machine.run(2_000)
    load(machine, "asked")
    machine.tell(messages.UnloadAsked("asked", "by hand"))
    machine.done("r")
    machine.run(5_000)
    assert machine.held == {"used"}, "nobody wants it any more"
    machine.tell(messages.UnloadAsked("used", "by hand"))
    load(machine, "used")
    machine.run(5_000)
    assert machine.held == {"used"} and len(machine.loads) == 2


def quarantined() -> Machine:
    """A machine whose worker was told to unload `old`, and shows it still, 31 s later."""
    machine = Machine(10, [sized("old", 8), sized("new", 8)])
    load(machine, "old")
    machine.run(2_000)
    keeps = machine.resident["old"]
    machine.tell(messages.UnloadAsked("old", "by hand"))
    machine.resident["old"] = (keeps[0], "unloading", keeps[2])
    machine.run(31_000)
    assert machine.pool.leases["w1", "old"].state == "quarantined"
    return machine


def test_a_release_gives_quarantined_bytes_to_others_but_not_to_the_same_model() -> None:
    machine = quarantined()
    machine.ask("n", "new")
    machine.ask("o", "old")
    machine.run(2_000)
    assert [model for _, model in machine.loads] == ["old"]
    machine.tell(messages.ReleaseAsked("w1", "old", "seen in nvidia-smi"))
    machine.run(3_000)
    assert [model for _, model in machine.loads] == ["old", "new"]
    machine.done("n")
    machine.run(60_000)
    assert [model for _, model in machine.loads] == ["old", "new"], "the worker still has the old one in its books"
    del machine.resident["old"]
    machine.run(3_000)
    assert [model for _, model in machine.loads] == ["old", "new", "old"]
    assert not machine.pool.released


def test_released_bytes_stay_free_whatever_their_worker_shows() -> None:
    machine = quarantined()
    epoch, _, until = machine.resident["old"]
    machine.resident["old"] = (epoch, "active", until)
    machine.tell(messages.ReleaseAsked("w1", "old", "it does not know what it says"))
    machine.shown_bytes = 8
    machine.run(1_000)
    assert machine.pool.leases["w1", "old"].holds == 0


def test_a_release_says_who_and_why_in_the_lease_event() -> None:
    machine = quarantined()
    epoch = machine.resident["old"][0]
    actions = step(machine.pool, messages.ReleaseAsked("w1", "old", "ann: seen in nvidia-smi"), machine.now)
    told = LeaseMoved("w1", "b1", "old", epoch, "free", 8, "ann: seen in nvidia-smi", "d")
    assert told in actions


def test_only_quarantined_bytes_are_released() -> None:
    machine = Machine(10, [sized("one", 8)])
    load(machine, "one")
    machine.run(2_000)
    assert step(machine.pool, messages.ReleaseAsked("w1", "one", "wrong"), machine.now) == []
    assert step(machine.pool, messages.ReleaseAsked("w2", "one", "wrong"), machine.now) == []
    assert machine.pool.leases["w1", "one"].holds == 8


def test_the_next_scheduler_knows_what_was_asked() -> None:
    machine = quarantined()
    step(machine.pool, messages.ReleaseAsked("w1", "old", "seen"), machine.now)
    step(machine.pool, messages.LoadAsked("new", machine.now + GIVEN_UP_MS), machine.now)
    wire = msgspec.json.encode(wishes.kept(machine.pool, 12))
    told = msgspec.json.decode(wire, type=PoolWishes)
    assert told.next_offset == 12
    heir = Pool(term=TERM + 1, models=machine.pool.models)
    wishes.restore(heir, told)
    epoch = machine.resident["old"][0]
    shown = WorkerStatus(
        "w1", "b1", "default", TERM + 1, machine.now, providers=["p"], devices=[Device("d", 10, ["p"])],
        resident=[Resident("old", epoch, "unloading", 8, device="d")],
    )  # fmt: skip
    actions = step(heir, messages.WorkerSeen(shown), machine.now)
    assert heir.leases["w1", "old"].holds == 0, "the word is remembered"
    assert heir.parked == {"old"}
    assert messages.Grant("w1", "b1", "new", "d", 8) in actions, "and so is the load"


def test_a_wish_for_a_model_that_is_not_there_is_nothing() -> None:
    pool = Pool(term=TERM)
    for wish in (messages.LoadAsked("x", 99), messages.UnloadAsked("x", "y"), messages.ReleaseAsked("w", "x", "y")):
        assert step(pool, wish, 0) == []
    assert wishes.kept(pool, 0) == PoolWishes()


def test_weights_of_tenants_change_in_queues_that_are_there() -> None:
    machine = Machine(10, [sized("one", 8)])
    machine.ask("r", "one")
    machine.tell(messages.WeightsChanged({"t": 4.0}))
    assert machine.pool.queue("one").weights == {"t": 4.0}
    machine.tell(messages.WeightsChanged({}))
    assert machine.pool.queue("one").weights == {}
