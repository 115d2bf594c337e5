"""Two workers before one Ollama server whose memory is declared: together they never hold more there than that."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from headrace.cancellation import end
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
OTHERS = "somebody-elses"
"""A tag that no model of ours has."""
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

    async def load(self, name: str) -> None:
        """Have it load a model, as anybody may."""
        async with httpx.AsyncClient(timeout=30, verify=NO_TLS) as client:
            asked = {"model": name, "keep_alive": -1, "options": {"num_ctx": CONTEXT}}
            (await client.post(f"{self.url}/api/generate", json=asked)).raise_for_status()


def tag(model: str) -> str:
    return f"headrace-{model}"


@pytest.fixture(scope="module")
async def box() -> AsyncIterator[Box]:
    with ollama_server() as (url, _, _):
        record = control.Provider(name=PROVIDER, kind="ollama", base_url=url, options={"memory_bytes": MEMORY})
        provider = make_provider(record)
        assert isinstance(provider, Ollama)
        for name in (*map(tag, MODELS), OTHERS):
            await provider.create(name, resolve("SmolLM2-135M-Instruct", None), lambda *_: None)
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


@dataclass
class Seen:
    """What was answered while the server was watched, and what it held."""

    answered: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    holders: set[tuple[str, str]] = field(default_factory=set)


@asynccontextmanager
async def watched(box: Box, api: Api) -> AsyncIterator[Seen]:
    """Look at the server's memory, and at who has leases on it, twenty times a second."""
    seen = Seen()

    async def watch() -> None:
        while True:
            seen.sums.append(sum((await box.holds()).values()))
            for lease in await leases(api):
                assert lease.device == PROVIDER
                seen.holders.add((lease.worker, lease.model))
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        await end(watching)
    assert watching.cancelled() or watching.exception() is None, watching.exception()
    assert max(seen.sums) <= MEMORY, f"{max(seen.sums) // MIB} MiB were held of {MEMORY // MIB}"


async def ask_for(api: Api, seconds: float, seen: Seen, models: Sequence[str] = MODELS) -> None:
    """Callers who ask for models at random, without a pause."""
    end_s = time.monotonic() + seconds

    async def caller(chance: random.Random) -> None:
        while time.monotonic() < end_s:
            model = chance.choice(models)
            asked = {"model": model, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 6}
            answer = await api.ask(asked)
            if answer.status_code == 200:
                seen.answered[model] += 1
            else:
                seen.refused.append(answer.text)

    await asyncio.gather(*(caller(random.Random(n)) for n in range(CALLERS)))


@pytest.mark.timeout(180)
async def test_two_workers_never_hold_more_than_the_server_gives(stack: Stack, box: Box) -> None:
    async with Api(stack) as api:
        async with watched(box, api) as seen:
            await ask_for(api, SECONDS, seen)
        assert not seen.refused
        assert set(seen.answered) == set(MODELS)
        assert {worker for worker, _ in seen.holders} == {"w1", "w2"}, "both workers held models there"
        assert max(seen.sums) > MEMORY / 2, "it was put to use"
        assert stack.ledger()["in_flight"] == 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
async def test_what_a_worker_that_is_gone_had_loaded_still_counts(stack: Stack, box: Box, how: signal.Signals) -> None:
    async with Api(stack) as api:
        async with watched(box, api) as seen:
            asking = asyncio.create_task(ask_for(api, SECONDS, seen))
            for _ in range(3):
                await asyncio.sleep(SECONDS / 5)
                stack.signal("worker-1", how)
            await asking
        after = Seen()
        await ask_for(api, SECONDS / 4, after)
        assert not after.refused and set(after.answered) == set(MODELS), "nothing of it is lost"


@pytest.mark.timeout(120)
async def test_what_others_have_loaded_counts_and_stays_and_what_nobody_wants_goes(stack: Stack, box: Box) -> None:
    async with Api(stack) as api:
        for lease in await leases(api):
            ran = await asyncio.to_thread(stack.run, "models", "unload", lease.model)
            assert ran.returncode == 0, ran.stderr

        async def empty() -> bool:
            return not await box.holds()

        await until(empty, "the server is empty", 30)
        for name in (OTHERS, tag("elm")):
            await box.load(name)
        assert set(await box.holds()) == {OTHERS, tag("elm")}

        async def gone() -> bool:
            return set(await box.holds()) == {OTHERS}

        async with watched(box, api) as seen:
            await until(gone, "a model of ours under no lease is unloaded", 30)
            await ask_for(api, SECONDS / 2, seen, MODELS[1:])
            assert OTHERS in await box.holds(), "it is not ours to unload"
        assert not seen.refused and set(seen.answered) == set(MODELS[1:]), "the rest of the memory goes round"


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
