"""Models of real sizes, and what one of them takes on a 24 GB card: bytes, load time, speed.

Parameters are those of the model cards. The rest is derived, so that it is the same kind of number for all:

- weights: 4.89 bits a parameter, what Q4_K_M comes to for Llama 3.1 8B (llama.cpp, tools/quantize: 4.58 GiB).
- bytes on the device: 1.2 x weights + 0.5 GiB. The fifth is for the KV cache (for Llama 3.1 8B at 128 KiB a token about
  7,500 tokens), the rest for compute buffers and the CUDA context. Our rule; GPUStack reckons 1.2 x weights + 2 GiB.
- load: weights / 3.5 GB/s, the sequential read rate of an NVMe drive on PCIe 3.0 x4 by its data sheet (Samsung 970 EVO
  Plus), + 1 s to start the process, make the CUDA context and warm up. Our assumption.
- decode: 0.6 x 936 GB/s / weights, as each token reads all active weights once; 936 GB/s is the memory bandwidth of an
  RTX 3090 by its data sheet. 0.6 of it is what is left for each of up to 4 streams. For 8B: 115 tokens/s.
- prefill: 3,500 tokens/s for 8B, what llama.cpp#7860 measured for a Llama 8B on an RTX 3090 (pp2048, Q6_K), and in
  inverse proportion to the active parameters, as prefill is bound by arithmetic.
"""

from __future__ import annotations

from bench.scheduler.workload import ModelSpec

BITS_PER_PARAMETER = 4.89
KV_SHARE = 0.2
OVERHEAD_BYTES = 512 * 1024**2
NVME_BYTES_S = 3.5e9
START_S = 1.0
BANDWIDTH_BYTES_S = 936e9
BANDWIDTH_SHARE = 0.6
PREFILL_8B_TOKENS_S = 3_500.0
SLOTS = 4

CARD_BYTES = 23 * 1024**3
"""Of a 24 GB card, what models may take."""

BILLIONS: dict[str, float] = {
    "llama-3.1-8b": 8.03,
    "qwen2.5-14b": 14.8,
    "gemma-2-9b": 9.24,
    "mistral-7b": 7.25,
    "qwen2.5-7b": 7.62,
    "qwen2.5-32b": 32.8,
    "llama-3.2-3b": 3.21,
    "phi-4-14b": 14.7,
    "mistral-small-24b": 23.6,
    "qwen2.5-coder-7b": 7.62,
    "gemma-2-27b": 27.2,
    "llama-3.2-1b": 1.24,
    "mistral-nemo-12b": 12.2,
    "deepseek-r1-qwen-14b": 14.8,
    "qwen2.5-coder-32b": 32.8,
    "gemma-2-2b": 2.61,
    "phi-3.5-mini": 3.82,
    "deepseek-r1-llama-8b": 8.03,
    "qwen2.5-3b": 3.09,
    "codellama-13b": 13.0,
    "starcoder2-15b": 16.0,
    "qwen2.5-1.5b": 1.54,
    "llama-2-13b": 13.0,
    "deepseek-r1-qwen-32b": 32.8,
    "starcoder2-7b": 7.17,
    "codegemma-7b": 8.54,
    "qwen2.5-coder-14b": 14.8,
    "starcoder2-3b": 3.03,
    "qwen2.5-0.5b": 0.49,
    "deepseek-r1-qwen-7b": 7.62,
}
"""Model -> parameters in billions, the more popular ones first: our order, for the skewed workloads."""


def model(name: str) -> ModelSpec:
    """A model of the catalogue with all that follows from its size."""
    billions = BILLIONS[name]
    weights = billions * 1e9 * BITS_PER_PARAMETER / 8
    return ModelSpec(
        id=name,
        bytes=round(weights * (1 + KV_SHARE)) + OVERHEAD_BYTES,
        load_s=round(weights / NVME_BYTES_S + START_S, 2),
        prefill_tokens_s=round(PREFILL_8B_TOKENS_S * BILLIONS["llama-3.1-8b"] / billions),
        decode_tokens_s=round(BANDWIDTH_SHARE * BANDWIDTH_BYTES_S / weights, 1),
        max_concurrency=SLOTS,
    )


def most_popular(number: int) -> list[ModelSpec]:
    """The first models of the catalogue."""
    return [model(name) for name in list(BILLIONS)[:number]]
