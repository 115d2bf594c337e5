"""Between OpenAI's chat and Ollama's: bodies one way, stream parts the other. Pure.

| OpenAI | Ollama |
|---|---|
| temperature, top_p, seed, stop, presence_penalty, frequency_penalty, top_k, min_p, repeat_penalty | options |
| max_tokens, max_completion_tokens | options.num_predict, never beyond the context |
| response_format | `format`: "json" or the schema |
| tools | tools; `tool_choice` other than auto and none is refused: Ollama has no such field |
| logprobs, top_logprobs | from server 0.12.11 on; refused before |
| images as data URLs | images of the message; other URLs are refused |
| n | n generations side by side |
| logit_bias, reasoning_effort, anything else | refused by name |
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import msgspec

from headrace.errors import InvalidRequest, UnsupportedParameter
from processors.generation.providers import parameters

BY = "Ollama"
OPTIONS = frozenset(
    {
        "temperature",
        "top_p",
        "seed",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "min_p",
        "repeat_penalty",
    }
)
OTHERS = frozenset({"response_format", "tools", "parallel_tool_calls"})
LOGPROBS = frozenset({"logprobs", "top_logprobs"})
REASONS = {"stop": "stop", "length": "length"}


class Request(msgspec.Struct):
    """A chat as the official client takes it."""

    messages: list[dict[str, object]]
    options: dict[str, object]
    format: Literal["json"] | dict[str, object] | None = None
    tools: list[dict[str, object]] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    bytes: int = 0
    """UTF-8 bytes of everything that the template renders: no prompt has more tokens than bytes."""


def prepare(body: Mapping[str, object], context_length: int, *, has_logprobs: bool) -> Request:
    """The request for one choice, without its `num_predict`. Raises `UnsupportedParameter` or `InvalidRequest`."""
    tools = body.get("tools") if parameters.wants_tools(body) else None
    if tools and body.get("tool_choice") not in (None, "auto"):
        raise parameters.refuse("tool_choice", BY, "a model cannot be made to call a tool")
    kept = {name: value for name, value in body.items() if tools or name != "tools"}
    honoured = OPTIONS | OTHERS | (LOGPROBS if has_logprobs else frozenset())
    chosen = parameters.select(kept, honoured, BY)
    options = {name: value for name, value in chosen.items() if name in OPTIONS}
    if isinstance(stop := options.get("stop"), str):
        options["stop"] = [stop]
    # Always the same, or the server reloads the model.
    options["num_ctx"] = context_length
    given = cast(Sequence[Mapping[str, object]], body.get("messages") or ())
    messages = [message(one) for one in given]
    return Request(
        messages=messages,
        options=options,
        format=_format(chosen.get("response_format")),
        tools=cast(list[dict[str, object]] | None, tools),
        logprobs=cast(bool | None, chosen.get("logprobs")),
        top_logprobs=cast(int | None, chosen.get("top_logprobs")),
        bytes=len(msgspec.json.encode(messages)) + 2 * len(msgspec.json.encode(tools or "")),
    )


def message(given: Mapping[str, object]) -> dict[str, object]:
    """One message in Ollama's shape. Raises `InvalidRequest` or `UnsupportedParameter`."""
    role = given.get("role")
    made: dict[str, object] = {"role": "system" if role == "developer" else role}
    content = given.get("content")
    if isinstance(content, list):
        texts, images = _parts(content)
        made["content"] = "\n".join(texts)
        if images:
            made["images"] = images
    else:
        made["content"] = content or ""
    if calls := given.get("tool_calls"):
        made["tool_calls"] = [_call(call) for call in cast(Sequence[Mapping[str, object]], calls)]
    if name := given.get("name"):
        made["tool_name" if role == "tool" else "name"] = name
    return made


def for_choice(request: Request, index: int) -> Request:
    """The request of choice `index`: the same, from another seed where one is given."""
    seed = request.options.get("seed")
    if index == 0 or not isinstance(seed, int):
        return request
    return msgspec.structs.replace(request, options={**request.options, "seed": seed + index})


def without_first(request: Request) -> Request | None:
    """The request without its first message that is not the system's; None where that is the last one.

    It is the message that Ollama drops first (`chatPrompt` in its `server/prompt.go`), so a prompt that counts the same
    without it has been cut.
    """
    for position, one in enumerate(request.messages[:-1]):
        if one["role"] != "system":
            rest = request.messages[:position] + request.messages[position + 1 :]
            return msgspec.structs.replace(request, messages=rest)
    return None


def delta(
    content: str | None, thinking: str | None, calls: Sequence[Mapping[str, object]], logprobs: object, first_call: int
) -> dict[str, object]:
    """An OpenAI choice of index 0 for a part that holds more than text; `first_call` numbers its first tool call."""
    made: dict[str, object] = {}
    if content:
        made["content"] = content
    if thinking:
        made["reasoning_content"] = thinking
    if calls:
        made["tool_calls"] = [
            {
                "index": first_call + position,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call["name"], "arguments": msgspec.json.encode(call["arguments"]).decode()},
            }
            for position, call in enumerate(calls)
        ]
    choice: dict[str, object] = {"index": 0, "delta": made, "finish_reason": None}
    if logprobs:
        choice["logprobs"] = {"content": logprobs}
    return choice


def same_model(held: str, tag: str) -> bool:
    """Whether two names mean one model; a name without a tag means `latest`."""
    full = [name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest" for name in (held, tag)]
    return full[0] == full[1]


def trained_context(info: Mapping[str, object] | None) -> int | None:
    """Tokens that a model was trained for, out of what the server tells of its file."""
    values = [value for key, value in (info or {}).items() if key.endswith(".context_length")]
    return next((value for value in values if isinstance(value, int)), None)


def _parts(parts: Sequence[object]) -> tuple[list[str], list[str]]:
    texts: list[str] = []
    images: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind == "text":
            texts.append(str(part.get("text") or ""))
        elif isinstance(part, Mapping) and kind == "image_url":
            images.append(_image(part.get("image_url")))
        else:
            raise UnsupportedParameter(f"{BY} reads text and images only, not {kind!r}", param="messages")
    return texts, images


def _image(given: object) -> str:
    url = given.get("url") if isinstance(given, Mapping) else given
    head, comma, data = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:image/"):
        raise UnsupportedParameter(f"{BY} takes images as base64 data URLs only", param="messages")
    return data


def _call(given: Mapping[str, object]) -> dict[str, object]:
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest("a tool call needs a function", param="messages")
    try:
        arguments = msgspec.json.decode(str(function.get("arguments") or "{}"), type=dict[str, object])
    except msgspec.DecodeError as problem:
        raise InvalidRequest(f"a tool call's arguments are not a JSON object: {problem}", param="messages") from problem
    return {"function": {"name": function.get("name"), "arguments": arguments}}


def _format(given: object) -> Literal["json"] | dict[str, object] | None:
    kind = given.get("type") if isinstance(given, Mapping) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return "json"
    if isinstance(given, Mapping) and kind == "json_schema":
        held = given.get("json_schema")
        if isinstance(held, Mapping) and isinstance(held.get("schema"), Mapping):
            return dict(held["schema"])
        raise InvalidRequest("response_format.json_schema needs a schema", param="response_format")
    raise parameters.refuse("response_format", BY, "its type must be text, json_object or json_schema")
