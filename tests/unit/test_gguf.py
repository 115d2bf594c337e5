"""The reader of GGUF headers: what it reads, and that nothing but `NotGGUF` comes of a broken file."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ProviderError
from processors.generation.providers import llama_facts, llama_models
from processors.generation.providers.gguf import Header, NotGGUF, Tensor, read_header
from tests.support.gguf_files import F32, Q4_0, gguf, pair, text

METADATA = {
    "general.architecture": "llama",
    "general.file_type": 2,
    "llama.block_count": 2,
    "llama.attention.head_count_kv": [4, 2],
    "llama.rope.freq_base": 10000.0,
    "llama.attention.causal": True,
    "tokenizer.ggml.tokens": ["a", "b", "ü"],
    "tokenizer.ggml.scores": [0.5] * 5000,
    "tokenizer.chat_template": "{{ messages }}",
}
TENSORS = {"token_embd.weight": ((64, 3), F32), "blk.0.attn_q.weight": ((64, 64), Q4_0)}
GOOD = gguf(METADATA, TENSORS)


def header_of(path: Path, data: bytes) -> Header:
    path.write_bytes(data)
    return read_header(path)


def test_it_reads_values_short_arrays_and_tensors(tmp_path: Path) -> None:
    header = header_of(tmp_path / "m.gguf", GOOD)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.attention.head_count_kv"] == (4, 2)
    assert header.metadata["llama.rope.freq_base"] == 10000.0
    assert header.metadata["llama.attention.causal"] is True
    assert header.metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert header.lengths["tokenizer.ggml.tokens"] == 3
    assert header.lengths["tokenizer.ggml.scores"] == 5000
    assert "tokenizer.ggml.scores" not in header.metadata, "a long array is not kept"
    assert header.tensors == (
        Tensor("token_embd.weight", "F32", 192, 768),
        Tensor("blk.0.attn_q.weight", "Q4_0", 4096, 4096 // 32 * 18),
    )


def test_the_bundled_model_is_read_to_its_last_byte() -> None:
    path = llama_models.resolve("SmolLM2-135M-Instruct", None)
    header = read_header(path)
    assert len(header.tensors) == 272
    assert sum(tensor.elements for tensor in header.tensors) == 134_515_008, "SmolLM2-135M's published parameters"
    assert header.lengths["tokenizer.ggml.tokens"] == 49_152
    last = path.stat().st_size - sum(tensor.bytes for tensor in header.tensors)
    assert 0 < last < 2_000_000, "what is no tensor is the header"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "does not begin"),
        (b"GGU", "does not begin"),
        (b"PK\x03\x04" + bytes(100), "does not begin"),
        (b"GGUF" + bytes(2), "ends within its header"),
        (gguf(METADATA, TENSORS, version=1), "version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "values"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "ends within its header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 99), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair("general.alignment", 0), "alignment"),
        (GOOD[:200], "ends within its header"),
        (GOOD[:-1000], "cut short"),
    ],
)
def test_what_is_no_model_says_why(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(NotGGUF, match=why):
        header_of(tmp_path / "m.gguf", data)


@given(cut=st.integers(0, len(GOOD) - 1))
@settings(max_examples=200, deadline=None)
def test_every_cut_is_noticed(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    with pytest.raises(NotGGUF):
        header_of(tmp_path_factory.getbasetemp() / "cut.gguf", GOOD[:cut])


@given(at=st.integers(4, 500), noise=st.binary(min_size=1, max_size=16))
@settings(max_examples=300, deadline=None)
def test_noise_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes) -> None:
    data = GOOD[:at] + noise + GOOD[at + len(noise) :]
    try:
        header_of(tmp_path_factory.getbasetemp() / "noise.gguf", data)
    except NotGGUF as problem:
        assert str(problem)


def test_a_tensor_of_a_new_type_takes_the_bytes_up_to_the_next(tmp_path: Path) -> None:
    data = GOOD.replace(struct.pack("<QQIQ", 64, 3, F32, 0), struct.pack("<QQIQ", 64, 3, 77, 0))
    assert header_of(tmp_path / "m.gguf", data).tensors[0] == Tensor("token_embd.weight", "type 77", 192, 768)


def split(directory: Path, number: int) -> Path:
    path = directory / f"big-{number:05}-of-00002.gguf"
    metadata = {**METADATA, "split.no": number - 1, "split.count": 2}
    path.write_bytes(gguf(metadata, {f"blk.{number - 1}.attn_q.weight": ((64, 64), F32)}))
    return path


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    first, second = split(tmp_path, 1), split(tmp_path, 2)
    assert llama_models.in_directory(tmp_path) == {"big": first}
    assert llama_models.resolve("big", tmp_path) == first
    assert [tensor.bytes for tensor in llama_facts.read(first).tensors] == [16384, 16384]
    second.unlink()
    with pytest.raises(ProviderError, match=r"big-00002-of-00002\.gguf cannot be read: No such file"):
        llama_facts.read(first)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(GOOD[:-1000])
    with pytest.raises(ProviderError, match=r"half\.gguf.*cut short"):
        llama_facts.read(path)
