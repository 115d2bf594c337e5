"""Which LoRA adapters a llama.cpp child can be started with: one that cannot be read costs itself, not the model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from headrace.errors import ProviderError
from processors.generation.providers.child import ChildLaunch
from processors.generation.providers.child_server import ChildServer

log = structlog.get_logger(__name__)

MAGIC = b"GGUF"

Start = Callable[[ChildLaunch], Awaitable[ChildServer]]


def fault(path: str) -> str | None:
    """Why a file cannot be an adapter, as far as can be told without the engine; None when it may be one."""
    try:
        with Path(path).expanduser().open("rb") as file:
            head = file.read(len(MAGIC))
    except OSError as problem:
        return f"{path}: {problem.strerror or problem}"
    return None if head == MAGIC else f"{path} is no GGUF file: convert the adapter with convert_lora_to_gguf.py"


async def start(launch: ChildLaunch, begin: Start) -> ChildServer:
    """Start a child with as many of its adapters as can be loaded. Raises `ProviderError` when it starts with none.

    Those that the engine refuses are found by starting it with one after the other.
    """
    faults = await asyncio.to_thread(lambda: {name: fault(path) for name, path in launch.adapters.items()})
    good = {name: str(Path(path).expanduser()) for name, path in launch.adapters.items() if faults[name] is None}
    try:
        server = await begin(msgspec.structs.replace(launch, adapters=good))
    except ProviderError as problem:
        refused = {name: await _alone(launch, name, path, begin) for name, path in good.items()}
        good = {name: path for name, path in good.items() if refused[name] is None}
        if len(good) == len(refused):  # It is not theirs: also when there are none.
            raise
        faults |= refused
        log.warning("adapters_refused", model=launch.alias, error=problem.message)
        server = await begin(msgspec.structs.replace(launch, adapters=good))
    server.adapters = faults
    return server


async def _alone(launch: ChildLaunch, name: str, path: str, begin: Start) -> str | None:
    """Why the model does not start with this adapter alone; None when it does."""
    try:
        server = await begin(msgspec.structs.replace(launch, adapters={name: path}))
    except ProviderError as problem:
        return problem.message
    await server.stop()
    return None
