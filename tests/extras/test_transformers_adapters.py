"""The suite of LoRA adapters, on the `transformers` provider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from processors.generation.providers.transformers import Options, Transformers
from schemas.control import Model
from tests.contract.test_adapters import *  # noqa: F403  (its tests run here with this module's model)
from tests.contract.test_adapters import Adapted
from tests.support.adapters import write_adapter
from tests.support.backends import CONTEXT
from tests.support.hf_model import smollm2


@pytest.fixture(scope="module")
async def adapted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Adapted]:
    directory = tmp_path_factory.mktemp("adapters")
    (one, _), (two, _), (cut, _) = (write_adapter(directory, seed) for seed in (1, 2, 3))
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000])
    adapters = {"one": str(one), "two": str(two), "cut": str(cut), "gone": "/no/such", "text": str(Path(__file__))}
    tag = str(await asyncio.to_thread(smollm2))
    model = Model("adapted", "transformers", tag, context_length=CONTEXT, max_concurrency=4, adapters=adapters)
    provider = Transformers("transformers", Options(dtype="float32"))
    try:
        await provider.load(model)
        yield Adapted(provider, model)
    finally:
        await provider.close()
