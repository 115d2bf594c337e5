"""What a Hugging Face folder tells of a model, and how much memory it will take under the transformers engine."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

import msgspec

from headrace.errors import ProviderError
from processors.generation.providers import footprint
from processors.generation.providers.base import ModelFacts, files_version, template_digest
from processors.generation.providers.transformers_child import Launch

HEADER_LIMIT = 100_000_000
"""Bytes of a file's header; safetensors itself takes none that is longer."""
PROCESS = 850 * footprint.MIB
"""Interpreter, PyTorch, transformers and the server: 790 MB were measured with torch 2.15 as PyPI has it for Linux,
whose libraries for CUDA count although they lie still."""
TOKEN_BYTES = 1024
"""Process memory a token of the vocabulary: the tokenizer's tables, and the form's where a JSON schema is kept."""
BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2,
}  # fmt: skip
"""Size of a number, by PyTorch's names and by safetensors'; 1 for all others."""


class Folder(msgspec.Struct, frozen=True):
    """What stands in a model's folder."""

    config: dict[str, object]
    elements: dict[str, int]
    """Numbers of the weights, by safetensors' name of their type."""
    template: str = ""


def read(folder: Path) -> Folder:
    """Read configuration and headers of the weights. Raises `ProviderError` that names the file."""
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, object])
        elements: Counter[str] = Counter()
        for file in sorted(folder.glob("*.safetensors")):
            elements.update(_elements(file))
        template = folder / "chat_template.jinja"
        return Folder(config, dict(elements), template.read_text() if template.is_file() else "")
    except (OSError, ValueError, msgspec.MsgspecError, struct.error) as problem:
        raise ProviderError(f"{folder} is no model: {problem}") from problem


def version(folder: Path) -> str:
    """A text that changes when one of a model's files is written anew. Raises `ProviderError`."""
    try:
        return files_version(sorted(file for file in folder.iterdir() if file.is_file()))
    except OSError as problem:
        raise ProviderError(f"{folder} cannot be read: {problem.strerror or problem}") from problem


def facts(folder: Folder, launch: Launch, *, on_gpu: bool, own_template: bool = False) -> ModelFacts:
    """What is known of a model whose engine is started so."""
    text = folder.config.get("text_config")
    config = text if isinstance(text, Mapping) else folder.config
    stored = sum(count * BYTES.get(kind, 1) for kind, count in folder.elements.items())
    kinds = sorted(folder.elements, key=lambda kind: folder.elements[kind])
    kind = launch.dtype if launch.dtype in BYTES else (kinds[-1] if kinds else "float32")
    size = BYTES.get(kind, 1)
    # While weights are turned into another type, both are there.
    weights = stored + (sum(folder.elements.values()) * size if launch.dtype in BYTES else 0)
    vocabulary = _number(config, "vocab_size") or footprint.LARGEST_VOCABULARY
    process = footprint.GPU_PROCESS if on_gpu else PROCESS + TOKEN_BYTES * vocabulary
    chats = bool(folder.template or own_template)
    return ModelFacts(
        architecture=str(folder.config.get("model_type", "")),
        parameters=sum(folder.elements.values()),
        quantisation=kind,
        context_length=_number(config, "max_position_embeddings"),
        layers=_number(config, "num_hidden_layers"),
        chat_template=bool(folder.template),
        template_digest=template_digest(folder.template),
        capabilities=("chat",) if chats else (),
        weight_bytes=stored,
        bytes=weights + cache(config, launch, size) + compute(config, launch, size, vocabulary) + process,
        load_ms=footprint.load_ms(stored),
    )


def cache(config: Mapping[str, object], launch: Launch, size: int) -> int:
    """Bytes of keys and values with every slot full: slots x tokens x layers x heads x (key + value length) x size."""
    heads = _number(config, "num_attention_heads")
    length = _number(config, "head_dim") or _number(config, "hidden_size") // max(1, heads)
    kept = (_number(config, "num_key_value_heads") or heads) * 2 * length
    return launch.slots * launch.context_length * _number(config, "num_hidden_layers") * kept * size


def compute(config: Mapping[str, object], launch: Launch, size: int, vocabulary: int) -> int:
    """Bytes of a step: what its tokens are on their way through a layer, and scores for one token of each slot."""
    rows = launch.batch_tokens + launch.slots
    wide = 8 * _number(config, "hidden_size") + 3 * _number(config, "intermediate_size")
    return rows * wide * size + 3 * launch.slots * vocabulary * footprint.F32


def _number(config: Mapping[str, object], name: str) -> int:
    value = config.get(name)
    return int(value) if isinstance(value, int | float) else 0


def _elements(file: Path) -> Counter[str]:
    """Source of the form: https://github.com/huggingface/safetensors#format."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > HEADER_LIMIT:
            raise ValueError(f"{file.name} is no safetensors file")
        head = msgspec.json.decode(opened.read(length), type=dict[str, dict[str, object]])
    found: Counter[str] = Counter()
    for name, tensor in head.items():
        shape = tensor.get("shape")
        if name != "__metadata__" and isinstance(shape, list):
            found[str(tensor.get("dtype"))] += prod(shape)
    return found
