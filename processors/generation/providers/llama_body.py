"""What a llama.cpp engine makes of an OpenAI chat body, as measured with xllamacpp 2026.10. Pure.

| parameter | this engine |
|---|---|
| temperature, top_p, stop, presence_penalty, frequency_penalty | honoured |
| seed | honoured, folded into 32 bits; -1 and 2**32 - 1 would mean "random" and are folded too |
| logit_bias | honoured, by token id |
| logprobs, top_logprobs | honoured, with the engine's token `id` beside OpenAI's fields |
| response_format | `json_object` and `json_schema` honoured by grammar |
| max_tokens, max_completion_tokens | honoured; a full context ends the answer with `length` |
| n | the engine can, but counts the tokens of one choice only: `n` generations are merged here, up to max_concurrency |
| tools, tool_choice | only if the model's template shows tools; else the engine drops them, so refused by name |
| tool_choice by name | the engine reads it as `auto`: sent as `required` with that one tool |
| top_k, min_p, typical_p, repeat_penalty | honoured (not OpenAI's, but common) |
| images, audio | refused by name: no projector is loaded |
| anything else | refused by name |
"""

from __future__ import annotations

from collections.abc import Mapping

from processors.generation.providers import parameters
from schemas.control import Model

BY = "the llama.cpp engine"

SUPPORTED = frozenset(
    {
        "temperature",
        "top_p",
        "stop",
        "seed",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "response_format",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "min_p",
        "typical_p",
        "repeat_penalty",
    }
)
TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
_FORMATS = ("text", "json_object", "json_schema")


def prepare(model: Model, body: Mapping[str, object], *, takes_tools: bool) -> dict[str, object]:
    """The body for one choice. Raises `UnsupportedParameter` for what the engine would ignore."""
    tools = parameters.wants_tools(body)
    if tools and not takes_tools:
        raise parameters.refuse("tools", BY, f"the chat template of model {model.id!r} shows none to it")
    honoured = SUPPORTED | TOOL_FIELDS if tools else SUPPORTED
    kept = {name: value for name, value in body.items() if tools or name != "tools"}
    chosen = parameters.select(kept, honoured, BY)
    if isinstance(choice := chosen.get("tool_choice"), Mapping):
        chosen |= _only_tool(chosen["tools"], choice)
    form = chosen.get("response_format")
    if isinstance(form, Mapping) and form.get("type") not in _FORMATS:
        raise parameters.refuse("response_format", BY, f"its type must be one of {', '.join(_FORMATS)}")
    if isinstance(seed := chosen.get("seed"), int):
        chosen["seed"] = seed % parameters.SEEDS
    parameters.only_text(body.get("messages"), model)
    if (limit := parameters.max_tokens(body)) is not None:
        chosen["max_tokens"] = limit
    chosen["messages"] = body.get("messages")
    # Without events during prefill, the engine notices a closed connection only after it: 9 s later for 1,800 tokens.
    chosen["return_progress"] = True
    return chosen


def _only_tool(tools: object, choice: Mapping[object, object]) -> dict[str, object]:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    for tool in tools if isinstance(tools, list) else []:
        if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping) and tool["function"]["name"] == name:
            return {"tools": [tool], "tool_choice": "required"}
    raise parameters.refuse("tool_choice", BY, f"no tool is named {name!r}")
