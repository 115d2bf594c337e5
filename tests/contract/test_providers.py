"""One suite for every provider, on the real llama.cpp engine and SmolLM2.

`llama_cpp` runs its own child; `openai` talks to such a child as to any server; `ollama` talks to the genuine server
where one answers at OLLAMA_HOST, else to `tests/support/ollama_server.py`. The summary says which one it was.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator

import msgspec
import psutil
import pytest

from headrace.errors import ContextLengthExceeded, ProviderError, ProviderRefused, UnsupportedParameter
from processors.generation.providers.base import Choices, Done, Finish, Piece, Text
from schemas import control
from schemas.events import Usage
from tests.support.backends import ASK, Backend
from tests.support.engines import freeze


def text_of(pieces: list[Piece], index: int = 0) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Text) and piece.index == index)


def usage_of(pieces: list[Piece]) -> Usage:
    assert isinstance(pieces[-1], Done)
    assert pieces[-1].usage is not None
    return pieces[-1].usage


def reasons(pieces: list[Piece]) -> dict[int, str]:
    return {piece.index: piece.reason for piece in pieces if isinstance(piece, Finish)}


async def test_it_is_healthy_and_lists_its_models(backend: Backend) -> None:
    await backend.provider.health()
    tags = [one.tag for one in await backend.provider.list()]
    assert any(tag.startswith(backend.model.backend_tag) for tag in tags), tags


async def test_loading_twice_is_one_resident_model(backend: Backend) -> None:
    before = backend.engine()
    loaded = await backend.provider.load(backend.model)
    held = [one for one in await backend.provider.resident() if one.model == backend.model.id]
    assert len(held) == 1
    assert backend.engine() == before, "the model was loaded again"
    if backend.kind != "openai":
        assert held[0].bytes > 90_000_000, "less than its weights"
        assert abs(held[0].bytes - loaded.bytes) < 100_000_000


async def test_loading_what_is_not_there_says_what_there_is(backend: Backend) -> None:
    other = msgspec.structs.replace(backend.model, id="other", backend_tag="no-such-model")
    with pytest.raises(ProviderError, match="no-such-model"):
        await backend.provider.load(other)


async def test_an_answer_is_text_one_finish_and_usage(backend: Backend) -> None:
    pieces = await backend.pieces()
    assert text_of(pieces)
    assert all(isinstance(piece, Text) for piece in pieces[:-2])
    assert reasons(pieces) == {0: "length"}
    usage = usage_of(pieces)
    assert usage.completion_tokens == 8
    assert 8 < usage.prompt_tokens < 100
    counted = await backend.provider.count_prompt(backend.model, {"messages": ASK})
    assert counted == usage.prompt_tokens


async def test_max_completion_tokens_is_the_same_cap(backend: Backend) -> None:
    pieces = await backend.pieces(max_tokens=None, max_completion_tokens=3)
    assert usage_of(pieces).completion_tokens == 3


async def test_the_same_seed_gives_the_same_answer(backend: Backend) -> None:
    first = text_of(await backend.pieces(seed=11, temperature=1.0, max_tokens=16))
    others = {text_of(await backend.pieces(seed=seed, temperature=1.0, max_tokens=16)) for seed in (12, 13, 14)}
    assert text_of(await backend.pieces(seed=11, temperature=1.0, max_tokens=16)) == first
    assert others != {first}, "the seed changes nothing"


async def test_temperature_and_top_p_change_the_answer(backend: Backend) -> None:
    for still in ({"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.001}):
        assert len({text_of(await backend.pieces(seed=seed, **still)) for seed in (1, 2)}) == 1


async def test_a_stop_text_ends_the_answer_before_it(backend: Backend) -> None:
    plain = text_of(await backend.pieces(temperature=0.0, max_tokens=12))
    stop = plain[len(plain) // 2 :][:3]
    pieces = await backend.pieces(temperature=0.0, max_tokens=12, stop=stop)
    assert reasons(pieces) == {0: "stop"}
    assert stop not in text_of(pieces)
    assert plain.startswith(text_of(pieces))


async def test_a_json_schema_is_honoured(backend: Backend) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "boolean"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    pieces = await backend.pieces(response_format=form, max_tokens=60, temperature=0.0)
    assert isinstance(json.loads(text_of(pieces))["answer"], bool)


async def test_two_choices_are_two_answers_and_one_prompt(backend: Backend) -> None:
    if backend.kind == "openai":
        pytest.skip("the count of this server's native n is its own")
    pieces = await backend.pieces(n=2, seed=5, temperature=1.0)
    assert reasons(pieces) == {0: "length", 1: "length"}
    assert text_of(pieces, 0) != text_of(pieces, 1)
    usage = usage_of(pieces)
    assert usage.completion_tokens == 16
    assert usage.prompt_tokens == usage_of(await backend.pieces()).prompt_tokens


async def test_logprobs_are_passed_on_or_refused_by_name(backend: Backend) -> None:
    if backend.kind == "ollama":
        with pytest.raises(UnsupportedParameter, match="logprobs"):
            await backend.pieces(logprobs=True)
        return
    pieces = await backend.pieces(logprobs=True, top_logprobs=2, max_tokens=3)
    choices = [json.loads(piece.json)[0] for piece in pieces if isinstance(piece, Choices)]
    assert len(choices) == 3
    assert all(len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2 for choice in choices)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
        {"reasoning_effort": "high"},
        {"no_such_field": 1},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    ],
)
async def test_what_the_engine_would_ignore_is_refused_by_name(backend: Backend, fields: dict[str, object]) -> None:
    if backend.kind == "openai":
        pytest.skip("a foreign server decides itself")
    with pytest.raises(UnsupportedParameter) as caught:
        await backend.pieces(**fields)
    assert caught.value.param == next(iter(fields))


async def test_a_refusal_of_the_engine_carries_its_words(backend: Backend) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises((ProviderRefused, ProviderError)) as caught:
        await backend.pieces(response_format=form)
    assert len(caught.value.message) > 20


@pytest.mark.parametrize("turns", [1, 3])
async def test_a_prompt_over_the_context_is_refused_and_never_cut(backend: Backend, turns: int) -> None:
    provider, model = backend.small
    await provider.load(model)
    words = "sea " * (2 * model.context_length // turns)
    messages = [{"role": ("user", "assistant")[turn % 2], "content": words} for turn in range(turns)]
    with pytest.raises(ContextLengthExceeded):
        async for batch in provider.generate(model, {"messages": messages, "max_tokens": 4}):
            raise AssertionError(f"an answer to a prompt that does not fit: {batch}")
    await provider.load(backend.model) if provider is backend.provider else None


async def test_an_answer_ends_where_the_context_ends(backend: Backend) -> None:
    provider, model = backend.small
    await provider.load(model)
    body = {"messages": ASK, "logit_bias": {"2": -100}} if backend.kind != "ollama" else {"messages": ASK}
    pieces = [piece async for batch in provider.generate(model, body) for piece in batch]
    usage = usage_of(pieces)
    assert usage.prompt_tokens + usage.completion_tokens <= model.context_length + 1
    if backend.kind != "ollama":
        assert reasons(pieces) == {0: "length"}


@pytest.mark.parametrize("moment", ["prefill", "decode"])
async def test_closing_a_stream_frees_the_engine_within_a_second(backend: Backend, moment: str) -> None:
    await backend.provider.load(backend.model)
    words = "sea wave sand wind " * (2 if moment == "decode" else 150 if backend.ours else 30)
    body = {"messages": [{"role": "user", "content": f"{time.monotonic()} {words}"}], "max_tokens": 400}
    stream = backend.provider.generate(backend.model, body)
    reading = asyncio.ensure_future(anext(stream))
    if moment == "decode":
        await reading
    while not await backend.busy():
        assert moment == "decode" or not reading.done()
    began = time.monotonic()
    reading.cancel()
    await asyncio.wait([reading])
    await stream.aclose()
    while await backend.busy():
        assert time.monotonic() - began < 30
    if backend.ours or (backend.kind == "openai" and moment == "decode"):
        # Other servers finish the batch, or even the whole prompt, that they compute.
        assert time.monotonic() - began < 1.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


async def test_embeddings_have_one_vector_a_text_or_are_refused(backend: Backend) -> None:
    if backend.kind != "ollama":
        with pytest.raises((UnsupportedParameter, ProviderError)):
            await backend.provider.embed(backend.model, ["sea"])
        return
    vectors = await backend.provider.embed(backend.model, ["sea", "mountain"])
    assert len(vectors) == 2
    assert len(vectors[0]) == len(vectors[1]) > 100


async def test_a_killed_engine_is_an_error_and_the_next_load_works(backend: Backend) -> None:
    await backend.provider.load(backend.model)
    stream = backend.provider.generate(backend.model, {"messages": ASK, "max_tokens": 400, "seed": 1})
    await anext(stream)
    engine = backend.engine()
    if engine is None:
        pytest.skip("the server is not on this machine")
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(ProviderError):
        async with asyncio.timeout(10):
            async for _ in stream:
                pass
    if backend.ours:
        assert await backend.provider.on_dead(backend.model)
    await backend.restart()
    await backend.provider.load(backend.model)
    assert not await backend.provider.on_dead(backend.model)
    assert text_of(await backend.pieces())


async def test_an_engine_that_hangs_is_killed_and_one_that_lives_is_not(backend: Backend) -> None:
    if backend.kind != "llama_cpp":
        pytest.skip("the engine is not ours")
    await backend.provider.load(backend.model)
    for hangs in (False, True):
        stream = backend.provider.generate(backend.model, {"messages": ASK, "max_tokens": 400, "seed": 1})
        await anext(stream)
        engine = backend.engine()
        assert engine is not None
        if hangs:
            assert not await backend.provider.on_dead(backend.model), "it may be slow, and nobody gave it up"
            await freeze(engine)
        await stream.aclose()
        assert await backend.provider.on_dead(backend.model) is hangs
        assert engine.is_running() is not hangs
    await backend.provider.load(backend.model)
    assert not await backend.provider.on_dead(backend.model)
    assert text_of(await backend.pieces())


async def test_unloading_gives_the_memory_back(backend: Backend) -> None:
    engine = backend.engine()
    await backend.small[0].unload(backend.small[1])
    await backend.provider.unload(backend.model)
    await backend.provider.unload(backend.model)
    assert not [one for one in await backend.provider.resident() if one.tag.startswith(backend.model.backend_tag)]
    if backend.ours:
        assert engine is not None
        assert not engine.is_running()
        with pytest.raises(ProviderError, match="not loaded"):
            await backend.pieces()
    await backend.provider.load(backend.model)
    assert text_of(await backend.pieces())


async def test_an_engine_dies_with_its_worker(backend: Backend) -> None:
    if not backend.ours:
        pytest.skip("its server is not a child of the worker")
    record = control.Provider(name="p", kind=backend.kind, options=backend.options)
    script = WORKER.format(record=msgspec.json.encode(record), tag=backend.model.backend_tag)
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert worker.stdout is not None
    lines = [line async for line in _until_pid(worker.stdout)]
    engine = psutil.Process(int(lines[-1]))
    worker.kill()
    await worker.wait()
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [engine], 5)
    assert gone == [engine]


async def _until_pid(stdout: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines up to the one that is a process id; logs come before it."""
    while line := (await stdout.readline()).decode():
        yield line
        if line.strip().isdecimal():
            return


WORKER = """
import asyncio, msgspec
from processors.generation.providers.factory import make_provider
from schemas.control import Model, Provider

async def main():
    provider = make_provider(msgspec.json.decode({record!r}, type=Provider))
    model = Model(id="m", provider="p", backend_tag={tag!r}, context_length=256)
    await provider.load(model)
    print(provider.server(model).pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
