"""Providers whose models run in child processes of the worker, one a model: what they share."""

from __future__ import annotations

import abc
import asyncio
import builtins
import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from typing import ClassVar

import structlog

from headrace.errors import ContextLengthExceeded, ProviderDeclined, ProviderError, UnsupportedParameter
from processors.generation.providers import chat, parameters
from processors.generation.providers.base import RAM, LoadedModel, Piece, Provider
from processors.generation.providers.child import ChildLaunch
from processors.generation.providers.child_server import ChildServer
from processors.generation.providers.fanout import fan_out
from processors.generation.providers.pool import IDLE_TIMEOUT_S
from schemas.control import Model

log = structlog.get_logger(__name__)


class ChildProvider(Provider):
    """Children of this process, asked over their OpenAI endpoints; they die with it."""

    program: ClassVar[str]
    """Module that a child runs."""

    def __init__(self, name: str, idle_timeout_s: float = IDLE_TIMEOUT_S) -> None:
        """An answer without a byte for `idle_timeout_s` seconds has failed."""
        self.name = name
        self._idle_timeout_s = idle_timeout_s
        self._servers: dict[str, tuple[ChildLaunch, ChildServer]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @abc.abstractmethod
    def launch(self, model: Model, device: str = "") -> ChildLaunch:
        """How a model's child is to run, on a device as in `load`. Raises `ProviderError` without such a model."""

    @abc.abstractmethod
    def prepare(self, model: Model, body: Mapping[str, object], server: ChildServer) -> dict[str, object]:
        """The body for the engine. Raises `UnsupportedParameter` for what it would ignore."""

    @abc.abstractmethod
    def adapted(self, prepared: Mapping[str, object], server: ChildServer, adapter: str) -> dict[str, object]:
        """The prepared body with an adapter that the child has loaded."""

    async def start(self, launch: ChildLaunch) -> ChildServer:
        """Start a child. Raises `ProviderError`; an adapter that cannot be loaded is only noted in the server."""
        return await ChildServer.start(self.name, self.program, launch, self._idle_timeout_s)

    async def health(self) -> None:
        """Return when every running child answers. Raises `ProviderError`."""
        for _, server in list(self._servers.values()):
            if not server.exited and not await server.answers():
                raise ProviderError(f"the engine of model {server.launch.alias!r} does not answer")

    async def load(self, model: Model, device: str = "") -> LoadedModel:
        """Start the model's child, or see that it runs with these parameters. Raises `ProviderError`."""
        async with self._locks[model.id]:
            launch = self.launch(model, device)
            known = self._servers.get(model.id)
            if known is not None and (known[0] != launch or not await known[1].answers()):
                await self._stop(model.id)
                known = None
            if known is None:
                known = launch, await self.start(launch)
                self._servers[model.id] = known
                for adapter, reason in known[1].adapters.items():
                    if reason is not None:
                        log.error("adapter_unusable", model=model.id, adapter=adapter, error=reason)
            return _loaded(model.id, known[1])

    async def unload(self, model: Model) -> None:
        """End the model's child; its memory is free when this returns."""
        async with self._locks[model.id]:
            await self._stop(model.id)

    async def resident(self) -> builtins.list[LoadedModel]:
        """Running children with their measured memory."""
        return [_loaded(model_id, server) for model_id, (_, server) in self._servers.items() if not server.exited]

    async def count_prompt(self, model: Model, body: Mapping[str, object], *, emitted: str = "") -> int | None:
        """Exact tokens of the prompt, by the engine's own template and tokenizer."""
        server = self.server(model)
        return await chat.count_tokens(server.pool, self.prepare(model, chat.continued(body, emitted), server))

    async def generate(
        self, model: Model, body: Mapping[str, object], *, emitted: str = "", adapter: str = ""
    ) -> AsyncGenerator[builtins.list[Piece], None]:
        """See `Provider.generate`; `prepare` says which parameters are honoured."""
        server = self.server(model)
        prepared = self.prepare(model, chat.continued(body, emitted), server)
        if adapter:
            if (reason := self.adapter_fault(server, adapter)) is not None:
                raise ProviderDeclined(f"adapter {adapter!r} of model {model.id!r} cannot be used: {reason}")
            prepared = self.adapted(prepared, server, adapter)
        choices = chat.choices_of(body)
        if choices > model.max_concurrency:
            raise UnsupportedParameter(f"n can be at most {model.max_concurrency} for model {model.id!r}", param="n")
        if server.slot_context > model.context_length:
            prepared["max_tokens"] = _room(model, prepared, await chat.count_tokens(server.pool, prepared))
        where = f"model {model.id!r} of provider {self.name!r}"
        bodies = [parameters.for_choice(prepared, index) for index in range(choices)]
        streams = [chat.stream_chat(server.pool, where, chat.streamed(body, model.backend_tag)) for body in bodies]
        whole = False
        try:
            async with contextlib.aclosing(streams[0] if choices == 1 else fan_out(streams)) as stream:
                async for batch in stream:
                    yield batch
            whole = True
        except ProviderError as problem:
            # Each model has an engine of its own: how one does says nothing of the others.
            if await server.wait_exited(0.5):
                raise ProviderDeclined(f"the engine of model {model.id!r} died: {server.how_it_ended()}") from problem
            raise ProviderDeclined(problem.message, retry_after_s=problem.retry_after_s) from problem
        finally:
            # An answer that its caller left may have been left because nothing came.
            server.doubted = server.doubted or not whole

    async def on_dead(self, model: Model) -> bool:
        """Whether the model's child has ended by itself, or hangs; one that hangs is killed.

        It hangs when an answer of it did not come to its end, and its health got no answer either.
        """
        known = self._servers.get(model.id)
        if known is None:
            return False
        server = known[1]
        if not server.exited and server.doubted and not await server.answers():
            await server.kill()
        # Meanwhile another may have found the same, and have put a new child in its place.
        return server.exited and self._servers.get(model.id) is known

    async def close(self) -> None:
        """End every child."""
        for model_id in list(self._servers):
            await self._stop(model_id)

    def server(self, model: Model) -> ChildServer:
        """The running child of a model. Raises `ProviderError` when it is not loaded, or has died."""
        known = self._servers.get(model.id)
        if known is None:
            raise ProviderDeclined(f"model {model.id!r} is not loaded on provider {self.name!r}")
        if known[1].exited:
            raise ProviderDeclined(f"the engine of model {model.id!r} died: {known[1].how_it_ended()}")
        return known[1]

    def adapter_fault(self, server: ChildServer, adapter: str) -> str | None:
        """Why a child does not serve an adapter; None when it does."""
        if adapter in server.adapters:
            return server.adapters[adapter]
        return "it was named after the model was loaded, and is served from the model's next load on"

    async def _stop(self, model_id: str) -> None:
        known = self._servers.get(model_id)
        if known is not None:
            await known[1].stop()
            self._servers.pop(model_id, None)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


async def says_true(script: str) -> bool:
    """Whether a Python script prints True, in a process of its own: looking for a GPU takes some of its memory."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    return out.strip() == b"True"


def _loaded(model_id: str, server: ChildServer) -> LoadedModel:
    """A running child. Its resident memory says nothing of a GPU's: there, the GPU is asked about the process."""
    launch = server.launch
    size = server.resident_bytes() if launch.device in ("", RAM) else 0
    return LoadedModel(model=model_id, tag=launch.alias, bytes=size, pid=server.pid)


def _room(model: Model, prepared: Mapping[str, object], count: int) -> int:
    """Tokens that the answer may have in a slot that is larger than the model's context."""
    room = model.context_length - count
    if room <= 0:
        raise ContextLengthExceeded(
            f"the prompt has {count} tokens, the context of model {model.id!r} {model.context_length}: shorten it",
            param="messages",
        )
    wanted = prepared.get("max_tokens")
    return min(room, wanted) if isinstance(wanted, int) else room
