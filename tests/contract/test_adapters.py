"""LoRA adapters by name, on the real engines: each changes its own answers only, and a bad one costs only itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from headrace.errors import ProviderError
from processors.generation.providers.base import Text
from processors.generation.providers.children import ChildProvider
from processors.generation.providers.llama_cpp import LlamaCpp
from schemas.control import Model
from tests.support.adapters import write_adapter
from tests.support.backends import ASK, CONTEXT, WEIGHTS


class Adapted:
    """A loaded model with two good adapters and some that are not."""

    def __init__(self, provider: ChildProvider, model: Model) -> None:
        self.provider = provider
        self.model = model

    async def says(self, adapter: str = "", tokens: int = 16) -> str:
        body = {"messages": ASK, "max_tokens": tokens, "temperature": 0.0}
        batches = [batch async for batch in self.provider.generate(self.model, body, adapter=adapter)]
        return "".join(piece.text for batch in batches for piece in batch if isinstance(piece, Text))


@pytest.fixture(scope="module")
async def adapted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Adapted]:
    directory = tmp_path_factory.mktemp("adapters")
    (_, one), (_, two), (_, cut) = (write_adapter(directory, seed) for seed in (1, 2, 3))
    cut.write_bytes(cut.read_bytes()[:-100_000])
    adapters = {"one": str(one), "two": str(two), "cut": str(cut), "gone": "/no/such.gguf", "text": str(Path(__file__))}
    model = Model("adapted", "llama_cpp", WEIGHTS, context_length=CONTEXT, max_concurrency=4, adapters=adapters)
    provider = LlamaCpp("llama_cpp")
    try:
        await provider.load(model)
        yield Adapted(provider, model)
    finally:
        await provider.close()


async def test_each_adapter_answers_in_its_own_way_and_the_model_in_its(adapted: Adapted) -> None:
    before = await adapted.says()
    assert len({before, await adapted.says("one"), await adapted.says("two")}) == 3
    assert await adapted.says() == before, "an adapter stayed behind"


async def test_answers_at_the_same_time_keep_their_own_adapters(adapted: Adapted) -> None:
    names = ["", "one", "two", "one"]
    alone = [await adapted.says(name) for name in names]
    assert await asyncio.gather(*(adapted.says(name) for name in names)) == alone


@pytest.mark.parametrize("name", ["cut", "gone", "text"])
async def test_an_adapter_that_cannot_be_read_fails_alone_and_says_why(adapted: Adapted, name: str) -> None:
    with pytest.raises(ProviderError, match=f"adapter '{name}'") as caught:
        await adapted.says(name)
    assert len(caught.value.message) > 60
    assert await adapted.says()


async def test_an_adapter_that_came_after_the_load_is_not_silently_left_out(adapted: Adapted) -> None:
    with pytest.raises(ProviderError, match="next load"):
        await adapted.says("new")


async def test_loading_again_keeps_the_engine_and_another_adapter_makes_a_new_one(adapted: Adapted) -> None:
    engine = adapted.provider.server(adapted.model).pid
    await adapted.provider.load(adapted.model)
    assert adapted.provider.server(adapted.model).pid == engine
    fewer = {name: path for name, path in adapted.model.adapters.items() if name in ("one", "two")}
    adapted.model = msgspec.structs.replace(adapted.model, adapters=fewer)
    await adapted.provider.load(adapted.model)
    assert adapted.provider.server(adapted.model).pid != engine
    assert await adapted.says("two") != await adapted.says()
