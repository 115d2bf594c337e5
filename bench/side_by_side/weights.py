"""Three models out of one: copies of a GGUF file that differ in their name alone; and how many tokens prompts have.

Copies, since Ollama takes models of the same file for one and the same, which then need no memory of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from bench.side_by_side.workload import MODELS, Ask, body_of
from processors.generation.providers.llama_cpp import LlamaCpp
from processors.generation.providers.llama_models import resolve
from schemas.control import Model

TAG = "SmolLM2-135M-Instruct"
HEAD = 64 * 1024
"""Bytes in which the file's own name stands."""
NAME = b"general.name"
COUNTING = Model("count", "count", TAG, context_length=8192, max_concurrency=1)
"""Longer than any prompt of the workload."""


def copies(directory: Path) -> dict[str, Path]:
    """A file of each model, by the model's name."""
    data = resolve(TAG, None).read_bytes()
    made = {}
    for name in MODELS:
        made[name] = directory / f"{name}.gguf"
        made[name].write_bytes(renamed(data, name))
    return made


def renamed(data: bytes, name: str) -> bytes:
    """The file with another `general.name` of the same length: a text of 8 bytes of length, behind its type."""
    key = data.index(NAME, 0, HEAD)
    begin = key + len(NAME) + 4 + 8
    length = int.from_bytes(data[begin - 8 : begin], "little")
    return data[:begin] + name.encode()[:length].ljust(length) + data[begin + length :]


def prompt_tokens(asks: Sequence[Ask]) -> list[int]:
    """The true prompt tokens of each request, counted by an engine with room for all of them."""

    async def count() -> list[int]:
        provider = LlamaCpp("count")
        try:
            await provider.load(COUNTING)
            return [await provider.count_prompt(COUNTING, body_of(ask)) or 0 for ask in asks]
        finally:
            await provider.close()

    return asyncio.run(count())
