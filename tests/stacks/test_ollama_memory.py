"""Two workers before one Ollama server whose memory is declared: together they never hold more there than that."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from processors.generation.providers.factory import make_provider
from processors.generation.providers.llama_models import resolve
from processors.generation.providers.ollama import Ollama
from schemas import control
from schemas.admin import LeaseView, LeaseViews, WorkerViews
from tests.support.backends import ollama_server
from tests.support.chat import Api
from tests.support.stacks import NO_TLS, Stack, running_stack
from tests.support.waiting import until

PROVIDER = "box"
MODELS = ("elm", "fir", "gum", "hop")
CONTEXT, SLOTS = 512, 2
CALLERS = 6
SECONDS = 20.0
MIB = 1024 * 1024
DECLARED = 240 * MIB
"""More than a model takes; the server's list says how much that is."""
MEMORY = 520 * MIB
"""Room for two of the models, and not for three."""


@dataclass
class Box:
    """The server."""

    url: str

    async def holds(self) -> dict[str, int]:
        """Bytes by tag, as the server tells."""
        async with httpx.AsyncClient(timeout=5, verify=NO_TLS) as client:
            held = (await client.get(f"{self.url}/api/ps")).json()["models"]
        return {model["name"].split(":")[0]: model["size_vram"] or model["size"] for model in held}


def tag(model: str) -> str:
    return f"headrace-{model}"


@pytest.fixture(scope="module")
async def box() -> AsyncIterator[Box]:
    with ollama_server() as (url, _, _):
        record = control.Provider(name=PROVIDER, kind="ollama", base_url=url, options={"memory_bytes": MEMORY})
        provider = make_provider(record)
        assert isinstance(provider, Ollama)
        for model in MODELS:
            await provider.create(tag(model), resolve("SmolLM2-135M-Instruct", None), lambda *_: None)
        await provider.close()
        yield Box(url)


@pytest.fixture(scope="module")
def stack(box: Box, tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[Stack]:
    config = f"""
[[providers]]
name = "{PROVIDER}"
kind = "ollama"
base_url = "{box.url}"
options = {{ memory_bytes = {MEMORY} }}
"""
    for model in MODELS:
        config += f"""
[[models]]
id = "{model}"
provider = "{PROVIDER}"
backend_tag = "{tag(model)}"
context_length = {CONTEXT}
max_concurrency = {SLOTS}
memory = "{DECLARED} B"
preload = false
"""
    directory: Path = tmp_path_factory.mktemp("box")
    with running_stack(directory, upstream_url, models=config, replicas={"worker": 2}) as made:
        yield made


async def leases(api: Api) -> list[LeaseView]:
    views = LeaseViews.model_validate_json((await api.get("/admin/leases")).content).data
    return [view for view in views if view.model in MODELS]


@pytest.mark.timeout(180)
async def test_two_workers_never_hold_more_than_the_server_gives(stack: Stack, box: Box) -> None:
    answered: Counter[str] = Counter()
    refused: list[str] = []
    sums: list[int] = []
    holders: set[tuple[str, str]] = set()
    end = time.monotonic() + SECONDS

    async def caller(api: Api, chance: random.Random) -> None:
        while time.monotonic() < end:
            model = chance.choice(MODELS)
            asked = {"model": model, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 6}
            answer = await api.ask(asked)
            if answer.status_code == 200:
                answered[model] += 1
            else:
                refused.append(answer.text)

    async def watch(api: Api) -> None:
        while True:
            sums.append(sum((await box.holds()).values()))
            for lease in await leases(api):
                assert lease.device == PROVIDER
                holders.add((lease.worker, lease.model))
            await asyncio.sleep(0.05)

    async with Api(stack) as api:
        watching = asyncio.create_task(watch(api))
        await asyncio.gather(*(caller(api, random.Random(n)) for n in range(CALLERS)))
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        assert not refused
        assert set(answered) == set(MODELS)
        assert {worker for worker, _ in holders} == {"w1", "w2"}, "both workers held models there"
        assert max(sums) <= MEMORY, f"{max(sums) // MIB} MiB were held of {MEMORY // MIB}"
        assert max(sums) > MEMORY / 2, "it was put to use"
        assert stack.ledger()["in_flight"] == 0


@pytest.mark.timeout(60)
async def test_leases_have_the_sizes_that_the_server_tells(stack: Stack, box: Box) -> None:
    async with Api(stack) as api:
        held = {lease.model for lease in await leases(api)}
        model = next(model for model in MODELS if model not in held)
        ran = await asyncio.to_thread(stack.run, "models", "load", model)
        assert ran.returncode == 0, ran.stderr

        async def loaded() -> LeaseView | None:
            return next((one for one in await leases(api) if (one.model, one.state) == (model, "active")), None)

        lease = await until(loaded, f"{model} is loaded", 20)
        told = (await box.holds())[tag(model)]
        assert lease.device == PROVIDER
        assert told - MIB <= lease.bytes <= told + 2 * MIB < DECLARED, "no longer what was declared"
        workers = WorkerViews.model_validate_json((await api.get("/admin/workers")).content).data
        own = [(device.id, device.bytes) for worker in workers for device in worker.devices if device.id == PROVIDER]
        assert own == [(PROVIDER, MEMORY)] * 2
        total = sum(device.held_bytes for worker in workers for device in worker.devices if device.id == PROVIDER)
        assert total == sum(one.bytes for one in await leases(api)) <= MEMORY
