"""What a Hugging Face folder tells of a model's memory: the parts, by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import msgspec
import pytest

from headrace.errors import ProviderError
from processors.generation.providers import footprint, transformers_facts
from processors.generation.providers.transformers_child import Launch

CONFIG: dict[str, object] = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 1000,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
LAUNCH = Launch(alias="a", tag="t", context_length=100, slots=3, threads=1, batch_tokens=10, step_s=120)


def write(folder: Path, tensors: dict[str, tuple[str, list[int]]], config: dict[str, object] = CONFIG) -> Path:
    head = {name: {"dtype": kind, "shape": shape, "data_offsets": [0, 0]} for name, (kind, shape) in tensors.items()}
    raw = json.dumps({**head, "__metadata__": {"format": "pt"}}).encode()
    (folder / "model-00001-of-00002.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_parts_add_up(tmp_path: Path) -> None:
    found = transformers_facts.read(write(tmp_path, {"a": ("BF16", [1000, 64]), "b": ("F32", [64])}))
    facts = transformers_facts.facts(found, LAUNCH, on_gpu=False)
    assert (facts.parameters, facts.weight_bytes, facts.quantisation) == (64064, 128_256, "BF16")
    cache = 3 * 100 * 2 * 2 * (16 + 16) * 2
    step = 13 * (8 * 64 + 3 * 96) * 2 + 3 * 3 * 1000 * 4
    process = transformers_facts.PROCESS + 1000 * transformers_facts.TOKEN_BYTES
    assert facts.bytes == 128_256 + cache + step + process
    assert transformers_facts.facts(found, LAUNCH, on_gpu=True).bytes == 128_256 + cache + step + footprint.GPU_PROCESS


def test_a_chosen_type_counts_in_memory_and_not_on_the_disk(tmp_path: Path) -> None:
    wide = msgspec.structs.replace(LAUNCH, dtype="float32")
    found = transformers_facts.read(write(tmp_path, {"a": ("BF16", [1000, 64])}))
    stored = transformers_facts.facts(found, LAUNCH, on_gpu=True)
    widened = transformers_facts.facts(found, wide, on_gpu=True)
    assert widened.weight_bytes == stored.weight_bytes == 128_000
    assert widened.bytes - stored.bytes == 256_000 + 3 * 100 * 2 * 2 * 32 * 2 + 13 * (8 * 64 + 3 * 96) * 2


def test_models_of_several_kinds_are_read_at_their_text(tmp_path: Path) -> None:
    nested = {"model_type": "wrapped", "text_config": CONFIG}
    found = transformers_facts.read(write(tmp_path, {"a": ("F16", [8, 8])}, nested))
    assert transformers_facts.facts(found, LAUNCH, on_gpu=False).layers == 2


@pytest.mark.parametrize("damage", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_damaged_folder_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path, {"a": ("F16", [8, 8])})
    (tmp_path / damage).write_bytes(b"\xff" * 20)
    with pytest.raises(ProviderError, match="is no model"):
        transformers_facts.read(tmp_path)
