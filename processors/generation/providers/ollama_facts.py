"""What an Ollama server tells of a model, and how much memory it will take there. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from ollama import ShowResponse

from headrace import units
from processors.generation.providers import footprint
from processors.generation.providers.base import ModelFacts, template_digest
from processors.generation.providers.footprint import Engine, Metadata

BATCH_TOKENS = 512
"""Ollama's `num_batch`, which our requests leave as it is."""
CAPABILITIES = {
    "completion": "chat",
    "tools": "tools",
    "vision": "vision",
    "thinking": "thinking",
    "embedding": "embeddings",
}


def facts(shown: ShowResponse, weight_bytes: int, context: int, parallel: int) -> ModelFacts:
    """What is known of a model of `weight_bytes` on disk that is loaded with `context` tokens, `parallel` times."""
    values: Mapping[str, object] = shown.modelinfo or {}
    meta = Metadata(values)
    parameters = values.get("general.parameter_count")
    template = bool(shown.template)
    told = shown.capabilities
    able = ("chat",) * template if told is None else tuple(CAPABILITIES[one] for one in told if one in CAPABILITIES)
    return ModelFacts(
        architecture=meta.architecture,
        parameters=parameters if isinstance(parameters, int) else 0,
        quantisation=(shown.details.quantization_level if shown.details else None) or "",
        context_length=meta.number("context_length"),
        layers=meta.layers,
        chat_template=template,
        template_digest=template_digest(shown.template or ""),
        capabilities=able,
        weight_bytes=weight_bytes,
        bytes=footprint.on_server(meta, weight_bytes, Engine(context, parallel, BATCH_TOKENS)),
        load_ms=footprint.load_ms(weight_bytes),
    )


def download(status: str, done: int, total: int) -> str:
    """How far a download is, for people, out of a line of the server's progress."""
    if not total:
        return status
    return f"downloading: {100 * done // total} % of {units.size(total)}"
