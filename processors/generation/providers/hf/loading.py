"""Loads a model folder, or a name in the Hugging Face hub, and checks that this engine computes what the model does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from processors.generation.providers.hf.attention import NAME, SlotAttention, Unsupported
from processors.generation.providers.hf.batching import Span

CLOSE = 0.99
"""Least cosine between this engine's scores and the model's own; rounding in bfloat16 stays above 0.999."""
PROBE_TOKENS = 12
STRETCHED = frozenset({"dynamic", "longrope"})
"""Rotary positions that transformers scales by the length of what it is given, and so by the wrong one here."""


class LoadError(Exception):
    """The model cannot be served here; the text says why and what to do."""


class Loaded:
    """A model that is ready for `(T, 1)` batches."""

    def __init__(self, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.attention: SlotAttention
        self.device: torch.device = model.device
        self.ends = _ends(model, tokenizer)
        """Tokens that end an answer."""
        self._rows: torch.Tensor | None = None
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(self._cut)

    def _cut(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Scores cost as much as a layer or more: only the rows that are asked for get some."""
        return None if self._rows is None else (inputs[0][self._rows], *inputs[1:])

    def scores(self, tokens: list[int], spans: list[Span], rows: list[int]) -> torch.Tensor:
        """Scores `(len(rows), vocabulary)` in float32, on the CPU, of the tokens that follow the given rows."""
        positions = self.attention.begin(spans, self.device)
        self._rows = torch.tensor(rows, dtype=torch.long, device=self.device)
        try:
            ids = torch.tensor(tokens, device=self.device)[:, None]
            with torch.inference_mode():
                made = self.model(input_ids=ids, position_ids=positions, use_cache=False)
            return made.logits[:, 0].float().cpu()
        finally:
            self._rows = None

    def own_scores(self, tokens: list[int]) -> torch.Tensor:
        """What the model itself makes of one sequence: scores `(vocabulary,)` behind its last token."""
        self.model.set_attn_implementation("sdpa")
        try:
            ids = torch.tensor([tokens], device=self.device)
            with torch.inference_mode():
                return self.model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
        finally:
            self.model.set_attn_implementation(NAME)


def load(tag: str, *, context: int, slots: int, device: str | None, dtype: str, chat_template: str) -> Loaded:
    """Load a model. Raises `LoadError`, and what transformers raises."""
    config = AutoConfig.from_pretrained(tag)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and limit < context:
        raise LoadError(f"it holds {limit} tokens, less than its context_length of {context}: lower context_length")
    if stretched := _rope_types(getattr(config.get_text_config(), "rope_parameters", None)) & STRETCHED:
        raise LoadError(f"its positions are of type {stretched.pop()!r}, which hang on the longest request of a batch")
    tokenizer = AutoTokenizer.from_pretrained(tag)
    if chat_template:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise LoadError("it has no chat template: name a file with one in the provider's option chat_template")
    attention = SlotAttention(slots, context)
    AttentionInterface.register(NAME, attention)
    model = AutoModelForCausalLM.from_pretrained(tag, dtype=dtype, attn_implementation="sdpa")
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
    loaded = Loaded(model, tokenizer)
    loaded.attention = attention
    _check(loaded, context)
    return loaded


def _check(loaded: Loaded, context: int) -> None:
    """Compare scores: a model with recurrent layers, or attention of another kind, is found out here, not in use."""
    size = min(PROBE_TOKENS, context)
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    tokens = [(7919 * place + 11) % vocabulary for place in range(size)]
    own = loaded.own_scores(tokens)
    kind = f"models of type {loaded.model.config.model_type!r}"
    try:
        half = size // 2
        loaded.scores(tokens[:half], [Span(0, 0, half)], [half - 1])
        loaded.scores(tokens[half:-1], [Span(0, half, size - 1 - half)], [0])
        ours = loaded.scores(tokens[-1:], [Span(0, size - 1, 1)], [0])[0]
    except (Unsupported, TypeError, RuntimeError, AttributeError, IndexError) as problem:
        raise LoadError(f"{kind} are not served here: {problem}") from problem
    alike = float(torch.nn.functional.cosine_similarity(own, ours, dim=0))
    if not alike >= CLOSE:
        raise LoadError(f"{kind} are not served here: batched, their scores are others (cosine {alike:.3f})")


def _rope_types(parameters: object) -> set[str]:
    """How a model turns positions into angles; a configuration may say it for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return set()
    found = set().union(*(_rope_types(inner) for inner in parameters.values()))
    return found | ({str(parameters["rope_type"])} if "rope_type" in parameters else set())


def _ends(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> frozenset[int]:
    said = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = set(said if isinstance(said, list) else [said]) | {tokenizer.eos_token_id}
    return frozenset(end for end in ends if end is not None)
