"""What the worker asks of a provider: few verbs, each with its errors.

A provider is asked to do; it decides nothing about leases, attempts, queues or retries across workers.
"""

from __future__ import annotations

import abc
import builtins
from collections.abc import AsyncGenerator, Mapping

import msgspec

from schemas.control import Model
from schemas.events import Usage


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


class LoadedModel(msgspec.Struct, frozen=True):
    """A model that is in memory."""

    tag: str
    bytes: int = 0
    """Resident bytes as far as the provider can tell; 0 where it cannot."""


class Provider(abc.ABC):
    """A place where models run. Made once a worker and provider record; all calls are on one event loop."""

    name: str

    @abc.abstractmethod
    async def health(self) -> None:
        """Return when the provider answers. Raises `ProviderError` when it does not."""

    @abc.abstractmethod
    async def list(self) -> builtins.list[BackendModel]:
        """The models that the provider could load. Raises `ProviderError`."""

    @abc.abstractmethod
    async def load(self, model: Model) -> LoadedModel:
        """Bring a model into memory and return when it can answer; a loaded one returns at once.

        Raises `ProviderError` when it cannot be loaded; the message says why and what to do.
        """

    @abc.abstractmethod
    async def unload(self, model: Model) -> None:
        """Give a model's memory back and return when that was seen; a model that is not loaded is fine."""

    @abc.abstractmethod
    async def resident(self) -> builtins.list[LoadedModel]:
        """The models in memory now."""

    @abc.abstractmethod
    async def count_prompt(self, model: Model, body: Mapping[str, object]) -> int | None:
        """Exact prompt tokens of a chat request under the model's template; None where the provider cannot tell."""

    @abc.abstractmethod
    def generate(self, model: Model, body: Mapping[str, object]) -> AsyncGenerator[builtins.list[Piece], None]:
        """Generate an answer: batches of pieces as they arrive, the last piece of the last batch being `Done`.

        `body` is the caller's validated OpenAI chat body; the provider puts its own backend tag, asks its backend to
        stream with usage, and passes every other field on. Failures before the first byte are retried here where that
        is safe. Closing the iterator (`aclose`) or cancelling the task that reads it ends the generation at the
        engine at once. Raises `ContextLengthExceeded`, `UnsupportedParameter` or `ProviderRefused` (a 4xx of the
        provider), and `ProviderError` when it is down, hangs (no byte for its idle timeout), ends without a finish
        reason, or sends garbage: a truncated stream is always an error, never a silent end.
        """

    @abc.abstractmethod
    async def embed(self, model: Model, texts: builtins.list[str]) -> builtins.list[builtins.list[float]]:
        """One vector a text. Raises `ProviderError` or `UnsupportedParameter`."""

    async def on_dead(self, model: Model) -> bool:
        """Whether a loaded model's engine has died since; the worker then reports it and loads it again."""
        return False

    @abc.abstractmethod
    async def close(self) -> None:
        """Free everything: connections, child processes."""
