"""Where providers say that their models lie, and what they make of what a server or a file tells."""

from __future__ import annotations

from pathlib import Path

import pytest
from ollama import ShowResponse

from processors.generation.providers import child_server, footprint, llama_facts, llama_models, ollama_facts
from processors.generation.providers.base import RAM
from processors.generation.providers.factory import make_provider
from processors.generation.providers.footprint import MIB, Engine
from processors.generation.providers.llama_cpp import LlamaCpp, Options
from schemas import control
from tests.support.gguf_files import F32, write

GPU = "GPU-9f3c0e52-0f1b-4c60-a2a4-5cf2b6b4a1d7"
ENGINE_WITH_GPU = """
from enum import Enum
Kind = Enum("Kind", {"GGML_BACKEND_DEVICE_TYPE_CPU": 0, "GGML_BACKEND_DEVICE_TYPE_GPU": 1})
def get_device_info():
    return [{"name": "CUDA0", "type": Kind(1)}, {"name": "CPU", "type": Kind(0)}]
"""
LLAMA = {
    "general.architecture": "llama",
    "general.parameter_count": 8_030_261_312,
    "llama.block_count": 32,
    "llama.context_length": 131_072,
    "llama.embedding_length": 4096,
    "llama.feed_forward_length": 14_336,
    "llama.vocab_size": 128_256,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "tokenizer.ggml.tokens": None,
}
SHOWN = ShowResponse.model_validate(
    {
        "model_info": LLAMA,
        "template": "{{ .Prompt }}",
        "details": {"quantization_level": "Q4_K_M"},
        "capabilities": ["completion", "tools", "insert"],
    }
)


@pytest.fixture
def gpu_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was built for a GPU and finds one."""
    (tmp_path / "xllamacpp.py").write_text(ENGINE_WITH_GPU)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("gpu_engine")
async def test_an_engine_with_a_gpu_puts_models_there_unless_told_otherwise() -> None:
    assert await LlamaCpp("p").device_kind([GPU]) == "gpu"
    assert await LlamaCpp("p").device_kind([]) == "ram", "the worker sees none that could be leased"
    assert await LlamaCpp("p", Options(gpu_layers=0)).device_kind([GPU]) == "ram"


@pytest.mark.usefixtures("gpu_engine")
async def test_the_expected_memory_is_that_of_the_device() -> None:
    model = control.Model(id="m", provider="p", backend_tag="SmolLM2-135M-Instruct", context_length=1024)
    there = await LlamaCpp("p").inspect(model)
    here = await LlamaCpp("p", Options(gpu_layers=0)).inspect(model)
    assert there.bytes > footprint.GPU_PROCESS + 4 * 1024 * 23_040 + there.weight_bytes
    assert here.bytes < there.bytes


@pytest.mark.parametrize(
    ("device", "own", "seen"),
    [
        ("", {}, None),
        ("", {"CUDA_VISIBLE_DEVICES": "1"}, "1"),
        (RAM, {"CUDA_VISIBLE_DEVICES": "1"}, "-1"),
        (GPU, {"CUDA_VISIBLE_DEVICES": "1"}, GPU),
    ],
)
def test_a_child_sees_the_granted_device_alone(device: str, own: dict[str, str], seen: str | None) -> None:
    assert child_server.environment(own, device).get("CUDA_VISIBLE_DEVICES") == seen


async def test_ollama_has_memory_of_its_own_where_that_is_said() -> None:
    record = control.Provider(name="o", kind="ollama", options={"memory_bytes": 24_000_000_000, "parallel": 4})
    provider = make_provider(record)
    assert await provider.device_kind([GPU]) == "own"
    other = make_provider(control.Provider(name="o", kind="ollama"))
    assert await other.device_kind([GPU]) == "none"
    for one in (provider, other):
        await one.close()


def test_what_ollama_shows_is_read() -> None:
    facts = ollama_facts.facts(SHOWN, 4_920_753_328, context=8192, parallel=2)
    assert facts.architecture == "llama"
    assert (facts.parameters, facts.layers, facts.context_length) == (8_030_261_312, 32, 131_072)
    assert facts.quantisation == "Q4_K_M"
    assert facts.capabilities == ("chat", "tools")
    assert facts.load_ms == 500 + 4920
    cache = 2 * 8192 * 128 * 1024
    assert 258 * MIB < facts.bytes - facts.weight_bytes - cache < 1024 * MIB, "the buffers and the GPU's context"
    one = ollama_facts.facts(SHOWN, 4_920_753_328, context=8192, parallel=1)
    assert facts.bytes - one.bytes > cache // 2


def test_an_older_ochild_server_tells_no_capabilities() -> None:
    old = ShowResponse.model_validate({"model_info": LLAMA, "template": "{{ .Prompt }}"})
    assert ollama_facts.facts(old, 1, 256, 1).capabilities == ("chat",)
    assert ollama_facts.facts(ShowResponse.model_validate({"model_info": None}), 1, 256, 1).capabilities == ()


@pytest.mark.parametrize(
    ("metadata", "options", "capabilities"),
    [
        ({}, {}, ()),
        ({}, {"own_template": True}, ("chat",)),
        ({"tokenizer.chat_template": "{{ messages }}"}, {}, ("chat",)),
        ({"tokenizer.chat_template": "{{ tools }}"}, {"embeddings": True}, ("chat", "tools", "embeddings")),
        (
            {"tokenizer.chat_template": "{{ tools }}", "x.attention.causal": False},
            {"embeddings": True},
            ("embeddings",),
        ),
    ],
)
def test_capabilities_come_from_template_and_options(
    tmp_path: Path, metadata: dict[str, str | bool], options: dict[str, bool], capabilities: tuple[str, ...]
) -> None:
    tensors = {"token_embd.weight": ((64, 3), F32)}
    path = write(tmp_path / "m.gguf", {"general.architecture": "x", "x.block_count": 1, **metadata}, tensors)
    facts = llama_facts.facts(llama_facts.read(path), Engine(256, 1, 32), gpu_layers=0, **options)
    assert facts.capabilities == capabilities
    assert facts.quantisation == "F32", "without a name of its own, the type of most bytes"
    assert llama_models.shards(path) == [path]
