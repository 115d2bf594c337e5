"""Attention over the slots of a key-value cache, for batches whose rows are tokens.

The model is given a batch of T rows of one token each, `(T, 1)`: prompts and answers of any length and number in one
forward pass without padding. All layers but attention treat every token alike; attention finds here which tokens
belong together. That adapters are chosen by row, as peft does, then means: by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from processors.generation.providers.hf.batching import Span

NAME = "headrace_slots"
"""Under which transformers knows this attention."""


class Unsupported(Exception):
    """The model's attention is of a kind that is not computed here."""


class SlotAttention:
    """Keys and values of `slots` sequences of `context` tokens each, in each layer; and the attention over them."""

    def __init__(self, slots: int, context: int) -> None:
        self._slots = slots
        self._context = context
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._spans: Sequence[Span] = ()
        self._row_slots = torch.empty(0)
        self._row_positions = torch.empty(0)

    def begin(self, spans: Sequence[Span], device: torch.device) -> torch.Tensor:
        """The rows of the next forward pass are these spans, one after the other. Returns their positions, `(T, 1)`."""
        self._spans = spans
        slots = [span.slot for span in spans for _ in range(span.size)]
        positions = [position for span in spans for position in range(span.start, span.end)]
        self._row_slots = torch.tensor(slots, device=device)
        self._row_positions = torch.tensor(positions, device=device)
        return self._row_positions[:, None]

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """Attention of one layer: query `(T, heads, 1, d)`, key and value `(T, kv heads, 1, d)`, to `(T, 1, heads, d)`.

        Raises `Unsupported` for attention with soft-capped scores or sinks.
        """
        if softcap is not None or s_aux is not None:
            raise Unsupported("its attention has soft-capped scores or sinks")
        keys, values = self._cache(int(module.layer_idx), key, value)
        keys[self._row_slots, :, self._row_positions] = key[:, :, 0]
        values[self._row_slots, :, self._row_positions] = value[:, :, 0]
        parts, row = [], 0
        grouped = query.shape[1] != keys.shape[1]
        for span in self._spans:
            begin = 0 if sliding_window is None else max(0, span.start - sliding_window + 1)
            part = scaled_dot_product_attention(
                query[row : row + span.size, :, 0].transpose(0, 1)[None],
                keys[span.slot, :, begin : span.end][None],
                values[span.slot, :, begin : span.end][None],
                attn_mask=_mask(span, begin, sliding_window, query.device),
                is_causal=span.size > 1 and span.start == 0 and sliding_window is None,
                scale=scaling,
                enable_gqa=grouped,
            )
            parts.append(part[0].transpose(0, 1))
            row += span.size
        return torch.cat(parts)[:, None], None

    def bytes_of_token(self) -> int:
        """Bytes of keys and values of one token in all layers, once a forward pass has shown them."""
        return sum(
            cache.shape[1] * cache.shape[3] * cache.element_size() for pair in self._layers.values() for cache in pair
        )

    def _cache(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._layers.get(layer)
        if found is None:
            # The system gives memory to pages that are written; a slot costs what its longest sequence needed.
            shapes = [(self._slots, made.shape[1], self._context, made.shape[3]) for made in (key, value)]
            found = key.new_empty(shapes[0]), value.new_empty(shapes[1])
            self._layers[layer] = found
        return found


def _mask(span: Span, begin: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which keys, from position `begin` on, each token of a span sees; None where all, or `is_causal`, says it."""
    if span.size == 1 or (span.start == 0 and window is None):
        return None
    queries = torch.arange(span.start, span.end, device=device)[:, None]
    keys = torch.arange(begin, span.end, device=device)[None, :]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
