"""llama.cpp as a provider: one child process a model, asked over its OpenAI endpoints."""

from __future__ import annotations

import asyncio
import builtins
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from headrace.errors import ProviderError, UnsupportedParameter
from processors.generation.providers import llama_adapters, llama_body, llama_facts, llama_models
from processors.generation.providers.base import RAM, BackendModel, DeviceKind, ModelFacts
from processors.generation.providers.child import ChildLaunch
from processors.generation.providers.child_server import ChildServer
from processors.generation.providers.children import ChildProvider, cores, says_true
from processors.generation.providers.footprint import Engine
from processors.generation.providers.llama_child import Launch
from processors.generation.providers.pool import IDLE_TIMEOUT_S
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
    idle_timeout_s: float = IDLE_TIMEOUT_S
    """Seconds without a byte after which an answer has failed; it must cover the longest prefill."""


class LlamaCpp(ChildProvider):
    """Children of this process; they die with it."""

    program = "processors.generation.providers.llama_child"
    can_continue = True

    def __init__(self, name: str, options: Options | None = None) -> None:
        self._options = options or Options()
        super().__init__(name, self._options.idle_timeout_s)
        self._sees_gpu: asyncio.Task[bool] | None = None

    async def health(self) -> None:
        """Return when the engine is installed and every running child answers. Raises `ProviderError`."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise ProviderError(f"provider {self.name!r} needs the engine: pip install 'headrace[embedded]'")
        await super().health()

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
        launch = self.launch(model)
        header = await asyncio.to_thread(llama_facts.read, Path(launch.model_path))
        return llama_facts.facts(
            header,
            Engine(launch.context_length, launch.slots, launch.batch_tokens, launch.threads + launch.http_threads),
            gpu_layers=launch.gpu_layers if launch.gpu_layers and await self._engine_sees_gpu() else 0,
            own_template=bool(launch.chat_template),
            embeddings=launch.pooling is not None,
        )

    async def version(self, model: Model) -> str:
        """By size and time of the model's files."""
        return llama_facts.version(llama_models.resolve(model.backend_tag, self._model_dir))

    async def embed(self, model: Model, texts: builtins.list[str]) -> builtins.list[builtins.list[float]]:
        """One vector a text, if the provider's option `embeddings` is on."""
        if self._options.embeddings is None:
            raise UnsupportedParameter(f"provider {self.name!r} serves no embeddings: set its option embeddings")
        body = msgspec.json.encode({"input": texts, "model": model.backend_tag})
        answer = await self.server(model).pool.call("POST", "/embeddings", body)
        vectors = msgspec.json.decode(answer, type=_Embeddings).data
        return [one.embedding for one in sorted(vectors, key=lambda one: one.index)]

    def launch(self, model: Model, device: str = "") -> Launch:
        """How a model's child is to run. Raises `ProviderError` when there is no such model."""
        options = self._options
        return Launch(
            model_path=str(llama_models.resolve(model.backend_tag, self._model_dir)),
            alias=model.backend_tag,
            context_length=model.context_length,
            slots=model.max_concurrency,
            threads=options.threads or cores(),
            batch_tokens=options.batch_tokens,
            device=device,
            gpu_layers=0 if device == RAM else options.gpu_layers,
            chat_template=Path(options.chat_template).read_text() if options.chat_template else "",
            pooling=options.embeddings,
            adapters=model.adapters,
        )

    async def start(self, launch: ChildLaunch) -> ChildServer:
        """Start a child with the adapters that can be loaded: the engine itself takes all or none."""
        return await llama_adapters.start(launch, super().start)

    def prepare(self, model: Model, body: Mapping[str, object], server: ChildServer) -> dict[str, object]:
        """The body for the engine; `llama_body` says which parameters it honours.

        The engine leaves a last message of the assistant open, and gives only what follows it.
        """
        prepared = llama_body.prepare(model, body, takes_tools=server.takes_tools)
        if server.launch.adapters:
            # Without this the slot goes on from what an earlier request's adapter made of the same prompt.
            prepared["lora"] = [{"id": 0, "scale": 0.0}]
        return prepared

    def adapted(self, prepared: Mapping[str, object], server: ChildServer, adapter: str) -> dict[str, object]:
        """The engine knows an adapter by its place; what a request does not name has no part in its answer."""
        return {**prepared, "lora": [{"id": builtins.list(server.launch.adapters).index(adapter), "scale": 1.0}]}

    @property
    def _model_dir(self) -> Path | None:
        return Path(self._options.model_dir).expanduser() if self._options.model_dir else None

    async def _engine_sees_gpu(self) -> bool:
        if self._sees_gpu is None:
            self._sees_gpu = asyncio.create_task(says_true(_LOOK))
        return await asyncio.shield(self._sees_gpu)


_LOOK = """
import xllamacpp
gpus = ("GGML_BACKEND_DEVICE_TYPE_GPU", "GGML_BACKEND_DEVICE_TYPE_IGPU")
print(any(device["type"].name in gpus for device in xllamacpp.get_device_info()))
"""


class _Vector(msgspec.Struct):
    index: int
    embedding: builtins.list[float]


class _Embeddings(msgspec.Struct):
    data: builtins.list[_Vector]
