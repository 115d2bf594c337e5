"""A small LoRA adapter for SmolLM2-135M, made of numbers from a fixed seed, in both of its usual forms.

The same weights are written as peft saves them (a folder) and as llama.cpp reads them (a GGUF file), so that both
engines can be asked whether they answer alike with it. Only projections that GGUF stores as they are take part: the
rows of q_proj and k_proj are in another order there.
"""

from __future__ import annotations

import json
import random
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path

LAYERS, HIDDEN, VALUES, INNER = 30, 576, 192, 1536
RANK, ALPHA = 4, 8
PARTS = {"self_attn.v_proj": ("attn_v", HIDDEN, VALUES), "mlp.down_proj": ("ffn_down", INNER, HIDDEN)}
"""peft's name of a projection -> GGUF's, values that go in, values that come out."""
_ALIGNMENT = 32
_STRING, _FLOAT32 = 8, 6

Tensors = Mapping[str, tuple[tuple[int, int], bytes]]
"""Name -> (rows, columns) and float32 values, row by row."""


def write_adapter(directory: Path, seed: int, strength: float = 0.05) -> tuple[Path, Path]:
    """Write the adapter of a seed; gives peft's folder and the GGUF file."""
    chance = random.Random(seed)
    peft: dict[str, tuple[tuple[int, int], bytes]] = {}
    gguf: dict[str, tuple[tuple[int, int], bytes]] = {}
    for layer in range(LAYERS):
        for part, (short, size_in, size_out) in PARTS.items():
            for letter, shape in (("A", (RANK, size_in)), ("B", (size_out, RANK))):
                values = array("f", (chance.gauss(0, strength) for _ in range(shape[0] * shape[1]))).tobytes()
                peft[f"base_model.model.model.layers.{layer}.{part}.lora_{letter}.weight"] = shape, values
                gguf[f"blk.{layer}.{short}.weight.lora_{letter.lower()}"] = shape, values
    folder = directory / f"adapter-{seed}"
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "bias": "none", "target_modules": ["v_proj", "down_proj"], "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(_safetensors(peft))
    file = directory / f"adapter-{seed}.gguf"
    file.write_bytes(_gguf(gguf))
    return folder, file


def _safetensors(tensors: Tensors) -> bytes:
    """Source of the form: https://github.com/huggingface/safetensors#format."""
    head: dict[str, object] = {}
    at = 0
    for name, (shape, values) in tensors.items():
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(values)]}
        at += len(values)
    written = json.dumps(head).encode()
    return b"".join((struct.pack("<Q", len(written)), written, *(values for _, values in tensors.values())))


def _gguf(tensors: Tensors) -> bytes:
    """Source of the form: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
    texts = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(texts) + 1)]
    head += [_text(key) + struct.pack("<I", _STRING) + _text(value) for key, value in texts.items()]
    head.append(_text("adapter.lora.alpha") + struct.pack("<If", _FLOAT32, ALPHA))
    at = 0
    for name, ((rows, columns), values) in tensors.items():
        # Dimensions stand with the one that varies fastest first; type 0 is float32.
        head.append(_text(name) + struct.pack("<IQQIQ", 2, columns, rows, 0, at))
        at += _padded(len(values))
    whole = b"".join(head)
    data = [whole.ljust(_padded(len(whole)), b"\0")]
    data += [values.ljust(_padded(len(values)), b"\0") for _, values in tensors.values()]
    return b"".join(data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
