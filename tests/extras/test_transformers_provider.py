"""The suite of every provider, on the `transformers` provider with SmolLM2; and what is this provider's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from headrace.errors import ProviderError, ProviderRefused
from processors.generation.providers.base import RAM
from processors.generation.providers.transformers import Options, Transformers
from tests.contract.test_providers import *  # noqa: F403  (its tests run here with this module's backend)
from tests.contract.test_providers import reasons, text_of, usage_of
from tests.support.backends import ASK, Backend, child_backend
from tests.support.hf_model import smollm2


@pytest.fixture(scope="session")
async def backend() -> AsyncIterator[Backend]:
    folder = await asyncio.to_thread(smollm2)
    provider = Transformers("transformers", Options(model_dir=str(folder.parent), dtype="float32"))
    async with child_backend("transformers", provider, folder.name) as made:
        made.options = {"model_dir": str(folder.parent)}
        await provider.load(made.model)
        yield made


async def test_an_answer_is_the_same_alone_and_among_others(backend: Backend) -> None:
    """Greedy answers of many lengths that begin at many moments, against each of them alone."""
    model = msgspec.structs.replace(backend.model, id="many", max_concurrency=6, context_length=256)
    await backend.provider.load(model)

    async def says(number: int) -> str:
        messages = [{"role": "user", "content": f"Count on from {number}: " + "one two three " * (5 * number)}]
        body = {"messages": messages, "max_tokens": 4 + 3 * number, "temperature": 0.0}
        return text_of([piece async for batch in backend.provider.generate(model, body) for piece in batch])

    async def later(number: int) -> str:
        await asyncio.sleep(0.05 * number)
        return await says(number)

    alone = [await says(number) for number in range(8)]
    together = await asyncio.gather(*(later(number) for number in range(8)))
    await backend.provider.unload(model)
    assert together == alone


async def test_penalties_and_biases_change_what_is_said(backend: Backend) -> None:
    plain = text_of(await backend.pieces(temperature=0.0, max_tokens=24))
    assert text_of(await backend.pieces(temperature=0.0, max_tokens=24, frequency_penalty=2.0)) != plain
    forced = await backend.pieces(temperature=0.0, max_tokens=3, logit_bias={"28": 100})
    assert len(set(text_of(forced))) == 1
    with pytest.raises(ProviderRefused, match="no token"):
        await backend.pieces(logit_bias={"999999": 1})


async def test_a_template_that_refuses_is_told_in_its_own_words(backend: Backend, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("template") / "template.jinja"
    path.write_text("{{ raise_exception('only poems are read here') }}")
    options = Options(model_dir=str((await asyncio.to_thread(smollm2)).parent), chat_template=str(path))
    provider = Transformers("strict", options)
    try:
        await provider.load(backend.model)
        with pytest.raises(ProviderRefused, match="only poems are read here"):
            async for _ in provider.generate(backend.model, {"messages": ASK}):
                pass
    finally:
        await provider.close()


async def test_more_requests_than_slots_all_get_their_answers(backend: Backend) -> None:
    answers = await asyncio.gather(*(backend.pieces(max_tokens=6, seed=seed) for seed in range(7)))
    assert all(usage_of(pieces).completion_tokens <= 6 and reasons(pieces) for pieces in answers)


async def test_a_model_leaves_nothing_in_the_worker(backend: Backend) -> None:
    """The worker's own memory does not grow with a model; the child holds it, and is gone after the unload."""
    worker = psutil.Process()
    model = msgspec.structs.replace(backend.model, id="again")
    before = worker.memory_info().rss
    for _ in range(2):
        loaded = await backend.provider.load(model)
        assert loaded.bytes > 250_000_000
        children = {child.pid for child in worker.children()}
        await backend.provider.unload(model)
        gone = children - {child.pid for child in worker.children()}
        assert len(gone) == 1
    assert worker.memory_info().rss - before < 30_000_000


async def test_a_child_that_hangs_fails_its_answers_and_gives_way_to_another(backend: Backend) -> None:
    folder = await asyncio.to_thread(smollm2)
    options = Options(model_dir=str(folder.parent), idle_timeout_s=2)
    model = msgspec.structs.replace(backend.model, id="hangs")
    body = {"messages": ASK, "max_tokens": 400, "logit_bias": {"2": -100}}
    provider = Transformers("hangs", options)
    try:
        child = psutil.Process((await provider.load(model)).pid)
        with pytest.raises(ProviderError, match="no byte came for 2 s"):
            async for _ in provider.generate(model, body):
                child.suspend()
        assert await provider.on_dead(model) and not child.is_running()
        assert (await provider.load(model)).pid != child.pid
        assert text_of([piece async for batch in provider.generate(model, {"messages": ASK}) for piece in batch])
    finally:
        await provider.close()


async def test_an_engine_that_does_not_come_back_from_a_step_is_not_vouched_for() -> None:
    """As an accelerator may: its thread stands, and the one that answers the worker does not."""
    from processors.generation.providers.hf import loading
    from processors.generation.providers.hf.app import App

    folder = await asyncio.to_thread(smollm2)
    loaded = await asyncio.to_thread(
        loading.load, str(folder), context=256, slots=1, device="cpu", dtype="float32", chat_template=""
    )
    app = App(loaded, alias="m", api_key="k", context=256, slots=1, budget=64, step_s=1.0)
    app.engine.start()
    scores, gone = loaded.scores, threading.Event()

    def stand(*args: Any) -> Any:
        gone.wait(20)
        return scores(*args)

    loaded.scores = stand  # type: ignore[method-assign]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://m", headers={"authorization": "Bearer k"}
    ) as http:
        chat = {"model": "m", "messages": ASK, "max_tokens": 2, "stream": True}
        answer = asyncio.create_task(http.post("/v1/chat/completions", json=chat))
        await asyncio.sleep(0.6)
        assert (await http.get("/health")).status_code == 200, "a long step is no hang"
        await asyncio.sleep(1.0)
        health = await http.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_hangs")
        await asyncio.sleep(0.6)
        gone.set()
        text = (await answer).text
        assert (await http.get("/health")).status_code == 200
    lines = [line for line in text.split("\n\n") if line]
    assert 1 <= lines.count(": alive") <= 4 and lines[-1] == "data: [DONE]", "nothing is vouched for after a second"


async def test_what_is_no_model_says_why(backend: Backend, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("empty")
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    model = msgspec.structs.replace(backend.model, id="none", backend_tag=str(folder))
    with pytest.raises(ProviderError, match="nonesuch"):
        await backend.provider.load(model)
    longer = msgspec.structs.replace(backend.model, id="long", context_length=1_000_000)
    with pytest.raises(ProviderError, match="lower context_length"):
        await backend.provider.load(longer)


async def test_inspecting_says_what_the_folder_holds_and_the_memory_that_it_takes(backend: Backend) -> None:
    """The estimate, against the most that the engine took with every slot full to its last token."""
    model = msgspec.structs.replace(backend.model, id="full", context_length=512, max_concurrency=3)
    facts = await backend.provider.inspect(model)
    assert (facts.architecture, facts.layers, facts.quantisation) == ("llama", 30, "float32")
    assert facts.parameters == 134_515_008
    assert facts.weight_bytes == 2 * facts.parameters
    assert (facts.chat_template, facts.capabilities) == (True, ("chat",))
    loaded = await backend.provider.load(model, RAM)
    assert loaded.pid is not None
    body = {"messages": [{"role": "user", "content": " sea" * 440}], "logit_bias": {"2": -100}}

    async def fill() -> None:
        pieces = [piece async for batch in backend.provider.generate(model, body) for piece in batch]
        assert reasons(pieces) == {0: "length"}

    await asyncio.gather(*(fill() for _ in range(3)))
    status = Path(f"/proc/{loaded.pid}/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    await backend.provider.unload(model)
    print(f"expected {facts.bytes:,}, peak {peak:,}")
    assert peak <= facts.bytes <= 1.5 * peak
    with pytest.raises(ProviderError, match="is no model"):
        await backend.provider.inspect(msgspec.structs.replace(model, backend_tag=str(Path(__file__).parent)))
