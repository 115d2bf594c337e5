"""What the engine's endpoint is asked, and how its answers are written: OpenAI's chat API, streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import msgspec

from processors.generation.providers.hf.answer import Answer, Event
from processors.generation.providers.hf.sampling import Wishes
from processors.generation.providers.hf.text import REPLACEMENT, Decode

Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Ask(msgspec.Struct):
    """A chat request of the worker's provider, which has refused what is not honoured here."""

    messages: list[dict[str, object]]
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    min_p: Fraction | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    logprobs: bool = False
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] = 0
    seed: int | None = None
    stop: str | list[str] = []
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    response_format: dict[str, object] | None = None
    adapter: str = ""

    @property
    def open_ended(self) -> bool:
        """Whether the last message is an answer that has begun."""
        return bool(self.messages) and self.messages[-1].get("role") == "assistant"

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Refusal(Exception):
    """A request that cannot be answered; with an HTTP status, a code and the field at fault."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = msgspec.json.encode({"error": {"code": code, "message": message, "param": param}})


def wishes(ask: Ask, defaults: Mapping[str, object], vocabulary: int) -> Wishes:
    """Sampling parameters: the request's, else the model's own (its generation_config), else OpenAI's defaults.

    Raises `Refusal` for a logit_bias on what is no token.
    """
    bias: dict[int, float] = {}
    for token, value in ask.logit_bias.items():
        if not (token.isascii() and token.isdecimal() and int(token) < vocabulary):
            raise Refusal(400, "invalid_request", f"{token!r} is no token of the model", "logit_bias")
        bias[int(token)] = value
    given = {"temperature": ask.temperature, "top_p": ask.top_p, "top_k": ask.top_k, "min_p": ask.min_p}
    chosen = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    return Wishes(
        **{name: value for name, value in chosen.items() if value is not None},  # type: ignore[arg-type]
        presence_penalty=ask.presence_penalty,
        frequency_penalty=ask.frequency_penalty,
        logit_bias=bias,
    )


def conversation(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Messages as chat templates expect them: contents as one text, and OpenAI's `developer` as the older `system`."""
    return [
        {
            **message,
            "role": "system" if message.get("role") == "developer" else message.get("role"),
            "content": _joined(message.get("content")),
        }
        for message in messages
    ]


def _joined(content: object) -> object:
    if not isinstance(content, list):
        return content
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in content if isinstance(part, Mapping))


class Writer:
    """Writes one answer as server-sent events."""

    def __init__(self, alias: str, request_id: str, now: Callable[[], int], decode: Decode) -> None:
        self._head = {"id": request_id, "object": "chat.completion.chunk", "created": now(), "model": alias}
        self._decode = decode

    def event(self, event: Event) -> bytes:
        """A token's delta; nothing while its text is held back."""
        if event.error is not None:
            return _sse({"error": {"code": 500, "message": event.error}})
        if not event.text and event.likelihood is None:
            return b""
        delta: dict[str, object] = {"index": 0, "delta": {"content": event.text}, "finish_reason": None}
        if event.likelihood is not None:
            said = event.likelihood
            top = [self._told(token, value) for token, value in said.top]
            delta["logprobs"] = {"content": [{**self._told(event.token, said.chosen), "top_logprobs": top}]}
        return _sse({**self._head, "choices": [delta]})

    def end(self, answer: Answer, reason: str) -> bytes:
        """The end of the stream, with usage."""
        usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.length,
        }
        return (
            _sse({**self._head, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
            + _sse({**self._head, "choices": [], "usage": usage})
            + b"data: [DONE]\n\n"
        )

    def _told(self, token: int, logprob: float) -> dict[str, object]:
        text = self._decode([token])
        # A token that is a part of a character has no text of its own, and OpenAI's `bytes` may be null.
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if REPLACEMENT in text else list(text.encode()),
        }


def _sse(payload: Mapping[str, object]) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"
