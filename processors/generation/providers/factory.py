"""From a provider record to a provider."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, TypeVar

import msgspec
from ollama import AsyncClient

from headrace.errors import ProviderError
from processors.generation.providers.base import Provider
from processors.generation.providers.endpoint import Endpoint, parse_base_url
from processors.generation.providers.llama_cpp import LlamaCpp
from processors.generation.providers.llama_cpp import Options as LlamaOptions
from processors.generation.providers.ollama import Ollama
from processors.generation.providers.openai import OpenAICompatible
from processors.generation.providers.pool import IDLE_TIMEOUT_S, Pool
from processors.generation.providers.transformers import Options as TransformersOptions
from processors.generation.providers.transformers import Transformers
from schemas import control

OLLAMA_URL = "http://127.0.0.1:11434"

Options = TypeVar("Options", LlamaOptions, TransformersOptions, "OllamaOptions", "OpenAIOptions")


class RemoteOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`options` of an ollama provider record; an openai one has more."""

    idle_timeout_s: float = IDLE_TIMEOUT_S
    """Seconds without a byte after which an answer has failed; it must cover the longest prefill."""
    connect_timeout_s: float = 5.0


class OllamaOptions(RemoteOptions, frozen=True, forbid_unknown_fields=True):
    """`options` of an ollama provider record."""

    memory_bytes: int | None = None
    """Memory that its machine gives to models, in bytes; models are then loaded and unloaded to fit."""
    parallel: int = 1
    """What the server has as OLLAMA_NUM_PARALLEL: a model's cache is that many contexts."""
    pull: bool = False
    """Whether a model that the server does not have is downloaded when it is to be loaded."""


class OpenAIOptions(RemoteOptions, frozen=True, forbid_unknown_fields=True):
    """`options` of an openai provider record."""

    continues: Literal["prefill", "vllm"] | None = None
    """How the server is asked to go on with a text: it continues a last message of the assistant by itself, or with
    vLLM's `continue_final_message`; None where it cannot."""


def make_provider(record: control.Provider, *, environ: Mapping[str, str] = os.environ) -> Provider:
    """The provider that a record describes; the API key is read from `environ`.

    Raises `ProviderError` that names the record and what in it is wrong.
    """
    if record.kind == "llama_cpp":
        return LlamaCpp(record.name, _options(record, LlamaOptions))
    if record.kind == "transformers":
        return Transformers(record.name, _options(record, TransformersOptions))
    if record.kind == "openai":
        if not record.base_url:
            raise ProviderError(
                f"provider {record.name!r} of kind openai needs a base_url, such as http://host:8000/v1"
            )
        remote = _options(record, OpenAIOptions)
        endpoint = _endpoint(record, record.base_url)
        above = msgspec.structs.replace(endpoint, path=endpoint.path.removesuffix("/v1"))
        pool, root = (_pool(record, at, remote, environ) for at in (endpoint, above))
        return OpenAICompatible(record.name, pool, root, remote.continues)
    if record.kind == "ollama":
        endpoint = _endpoint(record, record.base_url or OLLAMA_URL)
        options = _options(record, OllamaOptions)
        pool = _pool(record, endpoint, options, environ)
        client = AsyncClient(
            host=record.base_url or OLLAMA_URL, headers=_headers(record, environ), timeout=options.idle_timeout_s
        )
        return Ollama(
            record.name, client, pool,
            memory_bytes=options.memory_bytes, parallel=options.parallel, pull=options.pull,
        )  # fmt: skip
    kinds = "llama_cpp, transformers, ollama or openai"
    raise ProviderError(f"provider {record.name!r} has kind {record.kind!r}; it must be {kinds}")


def _pool(record: control.Provider, endpoint: Endpoint, options: RemoteOptions, environ: Mapping[str, str]) -> Pool:
    try:
        return Pool(
            record.name,
            endpoint,
            headers=_headers(record, environ),
            idle_timeout_s=options.idle_timeout_s,
            connect_timeout_s=options.connect_timeout_s,
        )
    except ValueError as problem:
        raise ProviderError(str(problem)) from problem


def _headers(record: control.Provider, environ: Mapping[str, str]) -> dict[str, str]:
    name = record.api_key_env
    if not name:
        return {}
    key = environ.get(name, "").strip()
    if not key:
        raise ProviderError(
            f"provider {record.name!r} needs its API key in the environment variable {name}, which is not set here"
        )
    return {"Authorization": f"Bearer {key}"}


def _endpoint(record: control.Provider, url: str) -> Endpoint:
    try:
        return parse_base_url(url)
    except ValueError as problem:
        raise ProviderError(f"provider {record.name!r}: {problem}") from problem


def _options(record: control.Provider, shape: type[Options]) -> Options:
    try:
        return msgspec.convert(record.options, shape)
    except msgspec.ValidationError as problem:
        raise ProviderError(f"provider {record.name!r}: options: {problem}") from problem
