"""Models of llama.cpp on two GPUs: leases follow what the driver lists, to the end of memory that outlives its process.

No GPU is here. NVML is the fake library, the engine the real one (`tests/support/gpu_engines.py`).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from schemas.admin import LeaseView, LeaseViews, WorkerViews
from tests.support.chat import Api
from tests.support.fake_nvml.driver import FakeGpu, FakeNvml
from tests.support.gpu_engines import Driver, engine_with_gpu
from tests.support.stacks import Stack, running_stack
from tests.support.waiting import until

MIB = 1024 * 1024
CARD, TAKES, RESERVE = 1024 * MIB, 520 * MIB, 64 * MIB
"""A card holds one of these models."""
STRANGER = 4_000_000
"""Process id of somebody else, beyond those that the kernel gives."""
MODELS = ("ash", "birch", "cedar")
CONFIG = "".join(
    f"""
[[models]]
id = "{name}"
provider = "local"
backend_tag = "SmolLM2-135M-Instruct"
context_length = 512
max_concurrency = 2
preload = false
"""
    for name in MODELS
)


@dataclass
class Cards:
    """The stack, and the two GPUs that its worker sees."""

    stack: Stack
    nvml: FakeNvml
    driver: Driver
    api: Api

    def gpu(self, uuid: str) -> FakeGpu:
        return next(gpu for gpu in self.nvml.gpus if gpu.uuid == uuid)

    def other(self, uuid: str) -> FakeGpu:
        return next(gpu for gpu in self.nvml.gpus if gpu.uuid != uuid)

    async def ask(self, model: str) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        answer = await self.api.ask(body)
        assert answer.status_code == 200, answer.text

    async def leases(self) -> dict[str, LeaseView]:
        """Those of the three models, by model."""
        answer = await self.api.get("/admin/leases")
        views = LeaseViews.model_validate_json(answer.content).data
        return {view.model: view for view in views if view.model in MODELS}

    async def budgets(self) -> dict[str, int]:
        """What the worker says that models may take of each device."""
        answer = await self.api.get("/admin/workers")
        (worker,) = WorkerViews.model_validate_json(answer.content).data
        return {device.id: device.bytes for device in worker.devices}

    async def shows(self, gpu: FakeGpu, size: int) -> None:
        async def look() -> bool:
            return (await self.budgets()).get(gpu.uuid) == size

        await until(look, f"{gpu.uuid} has {size // MIB} MiB for models", 15)

    async def ended(self, model: str) -> None:
        async def look() -> bool:
            return model not in await self.leases()

        await until(look, f"the lease of {model} has ended", 20)

    async def filled(self) -> tuple[str, str, str]:
        """Have a model on each card; returns their ids, and the one that is on none."""
        while len(held := await self.leases()) < 2:
            await self.ask(next(model for model in MODELS if model not in held))
        first, second = sorted(held)
        return first, second, next(model for model in MODELS if model not in held)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[tuple[Stack, FakeNvml]]:
    directory = tmp_path_factory.mktemp("gpus")
    nvml = FakeNvml(directory)
    nvml.add(CARD)
    nvml.add(CARD)
    nvml.save()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    env = {**nvml.env, **engine_with_gpu(directory), "HEADRACE_WORKER_MEMORY_RESERVE": str(RESERVE)}
    with running_stack(directory, upstream_url, models=CONFIG, env=env) as stack:
        yield stack, nvml


@pytest.fixture
async def cards(machine: tuple[Stack, FakeNvml]) -> AsyncIterator[Cards]:
    stack, nvml = machine
    driver = Driver(stack, nvml, TAKES)
    async with driver.playing(), Api(stack) as api:
        yield Cards(stack, nvml, driver, api)
        driver.let_go()


@pytest.mark.timeout(120)
async def test_each_model_lies_on_the_gpu_that_it_was_granted(cards: Cards) -> None:
    await cards.ask("ash")
    await cards.ask("birch")
    held = await cards.leases()
    assert {lease.device for lease in held.values()} == {gpu.uuid for gpu in cards.nvml.gpus}, "one is full with one"
    assert [(lease.state, lease.bytes) for lease in held.values()] == [("active", TAKES)] * 2, "as NVML lists them"
    for lease in held.values():
        (pid,) = cards.driver.listed(cards.gpu(lease.device))
        assert cards.driver.engines()[pid] == lease.device
    assert await cards.budgets() == {gpu.uuid: CARD - RESERVE for gpu in cards.nvml.gpus}
    shown = json.loads((await asyncio.to_thread(cards.stack.run, "workers", "--json")).stdout)
    assert [(device["id"], device["held_bytes"]) for device in shown[0]["devices"]] == [
        (gpu.uuid, TAKES) for gpu in cards.nvml.gpus
    ]
    await cards.ask("cedar")
    after = await cards.leases()
    assert len(after) == 2 and after["cedar"].bytes == TAKES


@pytest.mark.timeout(60)
async def test_how_busy_each_gpu_is_is_shown(cards: Cards) -> None:
    cards.nvml.gpus[0].busy, cards.nvml.gpus[1].busy = 40, None
    cards.nvml.save()

    async def shown() -> bool:
        answer = await cards.api.get("/admin/workers")
        (worker,) = WorkerViews.model_validate_json(answer.content).data
        return {device.utilisation for device in worker.devices} == {0.4, None}

    await until(shown, "one computes, of the other the driver tells nothing", 15)
    assert "40% busy" in " ".join((await asyncio.to_thread(cards.stack.run, "workers")).stdout.split())


@pytest.mark.timeout(120)
async def test_memory_that_outlives_its_process_is_granted_when_it_is_gone(cards: Cards) -> None:
    *held, missing = await cards.filled()
    cards.driver.lingers = True
    waiting = asyncio.create_task(cards.ask(missing))

    async def leaving() -> LeaseView | None:
        found = [lease for lease in (await cards.leases()).values() if lease.state == "releasing"]
        return found[0] if found else None

    lease = await until(leaving, "a model makes room", 20)
    assert lease.model in held
    gpu = cards.gpu(lease.device)
    (pid,) = cards.driver.listed(gpu)
    await until(lambda: pid not in cards.driver.engines(), "its process has ended", 20)
    budgets = [await cards.budgets()]
    deadline = asyncio.get_running_loop().time() + 3
    while asyncio.get_running_loop().time() < deadline:
        now = (await cards.leases())[lease.model]
        assert (now.state, now.bytes) == ("releasing", TAKES), "the driver still has it"
        assert not waiting.done()
        budgets.append(await cards.budgets())
        await asyncio.sleep(0.2)
    assert {size for one in budgets for size in one.values()} == {CARD - RESERVE}, "what lingers is counted once"
    cards.driver.let_go()
    await asyncio.wait_for(waiting, 30)
    assert (await cards.leases())[missing].device == gpu.uuid


@pytest.mark.timeout(120)
async def test_a_model_gives_way_when_somebody_else_takes_memory(cards: Cards) -> None:
    first, second, _ = await cards.filled()
    held = await cards.leases()
    gpu = cards.gpu(held[first].device)
    gpu.take(STRANGER, 460 * MIB)
    await cards.ended(first)
    await cards.shows(gpu, CARD - 460 * MIB - RESERVE)
    assert (await cards.leases())[second] == held[second], "the other card's model stays"
    await cards.ask(first)
    assert (await cards.leases())[first].device != gpu.uuid, "it found its place on the other card"
    gpu.give_back(STRANGER)
    await cards.shows(gpu, CARD - RESERVE)
    await cards.ask(second)
    assert (await cards.leases())[second].device == gpu.uuid


@pytest.mark.timeout(120)
async def test_a_gpu_that_falls_off_the_bus_holds_nothing_and_the_other_serves(cards: Cards) -> None:
    first, second, missing = await cards.filled()
    held = await cards.leases()
    gpu = cards.gpu(held[first].device)
    gpu.fall_off_the_bus()
    await cards.shows(gpu, 0)
    await cards.ended(first)
    assert (await cards.leases())[second].state == "active"
    for model in (first, missing, second):
        await cards.ask(model)
        now = await cards.leases()
        assert {lease.device for lease in now.values()} == {cards.other(gpu.uuid).uuid}
    assert cards.stack.ledger()["in_flight"] == 0
