"""What providers know of models and their memory, against real engines; the same suite for every provider.

The expected memory is compared with the highest that the engine took: with every slot full to its last token.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest

from headrace.errors import ProviderError
from processors.generation.providers import ollama, ollama_facts
from processors.generation.providers.base import RAM, ModelFacts
from processors.generation.providers.factory import make_provider
from processors.generation.providers.llama_cpp import LlamaCpp, Options
from processors.generation.providers.llama_models import resolve
from schemas import control
from schemas.control import Model
from tests.support.backends import CONTEXT, WEIGHTS, Backend, ollama_server
from tests.support.tiny_models import MODELS

PARAMETERS = 134_515_008
GPU = "GPU-9f3c0e52-0f1b-4c60-a2a4-5cf2b6b4a1d7"


async def test_inspecting_says_what_the_model_is(backend: Backend) -> None:
    facts = await backend.provider.inspect(backend.model)
    assert facts.parameters == PARAMETERS
    assert 90_000_000 < facts.weight_bytes < 100_000_000
    assert facts.context_length == 8192
    if backend.kind == "openai":
        assert facts.bytes == facts.load_ms == 0, "it takes none of our memory, and is loaded already"
        return
    assert (facts.architecture, facts.layers) == ("llama", 30)
    assert facts.quantisation == "Q4_1"
    assert facts.chat_template
    assert facts.capabilities == ("chat",)
    assert 500 < facts.load_ms < 1000
    assert (facts.bytes > facts.weight_bytes) == (backend.kind == "llama_cpp")


async def test_inspecting_what_is_not_there_says_so(backend: Backend) -> None:
    other = msgspec.structs.replace(backend.model, id="other", backend_tag="no-such-model")
    with pytest.raises(ProviderError, match="no-such-model"):
        await backend.provider.inspect(other)


async def test_the_version_is_the_same_until_the_weights_are_others(backend: Backend, tmp_path: Path) -> None:
    first = await backend.provider.version(backend.model)
    assert await backend.provider.version(backend.model) == first
    assert (first == "") == (backend.kind == "openai"), "a server that others run tells of none"
    other = msgspec.structs.replace(backend.model, id="other", backend_tag="no-such-model")
    if backend.kind != "openai":
        with pytest.raises(ProviderError, match="no-such-model"):
            await backend.provider.version(other)
    if backend.kind == "llama_cpp":
        copy = tmp_path / "copy.gguf"
        copy.write_bytes(resolve(WEIGHTS, None).read_bytes())
        copied = msgspec.structs.replace(backend.model, id="copied", backend_tag=str(copy))
        before = await backend.provider.version(copied)
        os.utime(copy, ns=(1, 1))
        assert await backend.provider.version(copied) != before


async def test_ollama_downloads_what_it_does_not_have_and_tells_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    with ollama_server() as (url, genuine, _):
        if genuine:
            pytest.skip("the genuine server would download from the internet")
        said: list[str] = []
        model = Model(id="pulled", provider="box", backend_tag="smollm2:135m", context_length=256)
        options: dict[str, str | int | float | bool] = {"memory_bytes": 1 << 40, "pull": True}
        provider = make_provider(control.Provider(name="box", kind="ollama", base_url=url, options=options))

        def noted(*told: object) -> str:
            said.append(ollama_facts.download(*told))  # type: ignore[arg-type]
            return said[-1]

        monkeypatch.setattr(ollama, "ollama_facts", SimpleNamespace(download=noted, facts=ollama_facts.facts))
        try:
            with pytest.raises(ProviderError, match=r"was downloaded; it takes .* were granted"):
                await provider.load(msgspec.structs.replace(model, bytes=1))
            assert "downloading: 50 % of 93.8 MiB" in said
            assert provider.progress(model) == "", "it is over"
            loaded = await provider.load(msgspec.structs.replace(model, bytes=(await provider.inspect(model)).bytes))
            assert loaded.bytes > 0
            await provider.unload(model)
        finally:
            await provider.close()


async def test_a_server_that_tells_its_context_alone_is_believed() -> None:
    """As vLLM answers `GET /v1/models`."""
    listed = b'{"object":"list","data":[{"id":"big","object":"model","owned_by":"vllm","max_model_len":32768}]}'

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(listed), listed))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        record = control.Provider(name="vllm", kind="openai", base_url=f"http://127.0.0.1:{port}/v1")
        provider = make_provider(record)
        facts = await provider.inspect(Model(id="m", provider="vllm", backend_tag="big"))
        await provider.close()
    assert facts == ModelFacts(context_length=32768)


async def test_models_that_share_a_tag_are_told_apart(backend: Backend) -> None:
    twin = msgspec.structs.replace(backend.model, id="twin")
    await backend.provider.load(backend.model)
    loaded = await backend.provider.load(twin)
    held = {one.model: one for one in await backend.provider.resident()}
    assert held.keys() >= {"contract", "twin"}
    assert held["contract"].tag == held["twin"].tag == backend.model.backend_tag
    assert loaded.model == "twin"
    pids = {held[name].pid for name in ("contract", "twin")}
    if backend.kind == "llama_cpp":
        assert None not in pids
        assert len(pids) == 2, "each has an engine of its own"
    else:
        assert pids == {None}
    if backend.kind != "openai":
        assert min(held["contract"].bytes, held["twin"].bytes) > 90_000_000
    await backend.provider.unload(twin)
    assert "twin" not in {one.model for one in await backend.provider.resident()}
    assert await backend.pieces(), "the other one still answers"
    assert not await backend.provider.on_dead(backend.model)


async def test_where_models_lie(backend: Backend) -> None:
    kinds = {await backend.provider.device_kind(gpus) for gpus in ([], [GPU])}
    assert kinds == ({"ram"} if backend.kind == "llama_cpp" else {"none"}), "this engine is built for the CPU"


@pytest.fixture(scope="module")
async def provider(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LlamaCpp]:
    directory: Path = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make(directory / f"{name}.gguf")
    made = LlamaCpp("local", Options(model_dir=str(directory)))
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("device", "seen", "layers"),
    [("", None, 5), (RAM, "-1", 0), (GPU, GPU, 5)],
)
async def test_the_engine_sees_the_device_that_was_granted_alone(device: str, seen: str | None, layers: int) -> None:
    provider = LlamaCpp("local", Options(gpu_layers=5))
    model = Model(id="m", provider="local", backend_tag=WEIGHTS, context_length=256, max_concurrency=1)
    try:
        loaded = await provider.load(model, device)
        assert loaded.pid is not None
        child = psutil.Process(loaded.pid)
        assert child.environ().get("CUDA_VISIBLE_DEVICES") == seen
        assert provider.server(model).launch.gpu_layers == layers
        assert (loaded.bytes > 0) == (device != GPU), "resident memory says nothing of what is on a GPU"
        assert (await provider.load(model, device)).pid == loaded.pid
        assert (await provider.load(model, RAM if device != RAM else "")).pid != loaded.pid, "moved to another device"
        assert not child.is_running()
    finally:
        await provider.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the most that a process had")
@pytest.mark.parametrize(
    ("tag", "context", "slots"),
    [
        (WEIGHTS, CONTEXT, 2),
        (WEIGHTS, 300, 3),
        *((name, 1024, 2) for name in MODELS),
    ],
)
async def test_the_expected_memory_is_what_the_engine_takes_at_most(
    provider: LlamaCpp, tag: str, context: int, slots: int, record_property: pytest.RecordProperty
) -> None:
    model = Model(id="m", provider="local", backend_tag=tag, context_length=context, max_concurrency=slots)
    facts = await provider.inspect(model)
    loaded = await provider.load(model, RAM)
    assert loaded.pid is not None
    after_load = high_water(loaded.pid)
    await asyncio.gather(*(fill(provider, model, slot) for slot in range(slots)))
    peak = high_water(loaded.pid)
    measured = (await provider.resident())[0].bytes
    await provider.unload(model)
    record_property("expected_over_peak", facts.bytes / peak)
    print(f"{tag} {context}x{slots}: expected {facts.bytes:,}, loaded {after_load:,}, peak {peak:,}, now {measured:,}")
    assert measured <= peak <= facts.bytes <= 1.3 * peak


async def fill(provider: LlamaCpp, model: Model, slot: int) -> None:
    """Have one slot compute a prompt that leaves a few tokens of its context."""
    words = model.context_length
    while True:
        text = f"{slot}" + " sea" * words if model.backend_tag == WEIGHTS else f"{slot}" * words
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
        count = await provider.count_prompt(model, body)
        assert count is not None
        if count <= model.context_length - 8:
            break
        words -= count - (model.context_length - 8)
    pieces = [piece async for batch in provider.generate(model, body) for piece in batch]
    assert pieces


def high_water(pid: int) -> int:
    """The most resident bytes that a process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
