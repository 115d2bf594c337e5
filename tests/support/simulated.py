"""Models as simulations of the scheduler know them."""

from __future__ import annotations

from bench.scheduler.workload import ModelSpec


def model(name: str, size: int = 10, load_s: float = 2.0, slots: int = 2) -> ModelSpec:
    """One that reads 1,000 tokens of a prompt a second, and writes 100 in each of its slots."""
    return ModelSpec(name, size, load_s, prefill_tokens_s=1000, decode_tokens_s=100, max_concurrency=slots)
