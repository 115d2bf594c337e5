"""Any OpenAI-compatible server as a provider: vLLM, llama-server, SGLang, TGI, a hosted API."""

from __future__ import annotations

import builtins
from collections.abc import AsyncGenerator, Mapping
from typing import TypeVar

import msgspec

from headrace.errors import HeadraceError, ProviderDeclined, ProviderError
from processors.generation.providers import chat
from processors.generation.providers.base import BackendModel, LoadedModel, ModelFacts, Piece, Provider
from processors.generation.providers.pool import Pool
from schemas.control import Model

T = TypeVar("T")
_TOKENIZED = ("model", "messages", "tools", "chat_template_kwargs")
"""Fields of a chat that vLLM's `/tokenize` takes and that change the prompt."""


class _Meta(msgspec.Struct):
    n_ctx: int | None = None
    n_ctx_train: int = 0
    n_params: int = 0
    size: int = 0
    """Bytes of the weights."""


class _Listed(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    """vLLM's and SGLang's name of the context length."""
    meta: _Meta | None = None
    """llama-server's."""

    @property
    def context(self) -> int | None:
        """Tokens that a request may have, where the server tells."""
        return self.max_model_len or (self.meta.n_ctx if self.meta else None)


class _List(msgspec.Struct):
    data: list[_Listed] = []


class _Tokenized(msgspec.Struct):
    count: int


class _Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


class OpenAICompatible(Provider):
    """A server that somebody else runs: it loads and unloads by its own rules, so only its answers are observed."""

    def __init__(self, name: str, pool: Pool, root: Pool, continues: str | None = None) -> None:
        """`continues` (of `schemas.control.CONTINUES`) is how the server goes on with a text; None where it cannot.

        `root` leads to the same server without the `/v1` of its base URL.
        """
        self.name = name
        self.can_continue = continues is not None
        self._continues = continues
        self._pool = pool
        self._root = root
        self._where = f"provider {name!r} ({pool.endpoint})"
        self._loaded: dict[str, Model] = {}
        self._counts = [self._llama_count, self._vllm_count]
        """The calls that count, of which the server has not yet said that it knows no such path."""

    async def health(self) -> None:
        """Return when the server lists its models. Raises `ProviderError`."""
        await self._models()

    async def list(self) -> builtins.list[BackendModel]:
        """The models that the server says it serves. Raises `ProviderError`."""
        return [BackendModel(tag=one.id, context_length=one.context) for one in await self._models()]

    async def inspect(self, model: Model) -> ModelFacts:
        """What the server tells: vLLM its context, llama-server more. Raises `ProviderError` for an unknown tag."""
        found = await self._served(model)
        meta = found.meta or _Meta()
        context = meta.n_ctx_train or found.context or 0
        return ModelFacts(context_length=context, parameters=meta.n_params, weight_bytes=meta.size)

    async def load(self, model: Model, device: str = "") -> LoadedModel:
        """See that the server serves the tag. Raises `ProviderError` with what it serves instead."""
        found = await self._served(model)
        if found.context is not None and found.context < model.context_length:
            raise ProviderError(
                f"{self._where} serves {model.backend_tag!r} with {found.context} tokens of context, less than"
                f" the {model.context_length} of model {model.id!r}: lower its context_length"
            )
        self._loaded[model.id] = model
        return LoadedModel(model=model.id, tag=model.backend_tag)

    async def unload(self, model: Model) -> None:
        """Forget the model; the memory is the server's own."""
        self._loaded.pop(model.id, None)

    async def resident(self) -> builtins.list[LoadedModel]:
        """The models in use here; their bytes are the server's own matter."""
        return [LoadedModel(model=one.id, tag=one.backend_tag) for one in self._loaded.values()]

    async def count_prompt(self, model: Model, body: Mapping[str, object], *, emitted: str = "") -> int | None:
        """By the server's own call, which OpenAI's API lacks: llama-server's or vLLM's. None where it has neither."""
        asked = {**chat.continued(body, emitted), "model": model.backend_tag}
        for count in self._counts:
            try:
                return await count(asked, bool(emitted))
            except ProviderDeclined:
                self._counts = [other for other in self._counts if other != count]
            except (HeadraceError, msgspec.DecodeError):
                continue
        return None

    async def _llama_count(self, asked: Mapping[str, object], open_ended: bool) -> int:
        return await chat.count_tokens(self._pool, asked)

    async def _vllm_count(self, asked: Mapping[str, object], open_ended: bool) -> int:
        known = {name: asked[name] for name in _TOKENIZED if name in asked}
        how = {"add_generation_prompt": not open_ended, "continue_final_message": open_ended}
        answer = await self._root.call("POST", "/tokenize", msgspec.json.encode(known | how))
        return msgspec.json.decode(answer, type=_Tokenized).count

    def generate(
        self, model: Model, body: Mapping[str, object], *, emitted: str = "", adapter: str = ""
    ) -> AsyncGenerator[builtins.list[Piece], None]:
        """See `Provider.generate`; every field goes on to the server, which refuses what it does not know."""
        asked = chat.streamed(chat.continued(body, emitted), model.backend_tag)
        if emitted and self._continues == "vllm":
            asked |= {"add_generation_prompt": False, "continue_final_message": True}
        return chat.stream_chat(self._pool, self._where, asked)

    async def embed(self, model: Model, texts: builtins.list[str]) -> builtins.list[builtins.list[float]]:
        """One vector a text, in their order. Raises `ProviderError`, or `ProviderRefused` where there are none."""
        body = msgspec.json.encode({"model": model.backend_tag, "input": texts, "encoding_format": "float"})
        answer = self._read(await self._pool.call("POST", "/embeddings", body), _Embeddings)
        vectors = {one.index: one.embedding for one in answer.data}
        if sorted(vectors) != builtins.list(range(len(texts))):
            raise ProviderError(f"{self._where} gave {len(vectors)} embeddings for {len(texts)} texts")
        return [vectors[index] for index in range(len(texts))]

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close()
        await self._root.close()

    async def _served(self, model: Model) -> _Listed:
        served = await self._models()
        for one in served:
            if one.id == model.backend_tag:
                return one
        names = ", ".join(one.id for one in served[:20]) or "nothing"
        raise ProviderError(f"{self._where} does not serve {model.backend_tag!r}; it serves: {names}")

    async def _models(self) -> builtins.list[_Listed]:
        return self._read(await self._pool.call("GET", "/models"), _List).data

    def _read(self, answer: bytes, shape: type[T]) -> T:
        try:
            return msgspec.json.decode(answer, type=shape)
        except (msgspec.DecodeError, UnicodeDecodeError) as problem:
            raise ProviderError(f"{self._where} sent what is not its API: {problem}") from problem
