"""What a GGUF file tells of a model, and how much memory it will take under llama.cpp."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from headrace.errors import ProviderError
from processors.generation.providers import footprint, llama_models
from processors.generation.providers.base import ModelFacts, files_version, template_digest
from processors.generation.providers.footprint import Engine, Metadata
from processors.generation.providers.gguf import Header, NotGGUF, read_header
from processors.generation.providers.gguf_types import FILE_TYPES


def read(path: Path) -> Header:
    """The header of a model: of all its files, where it is split. Raises `ProviderError` that names the file."""
    headers = []
    for shard in llama_models.shards(path):
        try:
            headers.append(read_header(shard))
        except NotGGUF as problem:
            raise ProviderError(f"{shard} is no model: {problem}") from problem
        except OSError as problem:
            raise ProviderError(f"{shard} cannot be read: {problem.strerror or problem}") from problem
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    return msgspec.structs.replace(headers[0], tensors=tensors)


def version(path: Path) -> str:
    """A text that changes when one of a model's files is written anew. Raises `ProviderError`."""
    try:
        return files_version(llama_models.shards(path))
    except OSError as problem:
        raise ProviderError(f"{path} cannot be read: {problem.strerror or problem}") from problem


def facts(
    header: Header, engine: Engine, *, gpu_layers: int, own_template: bool = False, embeddings: bool = False
) -> ModelFacts:
    """What is known of a model whose engine is started so; `gpu_layers` 0 means that it takes main memory.

    `own_template`: the provider gives it a chat template. `embeddings`: the engine serves them.
    """
    meta = Metadata(header.metadata, header.lengths.get("tokenizer.ggml.tokens", 0))
    weight_bytes = sum(tensor.bytes for tensor in header.tensors)
    template = str(header.metadata.get("tokenizer.chat_template", ""))
    chats = bool(template or own_template) and meta.get("attention.causal") is not False
    able = {"chat": chats, "tools": chats and "tools" in template, "embeddings": embeddings}
    if gpu_layers:
        size = footprint.on_gpu(meta, footprint.weights(header.tensors, meta.layers), engine, gpu_layers)
    else:
        size = footprint.in_ram(meta, weight_bytes, engine)
    return ModelFacts(
        architecture=meta.architecture,
        parameters=sum(tensor.elements for tensor in header.tensors),
        quantisation=_quantisation(header),
        context_length=meta.number("context_length"),
        layers=meta.layers,
        chat_template=bool(template),
        template_digest=template_digest(template),
        capabilities=tuple(name for name, has in able.items() if has),
        weight_bytes=weight_bytes,
        bytes=size,
        load_ms=footprint.load_ms(weight_bytes),
    )


def _quantisation(header: Header) -> str:
    """As the file calls itself, else the type that most bytes are of."""
    kind = header.metadata.get("general.file_type")
    if isinstance(kind, int) and kind in FILE_TYPES:
        return FILE_TYPES[kind]
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        sizes[tensor.type] += tensor.bytes
    return sizes.most_common(1)[0][0] if sizes else ""
