"""Checks of a chat body that every engine-side provider makes: nothing is ignored in silence. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.errors import UnsupportedParameter
from schemas.control import Model

OURS = frozenset({"model", "messages", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens"})
"""Fields that Headrace itself acts on."""

NOTES = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields that describe a request and change nothing of its answer; an engine does not get them."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "logprobs": (False,),
    "tools": ([],),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
}
"""Values that ask for what happens anyway, so that a provider without the feature may drop them."""


SEEDS = 2**32 - 1
"""Seeds are folded below this; llama.cpp takes -1 and 2**32 - 1 for "random"."""


def refuse(name: str, by: str, why: str = "") -> UnsupportedParameter:
    """The error for a field that an engine does not honour."""
    return UnsupportedParameter(f"{name} is not supported by {by}{f': {why}' if why else ''}", param=name)


def select(body: Mapping[str, object], honoured: frozenset[str], by: str) -> dict[str, object]:
    """The fields of `body` that the engine honours and that say something.

    Raises `UnsupportedParameter` with the name of the first field that would otherwise be ignored.
    """
    chosen: dict[str, object] = {}
    for name, value in body.items():
        if value is None or name in OURS or name in NOTES:
            continue
        if name in honoured:
            chosen[name] = value
        elif value not in _NEUTRAL.get(name, ()):
            raise refuse(name, by)
    return chosen


def max_tokens(body: Mapping[str, object]) -> int | None:
    """The cap on the completion, by its new or its old name."""
    limit = body.get("max_completion_tokens")
    limit = body.get("max_tokens") if limit is None else limit
    return limit if isinstance(limit, int) else None


def for_choice(prepared: Mapping[str, object], index: int) -> dict[str, object]:
    """The body of choice `index`: the same, from another seed where one is given."""
    seed = prepared.get("seed")
    return {**prepared, "seed": (seed + index) % SEEDS} if isinstance(seed, int) else dict(prepared)


def only_text(messages: object, model: Model) -> None:
    """Refuse images and audio, for engines that are given no projector. Raises `UnsupportedParameter`."""
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "refusal"):
                raise UnsupportedParameter(f"model {model.id!r} reads text only, not {kind!r}", param="messages")


def wants_tools(body: Mapping[str, object]) -> bool:
    """Whether tools are offered to the model."""
    return bool(body.get("tools")) and body.get("tool_choice") != "none"
