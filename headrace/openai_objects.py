"""Answers as OpenAI's API writes them, by whichever way they are given: completions, usage and errors. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from schemas.events import ErrorInfo, Terminal, Usage

_json = msgspec.json.Encoder()


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI writes it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def error_object(error: ErrorInfo) -> dict[str, Any]:
    """The error object of OpenAI's API."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def completion(public_id: str, created: int, model: str, terminal: Terminal) -> bytes:
    """The body of a non-streamed answer."""
    return _json.encode(
        {
            "id": public_id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": terminal.choices if terminal.choices else [],
            "usage": usage_object(terminal.usage),
            "system_fingerprint": terminal.system_fingerprint,
        }
    )
