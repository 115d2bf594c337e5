"""Models of zeros in the architectures that differ in what they keep: small in weights, large in their cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.gguf_files import F32, Q4_0, Shape, Signed, Value, write

WIDE, FEED, HEADS, KV_HEADS, HEAD, LAYERS = 256, 256, 8, 8, 128, 8
TRAINED = 65_536
WINDOW = 512

Metadata = dict[str, Value]
Tensors = dict[str, tuple[Shape, int]]


def vocabulary() -> Metadata:
    """A sentencepiece vocabulary of bytes and nothing else: a prompt has as many tokens as bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [Signed(kind) for kind in (2, 3, 3, *([6] * 256), 1)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def hyper(architecture: str, **values: Value) -> Metadata:
    """Values that every architecture has, and its own."""
    named: Metadata = {
        "block_count": LAYERS,
        "context_length": TRAINED,
        "embedding_length": WIDE,
        "feed_forward_length": FEED,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": HEAD,
        "rope.freq_base": 10000.0,
    } | {name.replace("__", "."): value for name, value in values.items()}
    return {"general.architecture": architecture} | {f"{architecture}.{name}": one for name, one in named.items()}


def blocks(norms: tuple[str, ...], *, kind: int = F32) -> Tensors:
    """Layers of attention and a gated feed-forward, with these norms besides (`name:size`)."""
    made: Tensors = {
        "token_embd.weight": ((WIDE, len(vocabulary()["tokenizer.ggml.tokens"])), F32),  # type: ignore[arg-type]
        "output_norm.weight": ((WIDE,), F32),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "attn_q": (WIDE, HEADS * HEAD),
            "attn_k": (WIDE, KV_HEADS * HEAD),
            "attn_v": (WIDE, KV_HEADS * HEAD),
            "attn_output": (HEADS * HEAD, WIDE),
            "ffn_gate": (WIDE, FEED),
            "ffn_up": (WIDE, FEED),
            "ffn_down": (FEED, WIDE),
        }.items():
            made[f"blk.{layer}.{name}.weight"] = (shape, kind)
        for norm in ("attn_norm", "ffn_norm", *norms):
            name, _, size = norm.partition(":")
            made[f"blk.{layer}.{name}.weight"] = ((int(size or WIDE),), F32)
    return made


def windows(path: Path) -> Path:
    """Gemma 2: every second layer sees 512 tokens."""
    own = hyper("gemma2", attention__sliding_window=WINDOW, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    return write(path, own | vocabulary(), blocks(("post_attention_norm", "post_ffw_norm")))


def most_windows(path: Path) -> Path:
    """Gemma 3: five of six layers see 512 tokens."""
    norms = ("post_attention_norm", "post_ffw_norm", f"attn_q_norm:{HEAD}", f"attn_k_norm:{HEAD}")
    return write(path, hyper("gemma3", attention__sliding_window=WINDOW) | vocabulary(), blocks(norms))


def heads_by_layer(path: Path) -> Path:
    """Deci: layers with 8, 4 and 2 heads of keys and values."""
    counts = [8, 4, 2, 8, 4, 2, 8, 4]
    own = hyper(
        "deci",
        attention__head_count=[HEADS] * LAYERS,
        attention__head_count_kv=counts,
        feed_forward_length=[FEED] * LAYERS,
    )
    tensors = blocks(())
    for layer, count in enumerate(counts):
        for name in ("attn_k", "attn_v"):
            tensors[f"blk.{layer}.{name}.weight"] = ((WIDE, count * HEAD), F32)
    return write(path, own | vocabulary(), tensors)


def repacked(path: Path) -> Path:
    """Q4_0 weights, which the engine lays out anew for the CPU: 8 layers of 32 MiB."""
    own = hyper("llama", feed_forward_length=FEED_WIDE)
    tensors = blocks((), kind=Q4_0)
    for layer in range(LAYERS):
        for name, shape in {"gate": (WIDE, FEED_WIDE), "up": (WIDE, FEED_WIDE), "down": (FEED_WIDE, WIDE)}.items():
            tensors[f"blk.{layer}.ffn_{name}.weight"] = (shape, Q4_0)
    return write(path, own | vocabulary(), tensors)


FEED_WIDE = 65_536
MODELS: dict[str, Callable[[Path], Path]] = {
    "windows": windows,
    "most-windows": most_windows,
    "heads-by-layer": heads_by_layer,
    "repacked": repacked,
}
