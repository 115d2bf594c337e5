"""Three models of llama.cpp on memory that holds two, and a look at what their engines really hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

from processors.generation.providers.llama_cpp import LlamaCpp
from schemas.control import Model
from tests.support.engines import engines
from tests.support.stacks import Stack

MODELS = ("ash", "birch", "cedar")
TAG, CONTEXT, SLOTS = "SmolLM2-135M-Instruct", 512, 2
FIT = 2.5
"""How many of the models the memory holds."""
LOOK_S = 0.05
CONFIG = "".join(
    f"""
[[models]]
id = "{name}"
provider = "local"
backend_tag = "{TAG}"
context_length = {CONTEXT}
max_concurrency = {SLOTS}
preload = false
"""
    for name in MODELS
)


def expected() -> int:
    """Bytes that one of the models is expected to take."""
    model = Model("one", "local", TAG, context_length=CONTEXT, max_concurrency=SLOTS)
    return asyncio.run(LlamaCpp("local").inspect(model)).bytes


class Watch:
    """Resident bytes of a stack's engines together, also of those whose worker is gone."""

    def __init__(self, stack: Stack) -> None:
        self.most = 0
        """The most that was seen."""
        self._stack = stack
        self._engines: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """See what they hold now."""
        self._engines |= {one.pid: one for one in engines(self._stack.process.tree())}
        total = 0
        for process in self._engines.values():
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        self.most = max(self.most, total)


@asynccontextmanager
async def watched(stack: Stack) -> AsyncIterator[Watch]:
    """Looks again and again while the block runs."""
    watch, done = Watch(stack), asyncio.Event()

    async def look() -> None:
        while not done.is_set():
            await asyncio.to_thread(watch.look)
            await asyncio.sleep(LOOK_S)

    looking = asyncio.create_task(look())
    try:
        yield watch
    finally:
        done.set()
        await looking
