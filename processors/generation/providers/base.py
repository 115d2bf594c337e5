"""What the worker asks of a provider: few verbs, each with its errors.

A provider is asked to do; it decides nothing about leases, attempts, queues or retries across workers.
"""

from __future__ import annotations

import abc
import builtins
import hashlib
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from schemas.control import Model
from schemas.events import Usage

DIGEST_DIGITS = 12


class Text(msgspec.Struct, gc=False):
    """A piece of the content of choice `index`, of `tokens` tokens as far as the provider tells (1 a piece)."""

    index: int
    text: str
    tokens: int = 1


class Choices(msgspec.Struct, gc=False):
    """Stream choices that hold more than text (tool deltas, logprobs, refusals), as a JSON array, kept as given."""

    json: bytes
    tokens: int = 1


class Finish(msgspec.Struct, gc=False):
    """Choice `index` ended: `stop`, `length`, `tool_calls` or `content_filter`."""

    index: int
    reason: str


class Done(msgspec.Struct, gc=False):
    """The end of a generation, after every choice finished; `usage` None where the provider did not say."""

    usage: Usage | None
    system_fingerprint: str | None = None


Piece = Text | Choices | Finish | Done


class BackendModel(msgspec.Struct, frozen=True):
    """A model as a provider lists it."""

    tag: str
    bytes: int = 0
    context_length: int | None = None


class ModelFacts(msgspec.Struct, frozen=True):
    """What is known of a model before it is loaded; empty and 0 where it is not known."""

    architecture: str = ""
    parameters: int = 0
    quantisation: str = ""
    context_length: int = 0
    """Tokens that it was trained for; those that it is served with, where a server tells no more."""
    layers: int = 0
    chat_template: bool = False
    """Whether the model brings its own."""
    template_digest: str = ""
    """First digits of the template's SHA-256, by `template_digest`."""
    capabilities: tuple[str, ...] = ()
    """Of `chat`, `tools`, `vision`, `thinking` and `embeddings`, what the provider would serve with it."""
    weight_bytes: int = 0
    bytes: int = 0
    """Memory that it is expected to take at its highest, on a device of the provider's kind, when loaded as its
    record says; 0 when it takes none of ours."""
    load_ms: int = 0
    """Milliseconds that a load is expected to take."""


def template_digest(template: str) -> str:
    """Enough of a chat template's SHA-256 to see whether two are the same; empty for none."""
    return hashlib.sha256(template.encode()).hexdigest()[:DIGEST_DIGITS] if template else ""


def files_version(files: Iterable[Path]) -> str:
    """A text that changes when one of the files is written anew. Raises `OSError` when one is not there."""
    marks = [(str(file), (told := file.stat()).st_size, told.st_mtime_ns) for file in files]
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:DIGEST_DIGITS]


DeviceKind = Literal["gpu", "ram", "own", "none"]
"""Where a provider's models lie: on a GPU that the worker sees, in the worker's main memory, in memory that the
provider was given as its own, or in none that leases are about."""

RAM = "ram"
"""Id of the device that is the worker's main memory; other ids are a GPU's UUID, or a provider's own."""


class LoadedModel(msgspec.Struct, frozen=True):
    """A model that is in memory."""

    model: str
    """Id of the model; empty for one that somebody else loaded there."""
    tag: str
    bytes: int = 0
    """Bytes on its device as far as the provider can tell; 0 where it cannot."""
    pid: int | None = None
    """The engine's process on this machine, to look for on a device that tells of processes."""


class Provider(abc.ABC):
    """A place where models run. Made once a worker and provider record; all calls are on one event loop."""

    name: str
    memory_bytes: int | None = None
    """Memory that models may take together, of a provider that has its own."""
    can_continue = False
    """Whether `generate` can go on from a text; `schemas.control.Provider.can_continue` tells it without a provider."""

    @abc.abstractmethod
    async def health(self) -> None:
        """Return when the provider answers. Raises `ProviderError` when it does not."""

    @abc.abstractmethod
    async def list(self) -> builtins.list[BackendModel]:
        """The models that the provider could load. Raises `ProviderError`."""

    async def device_kind(self, gpus: Sequence[str]) -> DeviceKind:
        """Where models of this provider lie, on a worker that sees the GPUs with these UUIDs."""
        return "none"

    async def inspect(self, model: Model) -> ModelFacts:
        """What is known of a model, loaded or not. Raises `ProviderError` when it is not there or cannot be read."""
        return ModelFacts()

    async def version(self, model: Model) -> str:
        """A text that changes when a load would bring other weights, cheap enough for a call each ten seconds.

        Empty where the provider cannot tell. Raises `ProviderError` when the model is not there.
        """
        return ""

    def progress(self, model: Model) -> str:
        """How far the load of a model is, in a few words; empty where it takes no longer than loads do."""
        return ""

    @abc.abstractmethod
    async def load(self, model: Model, device: str = "") -> LoadedModel:
        """Bring a model into memory and return when it can answer; one that is loaded there returns at once.

        `device` is the id of the device that the memory was granted on: a GPU's UUID, or `ram`; empty lets the
        provider's own settings decide. Raises `ProviderError` when it cannot be loaded; the message says why and what
        to do.
        """

    @abc.abstractmethod
    async def unload(self, model: Model) -> None:
        """Give a model's memory back and return when that was seen; a model that is not loaded is fine."""

    @abc.abstractmethod
    async def resident(self) -> builtins.list[LoadedModel]:
        """The models in memory now; cheap enough for a call each second. Raises `ProviderError`."""

    def same_backend_model(self, tag: str, other: str) -> bool:
        """Whether two tags mean one model there."""
        return tag == other

    @abc.abstractmethod
    async def count_prompt(self, model: Model, body: Mapping[str, object], *, emitted: str = "") -> int | None:
        """Exact prompt tokens of a chat request under the model's template; None where the provider cannot tell.

        With `emitted` (as in `generate`) the answer so far is counted with it.
        """

    @abc.abstractmethod
    def generate(
        self, model: Model, body: Mapping[str, object], *, emitted: str = "", adapter: str = ""
    ) -> AsyncGenerator[builtins.list[Piece], None]:
        """Generate an answer: batches of pieces as they arrive, the last piece of the last batch being `Done`.

        `body` is the caller's validated OpenAI chat body; the provider puts its own backend tag, asks its backend to
        stream with usage, and passes every other field on. Failures before the first byte are retried here where that
        is safe. Closing the iterator (`aclose`) or cancelling the task that reads it ends the generation at the
        engine at once. Raises `ContextLengthExceeded`, `UnsupportedParameter` or `ProviderRefused` (a 4xx of the
        provider), and `ProviderError` when it is down, hangs (no byte for its idle timeout), ends without a finish
        reason, or sends garbage: a truncated stream is always an error, never a silent end.

        With `emitted` (never empty then, and only where `can_continue`) the answer has begun with that text; what comes
        is what follows it, and the usage's prompt holds it. With `adapter` the model answers with its LoRA adapter of
        that name; only providers whose kind is in `control.ADAPTER_KINDS` are asked for one.
        """

    @abc.abstractmethod
    async def embed(self, model: Model, texts: builtins.list[str]) -> builtins.list[builtins.list[float]]:
        """One vector a text. Raises `ProviderError` or `UnsupportedParameter`."""

    async def on_dead(self, model: Model) -> bool:
        """Whether a loaded model's engine has died since, or hangs; the worker then says so and loads it again."""
        return False

    @abc.abstractmethod
    async def close(self) -> None:
        """Free everything: connections, child processes."""
