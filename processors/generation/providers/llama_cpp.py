"""llama.cpp as a provider: one child process a model, asked over its OpenAI endpoints."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

import msgspec

from headrace.errors import ContextLengthExceeded, ProviderDeclined, ProviderError, UnsupportedParameter
from processors.generation.providers import chat, llama_body, llama_facts, llama_models
from processors.generation.providers.base import (
    RAM,
    BackendModel,
    DeviceKind,
    LoadedModel,
    ModelFacts,
    Piece,
    Provider,
)
from processors.generation.providers.fanout import fan_out
from processors.generation.providers.footprint import Engine
from processors.generation.providers.llama_child import Launch
from processors.generation.providers.llama_server import LlamaServer
from schemas.control import Model

BATCH_TOKENS = 32
"""Prompt tokens in one go. Small, for a CPU: a cancel, and every other stream, waits for at most one such batch, and
prefill is as fast as with 128. A GPU wants 512."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`options` of a llama_cpp provider record."""

    model_dir: str | None = None
    """Where `.gguf` files lie, besides installed model wheels."""
    threads: int | None = None
    """Threads that compute; by default the cores this process may use."""
    gpu_layers: int = -1
    """Layers on the GPU; -1 lets the engine decide."""
    batch_tokens: int = BATCH_TOKENS
    chat_template: str | None = None
    """File with a Jinja chat template in place of the models' own."""
    embeddings: str | None = None
    """Serve embeddings too, pooled as named: `model` (as the file says), `mean`, `cls` or `last`."""


class LlamaCpp(Provider):
    """Children of this process; they die with it."""

    can_continue = True

    def __init__(self, name: str, options: Options | None = None) -> None:
        self.name = name
        self._options = options or Options()
        self._servers: dict[str, tuple[Launch, LlamaServer]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._sees_gpu: asyncio.Task[bool] | None = None

    async def health(self) -> None:
        """Return when the engine is installed and every running child answers. Raises `ProviderError`."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise ProviderError(f"provider {self.name!r} needs the engine: pip install 'headrace[embedded]'")
        for _, server in list(self._servers.values()):
            if not server.exited and not await server.answers():
                raise ProviderError(f"the engine of model {server.launch.alias!r} does not answer")

    async def list(self) -> builtins.list[BackendModel]:
        """The GGUF files of the model directory and of installed model wheels."""
        models = await asyncio.to_thread(llama_models.available, self._model_dir)
        return [
            BackendModel(tag=tag, bytes=sum(one.stat().st_size for one in llama_models.shards(path) if one.is_file()))
            for tag, path in sorted(models.items())
        ]

    async def device_kind(self, gpus: Sequence[str]) -> DeviceKind:
        """`gpu` when there is one, the engine finds one, and layers may go there; else `ram`."""
        return "gpu" if gpus and self._options.gpu_layers and await self._engine_sees_gpu() else "ram"

    async def inspect(self, model: Model) -> ModelFacts:
        """What the model's file says, and the memory it will take. Raises `ProviderError`."""
        launch = self._launch(model)
        header = await asyncio.to_thread(llama_facts.read, Path(launch.model_path))
        return llama_facts.facts(
            header,
            Engine(launch.context_length, launch.slots, launch.batch_tokens, launch.threads + launch.http_threads),
            gpu_layers=launch.gpu_layers if launch.gpu_layers and await self._engine_sees_gpu() else 0,
            own_template=bool(launch.chat_template),
            embeddings=launch.pooling is not None,
        )

    async def load(self, model: Model, device: str = "") -> LoadedModel:
        """Start the model's child, or see that it runs with these parameters. Raises `ProviderError`."""
        async with self._locks[model.id]:
            launch = self._launch(model, device)
            known = self._servers.get(model.id)
            if known is not None and (known[0] != launch or not await known[1].answers()):
                await self._stop(model.id)
                known = None
            if known is None:
                known = launch, await LlamaServer.start(self.name, launch)
                self._servers[model.id] = known
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
        server = self._running(model)
        prepared = llama_body.prepare(model, chat.continued(body, emitted), takes_tools=server.takes_tools)
        return await _count(server, prepared)

    async def generate(
        self, model: Model, body: Mapping[str, object], *, emitted: str = ""
    ) -> AsyncGenerator[builtins.list[Piece], None]:
        """See `Provider.generate`; `llama_body` says which parameters are honoured."""
        server = self._running(model)
        # The engine leaves a last message of the assistant open, and gives only what follows it.
        prepared = llama_body.prepare(model, chat.continued(body, emitted), takes_tools=server.takes_tools)
        choices = chat.choices_of(body)
        if choices > model.max_concurrency:
            raise UnsupportedParameter(f"n can be at most {model.max_concurrency} for model {model.id!r}", param="n")
        if server.slot_context > model.context_length:
            prepared["max_tokens"] = _room(model, prepared, await _count(server, prepared))
        where = f"model {model.id!r} of provider {self.name!r}"
        streams = [
            chat.stream_chat(
                server.pool, where, chat.streamed(llama_body.for_choice(prepared, index), model.backend_tag)
            )
            for index in range(choices)
        ]
        try:
            async with contextlib.aclosing(streams[0] if choices == 1 else fan_out(streams)) as stream:
                async for batch in stream:
                    yield batch
        except ProviderError as problem:
            # Each model has an engine of its own: how one does says nothing of the others.
            if await server.wait_exited(0.5):
                raise ProviderDeclined(f"the engine of model {model.id!r} died: {server.how_it_ended()}") from problem
            raise ProviderDeclined(problem.message, retry_after_s=problem.retry_after_s) from problem

    async def embed(self, model: Model, texts: builtins.list[str]) -> builtins.list[builtins.list[float]]:
        """One vector a text, if the provider's option `embeddings` is on."""
        if self._options.embeddings is None:
            raise UnsupportedParameter(f"provider {self.name!r} serves no embeddings: set its option embeddings")
        body = msgspec.json.encode({"input": texts, "model": model.backend_tag})
        answer = await self._running(model).pool.call("POST", "/embeddings", body)
        vectors = msgspec.json.decode(answer, type=_Embeddings).data
        return [one.embedding for one in sorted(vectors, key=lambda one: one.index)]

    async def on_dead(self, model: Model) -> bool:
        """Whether the model's child has ended by itself."""
        known = self._servers.get(model.id)
        return known is not None and known[1].exited

    async def close(self) -> None:
        """End every child."""
        for model_id in list(self._servers):
            await self._stop(model_id)

    def server(self, model: Model) -> LlamaServer:
        """The running child of a model. Raises `ProviderError` when it is not loaded."""
        return self._running(model)

    @property
    def _model_dir(self) -> Path | None:
        return Path(self._options.model_dir).expanduser() if self._options.model_dir else None

    async def _engine_sees_gpu(self) -> bool:
        if self._sees_gpu is None:
            self._sees_gpu = asyncio.create_task(_engine_sees_gpu())
        return await asyncio.shield(self._sees_gpu)

    def _launch(self, model: Model, device: str = "") -> Launch:
        options = self._options
        template = Path(options.chat_template).read_text() if options.chat_template else ""
        return Launch(
            model_path=str(llama_models.resolve(model.backend_tag, self._model_dir)),
            alias=model.backend_tag,
            context_length=model.context_length,
            slots=model.max_concurrency,
            threads=options.threads or _cores(),
            batch_tokens=options.batch_tokens,
            device=device,
            gpu_layers=0 if device == RAM else options.gpu_layers,
            chat_template=template,
            pooling=options.embeddings,
            api_key="",
            directory="",
            parent=0,
        )

    def _running(self, model: Model) -> LlamaServer:
        known = self._servers.get(model.id)
        if known is None:
            raise ProviderDeclined(f"model {model.id!r} is not loaded on provider {self.name!r}")
        if known[1].exited:
            raise ProviderDeclined(f"the engine of model {model.id!r} died: {known[1].how_it_ended()}")
        return known[1]

    async def _stop(self, model_id: str) -> None:
        known = self._servers.get(model_id)
        if known is not None:
            await known[1].stop()
            self._servers.pop(model_id, None)


def _loaded(model_id: str, server: LlamaServer) -> LoadedModel:
    """A running child. Its resident memory says nothing of a GPU's: there, the GPU is asked about the process."""
    launch = server.launch
    size = server.resident_bytes() if launch.device in ("", RAM) else 0
    return LoadedModel(model=model_id, tag=launch.alias, bytes=size, pid=server.pid)


async def _engine_sees_gpu() -> bool:
    """Whether the engine was built for a GPU that is there. Asked in a process of its own: looking takes its memory."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _LOOK, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    return out.strip() == b"True"


_LOOK = """
import xllamacpp
gpus = ("GGML_BACKEND_DEVICE_TYPE_GPU", "GGML_BACKEND_DEVICE_TYPE_IGPU")
print(any(device["type"].name in gpus for device in xllamacpp.get_device_info()))
"""


async def _count(server: LlamaServer, prepared: Mapping[str, object]) -> int:
    answer = await server.pool.call("POST", "/chat/completions/input_tokens", msgspec.json.encode(prepared))
    return msgspec.json.decode(answer, type=_Counted).input_tokens


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


class _Counted(msgspec.Struct):
    input_tokens: int


class _Vector(msgspec.Struct):
    index: int
    embedding: builtins.list[float]


class _Embeddings(msgspec.Struct):
    data: builtins.list[_Vector]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
