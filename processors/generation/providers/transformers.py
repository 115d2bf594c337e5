"""Hugging Face transformers as a provider: one child process a model, with an engine that batches continuously."""

from __future__ import annotations

import asyncio
import builtins
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from headrace.errors import ProviderError, UnsupportedParameter
from processors.generation.providers import transformers_body, transformers_facts
from processors.generation.providers.base import RAM, BackendModel, DeviceKind, ModelFacts
from processors.generation.providers.child_server import ChildServer
from processors.generation.providers.children import ChildProvider, cores, says_true
from processors.generation.providers.pool import IDLE_TIMEOUT_S
from processors.generation.providers.transformers_child import Launch
from schemas.control import Model

NEEDED = ("torch", "transformers", "peft", "llguidance")
BATCH_TOKENS = 64
"""Prompt tokens of one step. Small, for a CPU: every other stream, and a cancel, waits for at most one step; a GPU
wants 2048."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`options` of a transformers provider record."""

    model_dir: str | None = None
    """Where model folders lie; a backend_tag may also be a path, or a name in the Hugging Face hub."""
    threads: int | None = None
    """Threads that compute; by default the cores this process may use."""
    batch_tokens: int = BATCH_TOKENS
    chat_template: str | None = None
    """File with a Jinja chat template in place of the models' own."""
    device: str | None = None
    """PyTorch's name of a device, such as `cuda:1`; by default the first GPU, or the CPU."""
    dtype: str = "auto"
    """Type of the weights: `auto` as they are stored, `float32`, `bfloat16` or `float16`."""
    idle_timeout_s: float = IDLE_TIMEOUT_S
    """Seconds without a byte after which an answer has failed, and that a step of the engine may take."""


class Transformers(ChildProvider):
    """Children of this process; they die with it."""

    program = "processors.generation.providers.transformers_child"
    can_continue = True

    def __init__(self, name: str, options: Options | None = None) -> None:
        self._options = options or Options()
        super().__init__(name, self._options.idle_timeout_s)
        self._sees_gpu: asyncio.Task[bool] | None = None

    async def health(self) -> None:
        """Return when the engine is installed and every running child answers. Raises `ProviderError`."""
        missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
        if missing:
            raise ProviderError(
                f"provider {self.name!r} needs {', '.join(missing)}: pip install 'headrace[transformers]'"
            )
        await super().health()

    async def list(self) -> builtins.list[BackendModel]:
        """The model folders in the model directory."""
        return await asyncio.to_thread(self._folders)

    async def device_kind(self, gpus: Sequence[str]) -> DeviceKind:
        """`gpu` when there is one, PyTorch finds one, and the option `device` does not say the CPU; else `ram`."""
        return "gpu" if gpus and await self._on_gpu() else "ram"

    async def inspect(self, model: Model) -> ModelFacts:
        """What the model's folder says, and the memory it will take. Raises `ProviderError` when it cannot be read."""
        launch = self.launch(model)
        folder = Path(launch.tag)
        if not folder.is_dir():
            return ModelFacts()  # a name in the hub: nothing is known before it is fetched
        found = await asyncio.to_thread(transformers_facts.read, folder)
        return transformers_facts.facts(
            found, launch, on_gpu=await self._on_gpu(), own_template=bool(launch.chat_template)
        )

    async def version(self, model: Model) -> str:
        """By size and time of the folder's files; empty for a name in the hub."""
        folder = Path(folder_of(model.backend_tag, self._model_dir))
        return transformers_facts.version(folder) if folder.is_dir() else ""

    async def embed(self, model: Model, texts: builtins.list[str]) -> builtins.list[builtins.list[float]]:
        """Refused: this engine generates text."""
        raise UnsupportedParameter(f"provider {self.name!r} serves no embeddings")

    def launch(self, model: Model, device: str = "") -> Launch:
        """How a model's child is to run."""
        options = self._options
        return Launch(
            tag=folder_of(model.backend_tag, self._model_dir),
            alias=model.backend_tag,
            context_length=model.context_length,
            slots=model.max_concurrency,
            threads=options.threads or cores(),
            batch_tokens=options.batch_tokens,
            device=device,
            torch_device="cpu" if device == RAM else options.device,
            dtype=options.dtype,
            step_s=options.idle_timeout_s,
            chat_template=Path(options.chat_template).read_text() if options.chat_template else "",
            adapters=model.adapters,
        )

    def prepare(self, model: Model, body: Mapping[str, object], server: ChildServer) -> dict[str, object]:
        """The body for the engine; `transformers_body` says which parameters it honours.

        The engine leaves a last message of the assistant open, and gives only what follows it.
        """
        return transformers_body.prepare(model, body)

    def adapted(self, prepared: Mapping[str, object], server: ChildServer, adapter: str) -> dict[str, object]:
        """The engine knows an adapter by its name."""
        return {**prepared, "adapter": adapter}

    @property
    def _model_dir(self) -> Path | None:
        return Path(self._options.model_dir).expanduser() if self._options.model_dir else None

    async def _on_gpu(self) -> bool:
        if (self._options.device or "").startswith("cpu"):
            return False
        if self._sees_gpu is None:
            self._sees_gpu = asyncio.create_task(says_true("import torch; print(torch.cuda.is_available())"))
        return await asyncio.shield(self._sees_gpu)

    def _folders(self) -> builtins.list[BackendModel]:
        directory = self._model_dir
        if directory is None or not directory.is_dir():
            return []
        return [
            BackendModel(
                tag=str(config.parent.relative_to(directory)),
                bytes=sum(weights.stat().st_size for weights in config.parent.glob("*.safetensors")),
            )
            for config in sorted(directory.rglob("config.json"))
        ]


def folder_of(tag: str, model_dir: Path | None) -> str:
    """The folder that a tag means, as a path or a name in `model_dir`; else the tag itself, a name in the hub."""
    for path in (Path(tag).expanduser(), *([model_dir / tag] if model_dir is not None else [])):
        if (path / "config.json").is_file():
            return str(path)
    return tag
