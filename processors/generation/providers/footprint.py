"""How much memory a model will take, from what its file says of it. Pure.

The parts, as llama.cpp has them (Ollama runs on the same engine):

| part | bytes |
|---|---|
| weights | the sum of its tensors |
| KV cache | cells x key/value heads x (key length + value length) x 2 (f16), layer by layer |
| recurrent state | of Mamba-like layers, a fixed size for each slot, f32 |
| compute buffers | logits, activations and masks of the tokens that are computed at once |
| process | what the process takes besides, growing with its vocabulary |

Where the metadata leaves something open, the larger reading is taken: a lease that is too large wastes memory until the
model is measured, one that is too small takes memory that another model was promised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from processors.generation.providers.gguf import Tensor

MIB = 1 << 20
CELLS = 256
"""The engine rounds a slot's context up to a multiple of this (`GGML_PAD(n_ctx, 256)` in llama.cpp's llama-context)."""
F16 = 2
F32 = 4
LARGEST_VOCABULARY = 262_144
"""Taken where a vocabulary is not told: Gemma 3's, the largest in wide use."""
SLIDING_PERIOD = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt-oss": 2}
"""Architectures that the engine gives small caches to layers with a sliding window: each n-th layer sees everything
(`set_swa_pattern` in llama.cpp's loaders). For others, a window in the metadata saves nothing."""
RAM_PROCESS = 64 * MIB
"""Interpreter, engine and server; 46 MiB were measured with xllamacpp 2026.10 on two cores."""
GPU_PROCESS = 457 * MIB
"""Memory of a GPU that a process takes for its context; the figure is Ollama's `cudaMinimumMemory`."""
TOKEN_BYTES = 384
"""Process memory a token of the vocabulary: texts, scores and merges in hash tables; 260 were measured."""
THREAD_BYTES = 96 << 10
"""What a thread touches of its stack and of the heap."""
READ_BYTES_S = 1_000_000_000
"""Speed at which weights are read for the first time: a modest NVMe disk."""
START_MS = 500

_BLOCK = re.compile(r"blk\.(\d+)\.")


class Engine(msgspec.Struct, frozen=True):
    """How an engine is started for a model."""

    context: int
    """Tokens of one slot."""
    slots: int
    batch: int
    """Tokens that are computed at once."""
    threads: int = 0
    """Threads that serve or compute."""

    @property
    def cells(self) -> int:
        """Tokens of one slot as the engine rounds them up."""
        return _padded(self.context)


class Metadata:
    """Values of a model's metadata by their names without the architecture, with the engine's own defaults."""

    def __init__(self, values: Mapping[str, object], vocabulary: int = 0) -> None:
        self._values = values
        self._vocabulary = vocabulary
        self.architecture = str(values.get("general.architecture", ""))
        self.layers = self.number("block_count")

    @property
    def vocabulary(self) -> int:
        """Tokens of the vocabulary, or of the largest one where that is not told."""
        return self._vocabulary or self.number("vocab_size") or LARGEST_VOCABULARY

    def get(self, name: str) -> object:
        """The value as it is; None where there is none."""
        return self._values.get(f"{self.architecture}.{name}")

    def number(self, name: str, default: int = 0) -> int:
        """A number; the largest of an array of one a layer."""
        value = self.get(name)
        if isinstance(value, list | tuple):
            return max((int(one) for one in value), default=default)
        return int(value) if isinstance(value, int | float) else default

    def each_layer(self, name: str, default: int) -> list[int]:
        """A number for each layer, from one for all or from an array."""
        value = self.get(name)
        if isinstance(value, list | tuple) and len(value) >= self.layers:
            return [int(one) for one in value[: self.layers]]
        return [self.number(name, default)] * self.layers


class Weights(msgspec.Struct, frozen=True):
    """Bytes of a model's tensors by where an engine puts them that has a GPU."""

    blocks: tuple[int, ...]
    """Of each layer."""
    input: int
    """Everything else but the output: token embeddings above all. They stay in main memory."""
    output: int
    """Of the output layer; the token embeddings again where the model has no output of its own."""
    largest: int


def weights(tensors: Sequence[Tensor], layers: int) -> Weights:
    """Sort tensors by their names, as llama.cpp's loader does."""
    blocks = [0] * layers
    others: dict[str, int] = {}
    for tensor in tensors:
        found = _BLOCK.match(tensor.name)
        if found and int(found[1]) < layers:
            blocks[int(found[1])] += tensor.bytes
        else:
            others[tensor.name] = others.get(tensor.name, 0) + tensor.bytes
    output = sum(size for name, size in others.items() if name.startswith("output"))
    rest = sum(others.values()) - output
    if "output.weight" not in others:
        output += others.get("token_embd.weight", 0)
    return Weights(tuple(blocks), rest, output, max((one.bytes for one in tensors), default=0))


def cache_layers(meta: Metadata, engine: Engine) -> list[int]:
    """Bytes of each layer's cache: of keys and values (f16), of its recurrent state, or of both."""
    if meta.get("attention.causal") is False:
        return [0] * meta.layers  # an encoder keeps nothing from one batch to the next
    wide = meta.number("embedding_length")
    untold = (
        wide // max(1, meta.number("attention.key_length", wide)) if meta.get("attention.head_count") is None else 0
    )
    heads = meta.each_layer("attention.head_count", untold)
    kv_heads = meta.each_layer("attention.head_count_kv", max(heads, default=0))
    default = wide // max(1, min((one for one in heads if one), default=1))
    lengths = [meta.number(f"attention.{name}_length", default) for name in ("key", "value")]
    slid = [
        meta.number(f"attention.{name}_length_swa", own) for name, own in zip(("key", "value"), lengths, strict=True)
    ]
    window = min(engine.cells, _padded(meta.number("attention.sliding_window") + engine.batch))
    state = _state(meta) * F32
    shared = meta.number("attention.shared_kv_layers")
    made = []
    for layer, (sliding, attends) in enumerate(zip(_sliding(meta), _attending(meta), strict=True)):
        kept = kv_heads[layer] * sum(slid if sliding else lengths) if attends else 0
        cells = window if sliding else engine.cells
        if layer >= meta.layers - shared:
            kept = 0  # it reads the cache of an earlier layer
        made.append(engine.slots * (kept * F16 * cells + state))
    return made


def compute(meta: Metadata, engine: Engine) -> int:
    """Bytes of the buffers that a batch is computed in, and of the logits that are kept for each slot."""
    experts = meta.number("expert_used_count") * meta.number("expert_feed_forward_length")
    wide = max(meta.number("feed_forward_length"), experts)
    token = F32 * (meta.vocabulary + 4 * meta.number("embedding_length") + 3 * wide) + (F32 + F16) * engine.cells
    return engine.batch * token + engine.slots * F32 * meta.vocabulary


def in_ram(meta: Metadata, weight_bytes: int, engine: Engine) -> int:
    """Main memory of a process that computes on the CPU, at its highest: with all slots full."""
    process = RAM_PROCESS + TOKEN_BYTES * meta.vocabulary + THREAD_BYTES * engine.threads
    return weight_bytes + sum(cache_layers(meta, engine)) + compute(meta, engine) + process


def on_gpu(meta: Metadata, held: Weights, engine: Engine, gpu_layers: int) -> int:
    """Memory of the GPU with the last `gpu_layers` layers on it; the output counts as one, and below 0 all are."""
    first = 0 if gpu_layers < 0 else max(0, meta.layers + 1 - gpu_layers)
    there = sum(held.blocks[first:]) + sum(cache_layers(meta, engine)[first:])
    if first <= meta.layers:
        there += held.output
    if first:
        there += held.largest  # weights in main memory come over for large batches, one at a time
    return there + compute(meta, engine) + GPU_PROCESS


def on_server(meta: Metadata, weight_bytes: int, engine: Engine) -> int:
    """Memory on a machine of which only the model's file size is known; it never holds more weights than that."""
    return weight_bytes + sum(cache_layers(meta, engine)) + compute(meta, engine) + GPU_PROCESS


def load_ms(weight_bytes: int) -> int:
    """Milliseconds that a first load is expected to take; later ones find the file in the page cache."""
    return START_MS + weight_bytes * 1000 // READ_BYTES_S


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


def _sliding(meta: Metadata) -> list[bool]:
    """Which layers keep no more than their window."""
    pattern = meta.get("attention.sliding_window_pattern")
    if not meta.number("attention.sliding_window"):
        return [False] * meta.layers
    if isinstance(pattern, list | tuple) and len(pattern) >= meta.layers:
        return [bool(one) for one in pattern[: meta.layers]]
    period = SLIDING_PERIOD.get(meta.architecture, 1)
    if period > 1 and isinstance(pattern, int):
        period = max(1, pattern)
    return [layer % period < period - 1 for layer in range(meta.layers)]


def _attending(meta: Metadata) -> list[bool]:
    """Which layers have keys and values; in some hybrids it is one of a few, and the file tells how many."""
    interval = max(1, meta.number("full_attention_interval", 1))
    return [(layer + 1) % interval == 0 for layer in range(meta.layers)]


def _state(meta: Metadata) -> int:
    """Numbers of a layer's recurrent state for one sequence (`n_embd_r` and `n_embd_s` in llama.cpp's hparams)."""
    wide = meta.number("embedding_length")
    if size := meta.number("wkv.head_size"):
        return wide * size + meta.number("token_shift_count", 2) * wide
    if cached := meta.number("shortconv.l_cache"):
        return wide * (cached - 1)
    inner, state = meta.number("ssm.inner_size"), meta.number("ssm.state_size")
    kept = max(0, meta.number("ssm.conv_kernel") - 1)
    return kept * (inner + 2 * meta.number("ssm.group_count") * state) + state * inner
