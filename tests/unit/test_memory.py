"""A worker's memory on scripted devices: budgets, needs, room for a load, and the evidence that an unload waits for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from pydantic import ByteSize

from headrace.errors import ProviderError
from headrace.settings import Settings
from processors.generation import memory, needs
from processors.generation.memory import Held
from schemas import control
from schemas.events import Device
from tests.support.scripted_machine import Engines, Machine, Node

GIB = 1024**3
MIB = 1024**2
OTHERS = 7
"""Process id of somebody else."""
NO_RESERVE = Settings(worker_memory_reserve=ByteSize(0))


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr(needs, "INSPECT_AGAIN_S", 0.0)


@pytest.fixture
def machine() -> Machine:
    return Machine(gpu0=20 * GIB, gpu1=10 * GIB, ram=64 * GIB)


@pytest.fixture
def engines(machine: Machine) -> Engines:
    return Engines(machine)


@pytest.fixture
async def node(machine: Machine, engines: Engines) -> Node:
    made = Node(machine, engines, settings=NO_RESERVE)
    made.add("big", engines, expects=8 * GIB, takes=7 * GIB)
    made.add("small", engines, expects=2 * GIB)
    await made.settle()
    return made


@contextlib.asynccontextmanager
async def unloading(node: Node, model: str) -> AsyncIterator[asyncio.Task[None]]:
    """An unload that has begun; it has looked at the devices many times when the body runs."""
    task = asyncio.create_task(node.unload(model))
    await turns()
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


# --- budgets ------------------------------------------------------------------------------------------------------


async def test_gpus_are_what_an_engine_with_a_gpu_takes_memory_of(node: Node) -> None:
    assert node.memory.devices == [Device("gpu0", 20 * GIB, ["local"]), Device("gpu1", 10 * GIB, ["local"])]


async def test_some_of_each_device_is_left_to_others(machine: Machine, engines: Engines) -> None:
    machine.parts["gpu1"].total = 2 * GIB
    node = Node(machine, engines)
    await node.look()
    assert node.budgets == {"gpu0": 19 * GIB, "gpu1": 2 * GIB - 256 * MIB}
    capped = Node(machine, engines, settings=Settings(worker_memory=ByteSize(3 * GIB)))
    await capped.look()
    assert capped.budgets == {"gpu0": 3 * GIB, "gpu1": 2 * GIB - 256 * MIB}


async def test_a_budget_follows_what_others_take_and_not_what_we_hold(node: Node, machine: Machine) -> None:
    gpu = machine.parts["gpu0"]
    await node.load("big", "gpu0")
    await node.look()
    assert node.budgets["gpu0"] == 20 * GIB
    gpu.held[OTHERS] = 5 * GIB
    await node.look()
    assert node.budgets["gpu0"] == 15 * GIB
    for others, told in ((5 * GIB - 100 * MIB, 15 * GIB), (4 * GIB, 16 * GIB), (4 * GIB + 100 * MIB, 16 * GIB)):
        gpu.held[OTHERS] = others
        await node.look()
        assert node.budgets["gpu0"] == told, "small changes are no news"


@pytest.mark.parametrize("how", ["lists nobody", "lists other ids"])
async def test_what_is_held_where_a_driver_does_not_say_is_what_the_models_need(
    node: Node, machine: Machine, how: str
) -> None:
    machine.parts["gpu0"].lists = how != "lists nobody"
    machine.parts["gpu0"].foreign_ids = how == "lists other ids"
    await node.load("big", "gpu0")
    await node.load("small", "gpu1")
    await node.look()
    assert node.budgets == {"gpu0": 20 * GIB, "gpu1": 10 * GIB}
    machine.parts["gpu0"].held[OTHERS] = 6 * GIB
    await node.look()
    assert node.budgets["gpu0"] == (20 - 7 - 6 + 8) * GIB, "7 GiB are held, and counted as the 8 of the estimate"


async def test_what_a_load_takes_while_it_goes_on_is_not_taken_by_others(
    node: Node, machine: Machine, engines: Engines
) -> None:
    gpu = machine.parts["gpu0"]
    await node.load("small", "gpu0")
    node.held["big"] = Held("gpu0", engines)  # a worker shows it from the command on
    for taken in (3 * GIB, 7 * GIB):
        gpu.held[OTHERS] = taken  # it is the engine's, but nobody has told of it yet
        await node.look()
        assert node.budgets["gpu0"] == 20 * GIB
    gpu.held[OTHERS + 1] = 6 * GIB
    await node.look()
    assert node.budgets["gpu0"] == 15 * GIB, "more than the model needs is taken by somebody else"
    del node.held["big"]
    await node.look()
    assert node.budgets["gpu0"] == 7 * GIB


async def test_main_memory_of_an_engine_on_a_gpu_is_not_what_leases_are_about(machine: Machine) -> None:
    on_gpu, on_ram = Engines(machine), Engines(machine, "cpu", "ram")
    node = Node(machine, on_gpu, on_ram, settings=NO_RESERVE)
    node.add("there", on_gpu, expects=8 * GIB)
    node.add("here", on_ram, expects=4 * GIB)
    await node.load("there", "gpu0")
    await node.load("here", "ram")
    machine.parts["ram"].held[on_gpu.pids["there"]] = 3 * GIB
    await node.look()
    assert node.budgets == {"gpu0": 20 * GIB, "gpu1": 10 * GIB, "ram": 61 * GIB}


async def test_a_gpu_that_vanishes_has_no_bytes_and_comes_back(node: Node, machine: Machine) -> None:
    await node.load("small", "gpu1")
    machine.parts["gpu1"].gone = True
    await node.look()
    assert node.memory.devices == [Device("gpu0", 20 * GIB, ["local"]), Device("gpu1", 0, ["local"])]
    machine.parts["gpu1"].gone = False
    await node.look()
    assert node.budgets["gpu1"] == 10 * GIB


async def test_models_are_not_moved_to_main_memory_when_the_last_gpu_vanishes(node: Node, machine: Machine) -> None:
    for part in (machine.parts["gpu0"], machine.parts["gpu1"]):
        part.gone = True
    for _ in range(2):
        await node.look()
        assert node.budgets == {"gpu0": 0, "gpu1": 0}


async def test_a_worker_serves_when_it_knows_its_gpus_or_has_waited_long_enough(
    machine: Machine, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.answers = False
    node = Node(machine, engines)
    await node.look()
    assert not node.memory.ready and node.memory.devices == []
    machine.answers = True
    await node.look()
    assert node.memory.ready and set(node.budgets) == {"gpu0", "gpu1"}

    monkeypatch.setattr(memory, "BLIND_S", 0.0)
    machine.answers = False
    blind = Node(machine, engines, settings=NO_RESERVE)
    await blind.look()
    assert blind.memory.ready and blind.budgets == {"ram": 64 * GIB}
    machine.answers = True
    await blind.look()
    assert blind.budgets == {"gpu0": 20 * GIB, "gpu1": 10 * GIB, "ram": 0}, "its models lie on GPUs from now on"


async def test_what_cannot_be_read_stays_as_it_was(node: Node, machine: Machine, engines: Engines) -> None:
    await node.load("big", "gpu0")
    machine.trouble = OSError("no /proc")
    await node.look()
    assert node.budgets == {"gpu0": 20 * GIB, "gpu1": 10 * GIB}
    machine.trouble, engines.trouble = None, ProviderError("no answer")
    machine.parts["gpu1"].held[OTHERS] = GIB
    await node.look()
    assert node.budgets == {"gpu0": 20 * GIB, "gpu1": 9 * GIB}, "what the provider holds is taken from its last answer"
    assert node.memory.peak("big") == 7 * GIB


async def test_memory_of_a_server_is_shared_and_named_after_its_provider(machine: Machine) -> None:
    server = Engines(machine, "ollama-box", "own")
    server.memory_bytes = 6 * GIB
    node = Node(machine, server)
    node.add("m", server, expects=3 * GIB, takes=2 * GIB + 1)
    await node.settle()
    assert node.memory.devices == [Device("ollama-box", 6 * GIB, ["ollama-box"], shared=True)]
    assert node.needs == {"m": 3 * GIB}
    await node.load("m", "ollama-box")
    assert node.memory.peak("m") == 2 * GIB + MIB, "what the server tells, in whole MiB"
    await asyncio.wait_for(node.unload("m"), 1)


async def test_models_that_take_none_of_our_memory_need_none(machine: Machine) -> None:
    elsewhere = Engines(machine, "remote", "none")
    node = Node(machine, elsewhere)
    node.add("m", elsewhere, expects=0)
    await node.settle()
    assert node.memory.devices == [] and node.needs == {} and not elsewhere.inspected


# --- needs --------------------------------------------------------------------------------------------------------


async def test_a_need_is_an_estimate_and_then_the_most_that_any_load_took(
    node: Node, machine: Machine, engines: Engines
) -> None:
    assert node.needs == {"big": 8 * GIB, "small": 2 * GIB}
    assert [need.load_ms for need in node.memory.needs] == [700, 700]
    await node.load("big", "gpu0")
    assert node.memory.peak("big") == 7 * GIB, "from the first moment"
    machine.parts["gpu0"].held[engines.pids["big"]] = 9 * GIB
    await node.look()
    machine.parts["gpu0"].held[engines.pids["big"]] = 6 * GIB
    await node.look()
    assert (node.memory.peak("big"), node.needs["big"]) == (9 * GIB, 9 * GIB)
    await node.unload("big")
    await node.look()
    assert (node.memory.peak("big"), node.needs["big"]) == (0, 9 * GIB), "kept for the next load"
    assert [need.measured for need in node.memory.needs] == [True, False]
    await node.load("big", "gpu0")
    await node.look()
    assert (node.memory.peak("big"), node.needs["big"]) == (7 * GIB, 9 * GIB)


async def test_a_provider_that_cannot_tell_is_asked_again(machine: Machine, engines: Engines) -> None:
    node = Node(machine, engines)
    node.add("m", engines, expects=3 * GIB)
    engines.trouble = ProviderError("the file is not there yet")
    await node.look()
    assert node.needs == {}, "it is being asked"
    await node.settle()
    assert node.needs == {"m": 1}, "it may be loaded, and the load says what is wrong"
    engines.trouble = None
    await node.settle()
    await node.settle()
    assert node.needs == {"m": 3 * GIB}
    asked = len(engines.inspected)
    await node.settle()
    assert len(engines.inspected) == asked


async def test_a_record_that_changes_is_looked_at_again(node: Node, engines: Engines) -> None:
    assert len(engines.inspected) == 2
    node.models["big"] = msgspec.structs.replace(node.models["big"], context_length=32_768)
    engines.expects["big"] = 12 * GIB
    await node.settle()
    assert node.needs == {"big": 12 * GIB, "small": 2 * GIB}
    assert engines.inspected[2:] == [node.models["big"]]
    node.providers["local"] = (control.Provider(name="local", kind="llama_cpp", options={"batch_tokens": 64}), engines)
    await node.settle()
    assert len(engines.inspected) == 5
    del node.models["small"]
    await node.settle()
    assert node.needs == {"big": 12 * GIB}


async def test_models_of_a_provider_whose_record_changed_are_still_ours(
    node: Node, machine: Machine, engines: Engines
) -> None:
    await node.load("big", "gpu0")
    fresh = Engines(machine)
    fresh.expects = engines.expects
    node.providers["local"] = (control.Provider(name="local", kind="llama_cpp", options={"threads": 1}), fresh)
    del machine.parts["gpu0"].held[engines.pids["big"]]
    engines.pids["big"] = OTHERS + 1  # its engine died and was started again
    machine.parts["gpu0"].held[OTHERS + 1] = 7 * GIB + 512 * MIB
    await node.look()
    assert node.budgets["gpu0"] == 20 * GIB
    assert node.memory.peak("big") == 7 * GIB + 512 * MIB
    engines.lingers = True
    async with unloading(node, "big") as task:
        assert not task.done(), "evidence is asked for as ever"


# --- loads and unloads --------------------------------------------------------------------------------------------


async def test_a_load_is_refused_where_somebody_took_the_memory(node: Node, machine: Machine) -> None:
    machine.parts["gpu0"].held[OTHERS] = 13 * GIB
    with pytest.raises(ProviderError, match=r"gpu0 has 7168 MiB free and model 'big' needs 8192 MiB"):
        await node.load("big", "gpu0")
    await node.load("small", "gpu0")
    machine.parts["gpu0"].held[OTHERS] = 10 * GIB
    await node.load("big", "gpu0")
    machine.parts["gpu0"].stale = True
    await node.memory.check_room("small", "gpu0")


async def test_an_unload_returns_when_the_gpu_lists_the_process_no_more(
    node: Node, machine: Machine, engines: Engines
) -> None:
    gpu = machine.parts["gpu0"]
    gpu.held[OTHERS] = 9 * GIB
    engines.lingers = True
    await node.load("big", "gpu0")
    await node.look()
    pid = engines.pids["big"]
    async with unloading(node, "big") as task:
        assert not engines.pids and not task.done()
        gpu.held[OTHERS] = 0
        await turns()
        assert not task.done(), "what others give back proves nothing"
        await node.look()
        assert node.budgets["gpu0"] == 20 * GIB, "what lingers is counted once: by its lease"
        del gpu.held[pid]
        await asyncio.wait_for(task, 1)
    await node.look()
    assert node.budgets["gpu0"] == 20 * GIB


@pytest.mark.parametrize("how", ["lists nobody", "lists other ids"])
async def test_free_memory_that_rises_is_evidence_where_the_process_was_never_listed(
    node: Node, machine: Machine, engines: Engines, how: str
) -> None:
    gpu = machine.parts["gpu0"]
    gpu.lists, gpu.foreign_ids = how != "lists nobody", how == "lists other ids"
    engines.lingers = True
    engines.takes["big"] = 13 * GIB // 2  # an estimate is seldom met
    await node.load("big", "gpu0")
    await node.load("small", "gpu0")
    await node.look()
    big, small = engines.pids["big"], engines.pids["small"]
    async with unloading(node, "big") as one, unloading(node, "small") as other:
        assert not one.done() and not other.done(), "nothing is free yet"
        del gpu.held[small]
        await turns()
        assert not one.done() and not other.done(), "it may be of either"
        del gpu.held[big]
        await asyncio.wait_for(asyncio.gather(one, other), 1)
    await node.load("big", "gpu0")
    await node.load("small", "gpu0")
    small = engines.pids["small"]
    del node.models["small"]
    await node.look()
    async with unloading(node, "small") as task:
        assert not task.done(), "what a removed model needs is still known"
        del gpu.held[small]
        await asyncio.wait_for(task, 1)


async def test_an_unload_waits_while_a_driver_hangs(node: Node, machine: Machine, engines: Engines) -> None:
    await node.load("big", "gpu0")
    await node.look()
    machine.parts["gpu0"].stale = True
    async with unloading(node, "big") as task:
        assert not engines.pids and not task.done()
        machine.parts["gpu0"].stale = False
        await asyncio.wait_for(task, 1)


async def test_nobody_waits_for_a_gpu_that_is_gone(node: Node, machine: Machine, engines: Engines) -> None:
    engines.lingers = True
    await node.load("big", "gpu0")
    await node.load("small", "gpu1")
    async with unloading(node, "big") as task:
        assert not task.done()
        machine.parts["gpu0"].gone = True
        await asyncio.wait_for(task, 1)
    machine.parts["gpu1"].gone = True
    await asyncio.wait_for(node.unload("small"), 1)
    machine.parts["gpu0"].gone = False
    await node.look()
    assert node.budgets == {"gpu0": 13 * GIB, "gpu1": 0}, "what lingers there is not ours to grant"


async def test_in_main_memory_only_the_end_of_the_process_is_evidence(machine: Machine) -> None:
    engines = Engines(machine, kind="ram")
    node = Node(machine, engines, settings=NO_RESERVE)
    node.add("m", engines, expects=4 * GIB)
    machine.parts["ram"].held[OTHERS] = 20 * GIB
    await node.load("m", "ram")
    await node.look()
    pid = engines.pids["m"]
    machine.parts["ram"].held[pid + 1] = 0
    engines.pids["m"] = pid + 1  # the process that is ended is not the one that was seen
    async with unloading(node, "m") as task:
        machine.parts["ram"].held[OTHERS] = 0
        await turns()
        assert not task.done()
        del machine.parts["ram"].held[pid]
        await asyncio.wait_for(task, 1)


async def test_an_unload_that_the_provider_refuses_is_tried_again_with_the_same_evidence(
    node: Node, machine: Machine, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.load("big", "gpu0")
    real = engines.unload

    async def fails(model: control.Model) -> None:
        engines.pids.pop(model.id)
        raise ProviderError("it stays")

    monkeypatch.setattr(engines, "unload", fails)
    with pytest.raises(ProviderError, match="it stays"):
        await node.unload("big")
    await node.look()
    pid = next(iter(machine.parts["gpu0"].held))
    engines.pids["big"] = pid
    engines.lingers = True
    monkeypatch.setattr(engines, "unload", real)
    async with unloading(node, "big") as task:
        assert not task.done()
        del machine.parts["gpu0"].held[pid]
        await asyncio.wait_for(task, 1)
