"""What the engine of the `transformers` provider makes of an OpenAI chat body. Pure.

| parameter | this engine |
|---|---|
| temperature, top_p, stop, seed, presence_penalty, frequency_penalty, logit_bias | honoured |
| top_k, min_p | honoured (not OpenAI's, but common) |
| logprobs, top_logprobs | honoured, as the model gives them, before any other parameter changes them |
| response_format | `json_object` and `json_schema` honoured by grammar |
| max_tokens, max_completion_tokens | honoured; a full context ends the answer with `length` |
| n | `n` generations are merged, up to max_concurrency |
| tools, tool_choice | refused by name: how a model writes a call differs from template to template |
| images, audio | refused by name |
| anything else | refused by name |

What a body does not say is taken from the model's own generation_config, if that samples, else as OpenAI has it.
"""

from __future__ import annotations

from collections.abc import Mapping

from processors.generation.providers import parameters
from schemas.control import Model

BY = "the transformers engine"
SUPPORTED = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "seed",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "response_format",
        "presence_penalty",
        "frequency_penalty",
    }
)


def prepare(model: Model, body: Mapping[str, object]) -> dict[str, object]:
    """The body for one choice. Raises `UnsupportedParameter` for what the engine would ignore."""
    if parameters.wants_tools(body):
        raise parameters.refuse("tools", BY)
    kept = {name: value for name, value in body.items() if name != "tools"}
    chosen = parameters.select(kept, SUPPORTED, BY)
    if isinstance(seed := chosen.get("seed"), int):
        chosen["seed"] = seed % parameters.SEEDS
    parameters.only_text(body.get("messages"), model)
    if (limit := parameters.max_tokens(body)) is not None:
        chosen["max_tokens"] = limit
    chosen["messages"] = body.get("messages")
    return chosen
