"""Two workers that see the same main memory: what their scheduler grants, and what keeps it from being oversold."""

from __future__ import annotations

import pytest
from pydantic import ByteSize

from deploy.embedded.roles import memory_shares
from headrace.errors import ProviderError
from headrace.settings import Settings
from processors.scheduler import messages
from processors.scheduler.policy import step
from processors.scheduler.state import LeaseState, Pool, Request
from schemas.control import Model
from schemas.events import Resident, WorkerStatus
from tests.support.scripted_machine import Engines, Machine, Node

GIB = 1024**3
TERM = 3
MODELS = ("a", "b")


class Shared:
    """A machine with two workers, under one scheduler."""

    def __init__(self, total: int, need: int, settings: Settings) -> None:
        self.machine = Machine(ram=total)
        self.nodes: dict[str, Node] = {}
        for worker in ("w1", "w2"):
            engines = Engines(self.machine, kind="ram")
            self.nodes[worker] = Node(self.machine, engines, settings=settings)
            for model in MODELS:
                self.nodes[worker].add(model, engines, expects=need)
        records = {model: Model(model, "local", model, bytes=need, preload=False) for model in MODELS}
        self.pool = Pool(term=TERM, models=records)
        self.epochs = 0

    @property
    def taken(self) -> int:
        return sum(self.machine.parts["ram"].held.values())

    async def heartbeats(self) -> list[messages.Load]:
        """Both workers look and report; what they are told to load then."""
        told: list[messages.Action] = []
        for name, node in self.nodes.items():
            await node.settle()
            epochs = {lease.model: lease.epoch for lease in self.pool.leases.values() if lease.worker == name}
            resident = [
                Resident(model, epochs[model] or 0, "active", node.memory.peak(model), device="ram")
                for model in node.held
            ]
            status = WorkerStatus(name, "b", "default", TERM, 0, ["local"], resident, devices=node.memory.devices)
            told += step(self.pool, messages.WorkerSeen(status), 0)
        return self.loads(told)

    def wanted(self, model: str) -> list[messages.Load]:
        """Somebody asks for a model."""
        return self.loads(step(self.pool, messages.Arrived(Request(f"r-{model}", "t", model, 0, 10**9)), 0))

    def loads(self, actions: list[messages.Action]) -> list[messages.Load]:
        found: list[messages.Load] = []
        for grant in [action for action in actions if isinstance(action, messages.Grant)]:
            self.epochs += 1
            granted = step(self.pool, messages.LeaseGranted(grant.worker, grant.boot, grant.model, self.epochs), 0)
            found += [action for action in granted if isinstance(action, messages.Load)]
        return found

    async def obey(self, load: messages.Load) -> None:
        await self.nodes[load.worker].load(load.model, load.device)


async def test_the_last_look_before_a_load_sees_what_the_other_worker_took() -> None:
    shared = Shared(10 * GIB, 6 * GIB, Settings())
    await shared.heartbeats()
    (first,), (second,) = shared.wanted("a"), shared.wanted("b")
    assert (first.worker, second.worker) == ("w1", "w2"), "to the scheduler each has memory of its own"
    await shared.obey(first)
    with pytest.raises(ProviderError, match="ram has 4096 MiB free and model 'b' needs 6144 MiB"):
        await shared.obey(second)
    assert shared.taken == 6 * GIB
    await shared.heartbeats()
    assert shared.nodes["w2"].budgets == {"ram": 4 * GIB - 512 * 1024**2}, "from now on it is told"


async def test_loads_at_the_same_moment_oversell_and_the_idle_models_give_way() -> None:
    shared = Shared(13 * GIB, 6 * GIB, Settings(worker_memory_reserve=ByteSize(2 * GIB)))
    await shared.heartbeats()
    loads = shared.wanted("a") + shared.wanted("b")
    for load in loads:  # both looked before either took anything
        await shared.nodes[load.worker].memory.check_room(load.model, load.device)
    for load in loads:
        await shared.obey(load)
    assert shared.taken == 12 * GIB, "more than the reserve allows"
    await shared.heartbeats()
    for request in ("r-a", "r-b"):
        step(shared.pool, messages.Finished(request, 1, 1), 0)
    await shared.heartbeats()
    step(shared.pool, messages.Tick(), 1)
    assert {lease.state for lease in shared.pool.leases.values()} == {LeaseState.RELEASING}


async def test_workers_that_were_given_their_shares_never_oversell() -> None:
    shared = Shared(10 * GIB, 4 * GIB, Settings(worker_memory=ByteSize(9 * GIB // 2)))
    await shared.heartbeats()
    for load in shared.wanted("a") + shared.wanted("b"):
        await shared.obey(load)
    assert await shared.heartbeats() == []
    assert shared.taken == 8 * GIB
    assert {lease.worker for lease in shared.pool.leases.values()} == {"w1", "w2"}
    assert all(node.budgets == {"ram": 9 * GIB // 2} for node in shared.nodes.values())


async def test_shares_are_of_what_the_device_has_for_all_of_them() -> None:
    shared = Shared(10 * GIB, 4 * GIB, Settings(worker_memory_share=0.5, worker_memory_reserve=ByteSize(GIB)))
    shared.machine.parts["ram"].held[1] = GIB  # somebody else's
    await shared.heartbeats()
    assert all(node.budgets == {"ram": 4 * GIB} for node in shared.nodes.values())
    for load in shared.wanted("a") + shared.wanted("b"):
        await shared.obey(load)
    assert await shared.heartbeats() == []
    assert shared.taken == 9 * GIB
    assert all(node.budgets == {"ram": 4 * GIB} for node in shared.nodes.values())


def test_workers_that_are_started_together_share_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_WORKER_MEMORY", raising=False)
    monkeypatch.delenv("HEADRACE_WORKER_MEMORY_SHARE", raising=False)
    assert memory_shares(1) == {}
    assert float(memory_shares(2)["HEADRACE_WORKER_MEMORY_SHARE"]) == 0.5
    assert float(memory_shares(3)["HEADRACE_WORKER_MEMORY_SHARE"]) * 3 <= 1
    monkeypatch.setenv("HEADRACE_WORKER_MEMORY", "2 GiB")
    assert memory_shares(2) == {}
