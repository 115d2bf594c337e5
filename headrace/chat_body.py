"""The body of a chat request, checked whole, whichever way it came: each field known and within its range. Pure."""

from __future__ import annotations

import msgspec
from pydantic import ValidationError

from headrace.asked import Asked, read
from headrace.errors import ContextLengthExceeded, HeadraceError, InvalidRequest, UnsupportedParameter
from schemas.control import Model
from schemas.openai import ChatCompletionRequest

MAX_TOKEN_BYTES = 128
"""No common tokenizer has a longer token, so a text of n bytes is at least n / 128 tokens."""
TIERS = {"flex": "batch", "priority": "interactive"}
"""OpenAI's `service_tier` -> priority; its other values mean the standard one."""


def parse(raw: bytes) -> tuple[ChatCompletionRequest, Asked]:
    """The request in a body, whole and as the router reads it.

    Raises `InvalidRequest` or `UnsupportedParameter`, naming the field.
    """
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8: byte {error.start} is invalid.") from None
    try:
        body = ChatCompletionRequest.model_validate_json(raw)
        # The parsers behind Kafka are stricter (NaN, for one): what they refuse is refused at once.
        asked = read(raw)
    except ValidationError as error:
        raise _explain(error) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    return body, asked


def _explain(error: ValidationError) -> HeadraceError:
    problems = error.errors(include_url=False, include_context=False)
    # A union complains once a branch: the branch that got furthest is the one that the caller meant.
    first = _path(problems[0]["loc"])
    meant = [found for found in problems if _path(found["loc"]).startswith(first)]
    problem = max(
        meant,
        key=lambda found: (
            len(_path(found["loc"]).replace("[", ".").split(".")),
            not (found["type"] == "string_type" and isinstance(found["input"], list)),
        ),
    )
    path = _path(problem["loc"])
    if problem["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {problem['msg']}.")
    if problem["type"] == "extra_forbidden":
        return UnsupportedParameter(f"The parameter {path!r} is not supported; leave it out.", param=path)
    if problem["type"] == "missing":
        return InvalidRequest(f"The parameter {path!r} is required.", param=path)
    message = problem["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{path}: {message}." if path else f"{message}.", param=path or None)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` for ("messages", 0, "content"); names of union branches are left out."""
    parts = ""
    for part in location:
        if isinstance(part, int):
            parts += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in ("str", "list", "function-after", "literal"):
            parts += f".{part}" if parts else part
    return parts


def check_context(body: ChatCompletionRequest, model: Model) -> None:
    """Refuse what a byte bound proves to be too long. The worker counts exactly. Raises `ContextLengthExceeded`."""
    size = 0
    for message in body.messages:
        if isinstance(message.content, str):
            size += len(message.content.encode())
        elif message.content is not None:
            size += sum(len(part.text.encode()) for part in message.content)
    if size // MAX_TOKEN_BYTES > model.context_length:
        raise ContextLengthExceeded(
            f"The prompt of {size} bytes cannot fit the model's context of {model.context_length} tokens; shorten it.",
            param="messages",
        )
