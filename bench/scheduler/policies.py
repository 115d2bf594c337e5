"""The policies by name, and one run of one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.scheduler.engine import Engine, Policy
from bench.scheduler.figures import Figures, figures
from bench.scheduler.headrace import Headrace
from bench.scheduler.llama_swap import LlamaSwap
from bench.scheduler.lru import Lru
from bench.scheduler.ollama import Ollama
from bench.scheduler.workload import Workload

POLICIES: dict[str, Callable[[Engine], Policy]] = {
    "headrace": Headrace,
    "headrace-untold": partial(Headrace, told=False),
    "ollama": Ollama,
    "ollama-fast-path": partial(Ollama, fast_path=True),
    "llama-swap": LlamaSwap,
    "lru": Lru,
}


def simulate(workload: Workload, policy: str, *, seed: int = 0, load_jitter: float = 0.0) -> Figures:
    """Run a workload under a policy; the same arguments give the same figures."""
    engine = Engine(workload, POLICIES[policy], seed=seed, load_jitter=load_jitter)
    engine.run()
    return figures(engine, policy, seed)
