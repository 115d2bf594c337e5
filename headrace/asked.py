"""What a chat body asks of a model: the few fields that routing needs, read once, the rest left as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from schemas.control import JSON, TASKS, TOOLS, VISION

BYTES_PER_TOKEN = 4
"""For estimates only: English text has about four bytes a token."""
IMAGE_TOKENS = 1_024
"""For estimates only: what common vision models make of one picture."""


class _Format(msgspec.Struct):
    type: str = "text"


class _Part(msgspec.Struct):
    type: str = ""
    text: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class Asked(msgspec.Struct):
    """A chat body, as far as routing looks into it."""

    model: str
    messages: msgspec.Raw
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: list[msgspec.Raw] | None = None
    response_format: _Format | None = None
    n: msgspec.Raw = msgspec.Raw()
    logprobs: msgspec.Raw = msgspec.Raw()
    tool_choice: msgspec.Raw = msgspec.Raw()
    reasoning_effort: msgspec.Raw = msgspec.Raw()
    """These undecoded: what is wrong in them is for others to refuse."""

    @property
    def limit(self) -> int | None:
        """The cap on the completion that the caller names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def prompt_tokens(self) -> int:
        """An estimate of the prompt's tokens, by its bytes."""
        return max(1, len(bytes(self.messages)) // BYTES_PER_TOKEN)


class Needs(msgspec.Struct, frozen=True):
    """What a model must have to take a request."""

    capabilities: frozenset[str]
    prompt_tokens: int
    """An estimate."""
    limit: int | None
    """The caller's cap on the completion."""


_asked = msgspec.json.Decoder(Asked)
_messages = msgspec.json.Decoder(list[_Message])


def read(body: bytes) -> Asked:
    """The fields of a chat body. Raises `msgspec.MsgspecError` when it is none."""
    return _asked.decode(body)


def needs(asked: Asked) -> Needs:
    """What a model must have: for the task, if the caller leaves the choice to us, and for what the body holds."""
    wanted = {TASKS[asked.model]} if asked.model in TASKS else set()
    if asked.tools:
        wanted.add(TOOLS)
    if asked.response_format is not None and asked.response_format.type != "text":
        wanted.add(JSON)
    images, text_bytes = _pictures(bytes(asked.messages))
    if images:
        wanted.add(VISION)
        return Needs(frozenset(wanted), images * IMAGE_TOKENS + text_bytes // BYTES_PER_TOKEN, asked.limit)
    return Needs(frozenset(wanted), asked.prompt_tokens, asked.limit)


def images_of(body: Mapping[str, Any]) -> int:
    """How many image parts the messages of a chat body hold; what is no shape of OpenAI's holds none."""
    messages = body.get("messages")
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)] if messages else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    return sum(str(part.get("type", "")).startswith("image") for part in parts)


def _pictures(messages: bytes) -> tuple[int, int]:
    """How many image parts there are, and the bytes of the text beside them; (0, 0) without one."""
    if b'"image' not in messages:  # as for nearly all: they need not be decoded
        return 0, 0
    try:
        decoded = _messages.decode(messages)
    except msgspec.MsgspecError:
        return 0, 0  # no shape of OpenAI's; the provider says so
    images = text_bytes = 0
    for message in decoded:
        parts = message.content if isinstance(message.content, list) else [_Part("text", message.content or "")]
        images += sum(part.type.startswith("image") for part in parts)
        text_bytes += sum(len(part.text) for part in parts)
    return images, text_bytes
