"""Expected memory of models whose real sizes are published, and the rules that make it larger or smaller."""

from __future__ import annotations

import pytest

from processors.generation.providers import footprint
from processors.generation.providers.footprint import MIB, Engine, Metadata
from processors.generation.providers.gguf import Tensor

KIB = 1 << 10
ONE = Engine(context=8192, slots=1, batch=512)


def model(architecture: str, **values: object) -> Metadata:
    named = {f"{architecture}.{name.replace('__', '.')}": value for name, value in values.items()}
    return Metadata({"general.architecture": architecture, **named})


LLAMA_31_8B = model(
    "llama",  # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
    block_count=32, embedding_length=4096, feed_forward_length=14336, vocab_size=128256,
    attention__head_count=32, attention__head_count_kv=8,
)  # fmt: skip
QWEN_25_7B = model(
    "qwen2",  # https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
    block_count=28, embedding_length=3584, feed_forward_length=18944, vocab_size=152064,
    attention__head_count=28, attention__head_count_kv=4,
)  # fmt: skip
MISTRAL_7B = model(
    "llama",  # https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json; llama.cpp has it as a llama
    block_count=32, embedding_length=4096, feed_forward_length=14336, vocab_size=32000,
    attention__head_count=32, attention__head_count_kv=8, attention__sliding_window=4096,
)  # fmt: skip
GEMMA_2_9B = model(
    "gemma2",  # https://huggingface.co/google/gemma-2-9b/blob/main/config.json
    block_count=42, embedding_length=3584, feed_forward_length=14336, vocab_size=256000,
    attention__head_count=16, attention__head_count_kv=8, attention__key_length=256, attention__value_length=256,
    attention__sliding_window=4096,
)  # fmt: skip
GEMMA_3_4B = model(
    "gemma3",  # https://huggingface.co/google/gemma-3-4b-it/blob/main/config.json
    block_count=34, embedding_length=2560, feed_forward_length=10240, vocab_size=262208,
    attention__head_count=8, attention__head_count_kv=4, attention__key_length=256, attention__value_length=256,
    attention__sliding_window=1024,
)  # fmt: skip
DEEPSEEK_V2_LITE = model(
    "deepseek2",  # https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json, with kv_lora_rank 512
    block_count=27, embedding_length=2048, feed_forward_length=10944, vocab_size=102400,
    attention__head_count=16, attention__head_count_kv=1, attention__key_length=576, attention__value_length=512,
    attention__key_length_mla=192, attention__value_length_mla=128,
)  # fmt: skip


def cache(meta: Metadata, engine: Engine = ONE) -> int:
    return sum(footprint.cache_layers(meta, engine))


@pytest.mark.parametrize(
    ("meta", "bytes_a_token"),
    [(LLAMA_31_8B, 128 * KIB), (QWEN_25_7B, 56 * KIB), (MISTRAL_7B, 128 * KIB)],
    ids=["Llama-3.1-8B", "Qwen2.5-7B", "Mistral-7B"],
)
def test_the_cache_of_a_token_is_the_published_one(meta: Metadata, bytes_a_token: int) -> None:
    """llama.cpp prints 1024, 448 and 1024 MiB for 8192 cells; Mistral's window saves nothing there."""
    assert cache(meta) == bytes_a_token * 8192


def test_layers_with_a_window_keep_no_more_than_it() -> None:
    """llama.cpp prints `160.00 MiB (8192 cells, 5 layers)` and `174.00 MiB (1536 cells, 29 layers)` for Gemma 3 4B;
    without windows it printed 2688.00 MiB for Gemma 2 9B: 21 layers of 64 MiB, and 21 of 4096 + 512 cells."""
    assert cache(GEMMA_3_4B) == (160 + 174) * MIB
    assert cache(GEMMA_2_9B) == (1344 + 1344 * 4608 // 8192) * MIB
    assert cache(GEMMA_2_9B, Engine(2048, 1, 512)) == 2688 * MIB // 4, "a window wider than the context"


def test_a_pattern_in_the_file_comes_first() -> None:
    def layers(architecture: str, pattern: object) -> list[int]:
        meta = model(architecture, block_count=4, attention__head_count=2, embedding_length=64,
                     attention__sliding_window=256, attention__sliding_window_pattern=pattern)  # fmt: skip
        return [size // 256 for size in footprint.cache_layers(meta, Engine(8192, 1, 32))]

    assert layers("gemma4", [True, False, False, True]) == [512, 8192, 8192, 512]
    assert layers("gemma3", 2) == [512, 8192, 512, 8192]
    assert layers("llama", 2) == [8192] * 4, "the engine gives it no small caches"


def test_latent_attention_keeps_its_compressed_heads() -> None:
    """With its 16 heads unfolded it would be 16 x (192 + 128) numbers a token; it is one of 576, and values besides."""
    assert cache(DEEPSEEK_V2_LITE) == 27 * (576 + 512) * 2 * 8192


def test_heads_may_differ_by_layer() -> None:
    meta = model("openelm", block_count=3, attention__head_count=[12, 16, 20], attention__head_count_kv=[3, 4, 5],
                 attention__key_length=64, attention__value_length=64, embedding_length=1280)  # fmt: skip
    assert footprint.cache_layers(meta, Engine(256, 1, 32)) == [heads * 128 * 2 * 256 for heads in (3, 4, 5)]


def test_hybrids_keep_a_state_in_place_of_a_cache() -> None:
    meta = model("qwen3next", block_count=8, full_attention_interval=4, embedding_length=2048,
                 attention__head_count=16, attention__head_count_kv=2, attention__key_length=256,
                 attention__value_length=256, ssm__conv_kernel=4, ssm__inner_size=4096, ssm__state_size=128,
                 ssm__group_count=16)  # fmt: skip
    layers = footprint.cache_layers(meta, Engine(4096, 2, 32))
    state = 2 * 4 * (3 * (4096 + 2 * 16 * 128) + 128 * 4096)
    assert layers == [state, state, state, state + 2 * 4096 * 2 * 512 * 2] * 2


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ({"wkv__head_size": 64, "token_shift_count": 2}, 64 * 64 + 2 * 64),
        ({"shortconv__l_cache": 3}, 2 * 64),
        ({"ssm__conv_kernel": 4, "ssm__inner_size": 128, "ssm__state_size": 16}, 3 * 128 + 16 * 128),
    ],
    ids=["RWKV", "LFM2", "Mamba"],
)
def test_a_recurrent_state_has_the_size_of_its_kind(values: dict[str, object], numbers: int) -> None:
    meta = model("other", block_count=3, embedding_length=64, attention__head_count=0, **values)
    assert footprint.cache_layers(meta, Engine(8192, 2, 32)) == [2 * 4 * numbers] * 3


def test_layers_may_share_a_cache_and_have_shorter_keys_in_windows() -> None:
    meta = model("gemma4", block_count=4, attention__head_count=2, attention__key_length=512,
                 attention__value_length=512, attention__key_length_swa=256, attention__value_length_swa=256,
                 attention__sliding_window=200, attention__sliding_window_pattern=[True, True, False, True],
                 attention__shared_kv_layers=1, embedding_length=64)  # fmt: skip
    window, whole = 2 * 512 * 2 * 256, 2 * 1024 * 2 * 4096
    assert footprint.cache_layers(meta, Engine(4096, 1, 32)) == [window, window, whole, 0]


def test_encoders_keep_nothing() -> None:
    meta = model("bert", block_count=12, attention__head_count=12, embedding_length=384, attention__causal=False)
    assert cache(meta) == 0


@pytest.mark.parametrize(("context", "cells"), [(1, 256), (256, 256), (257, 512), (1000, 1024)])
def test_every_slot_is_rounded_up(context: int, cells: int) -> None:
    assert cache(LLAMA_31_8B, Engine(context, 3, 32)) == 3 * cells * 128 * KIB


TENSORS = (
    Tensor("token_embd.weight", "F16", 0, 100),
    Tensor("blk.0.attn_q.weight", "F16", 0, 10),
    Tensor("blk.1.attn_q.weight", "F16", 0, 20),
    Tensor("blk.1.ffn_up.weight", "F16", 0, 30),
    Tensor("output_norm.weight", "F32", 0, 1),
)


def test_an_output_that_is_the_embeddings_is_there_again() -> None:
    tied = footprint.weights(TENSORS, 2)
    assert (tied.blocks, tied.input, tied.output) == ((10, 50), 100, 101)
    own = footprint.weights((*TENSORS, Tensor("output.weight", "F16", 0, 200)), 2)
    assert (own.input, own.output) == (100, 201)


@pytest.mark.parametrize(("gpu_layers", "weights"), [(-1, 161), (99, 161), (3, 161), (2, 151 + 100), (1, 101 + 100)])
def test_a_gpu_holds_the_last_layers(gpu_layers: int, weights: int) -> None:
    """The output counts as a layer; the embeddings stay in main memory; what is left there comes over at times."""
    meta = model("llama", block_count=2, embedding_length=64, attention__head_count=2, vocab_size=100)
    engine = Engine(256, 1, 32)
    layers = 2 if gpu_layers < 0 else min(2, gpu_layers - 1)
    rest = footprint.compute(meta, engine) + footprint.GPU_PROCESS + layers * 256 * 128 * 2
    assert footprint.on_gpu(meta, footprint.weights(TENSORS, 2), engine, gpu_layers) - rest == weights


def test_what_is_not_told_counts_as_much_as_it_may() -> None:
    """Ollama keeps arrays to itself: heads by layer, and the vocabulary."""
    unknown = model("llama", block_count=32, embedding_length=4096, attention__head_count=32,
                    attention__head_count_kv=None, feed_forward_length=14336)  # fmt: skip
    assert cache(unknown) == 4 * cache(LLAMA_31_8B)
    nothing = model("openelm", block_count=28, embedding_length=2048, attention__key_length=64)
    assert cache(nothing) == 28 * 8192 * 2 * 2048 * 2
    mamba = model("mamba", block_count=28, embedding_length=2048, attention__head_count=0)
    assert cache(mamba) == 0, "none is told, not untold"
    assert footprint.compute(unknown, ONE) > footprint.compute(LLAMA_31_8B, ONE)


def test_the_compute_buffer_is_no_less_than_the_published_one() -> None:
    """llama.cpp prints `CUDA0 compute buffer size = 258.50 MiB` for Llama 3.1 8B with batches of 512."""
    assert 258.5 * MIB < footprint.compute(LLAMA_31_8B, ONE) < 2 * 258.5 * MIB
