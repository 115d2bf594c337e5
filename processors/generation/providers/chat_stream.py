"""From the events of an OpenAI chat stream to pieces. Pure: bytes in, pieces out.

Most events hold one delta of text; they are decoded into a struct of the few needed fields, and whatever does not fit
that struct is decoded again, slowly, and kept as the provider wrote it.
"""

from __future__ import annotations

from typing import Annotated, cast

import msgspec

from headrace.errors import HeadraceError, ProviderError
from processors.generation.providers.base import Choices, Done, Finish, Piece, Text
from processors.generation.providers.refusals import fault_of, from_fault
from processors.generation.providers.sse import EventStream, GarbageError
from schemas.events import Usage

Count = Annotated[int, msgspec.Meta(ge=0)]

REASONS = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "function_call": "tool_calls",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "model_length": "length",
}
"""Finish reasons of known servers, in OpenAI's words; any other is an engine's failure (`abort`, `error`)."""

_ENGINE_FIELDS = {"index", "delta", "finish_reason", "stop_reason", "matched_stop"}
"""Fields of a choice that are read here, or that only repeat the finish reason in an engine's own words."""


class _Delta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    content: str | None = None
    role: str | None = None
    tool_calls: None = None
    function_call: None = None
    refusal: None = None
    reasoning_content: None = None
    reasoning: None = None


class _Choice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    delta: _Delta
    index: Count = 0
    finish_reason: str | None = None
    logprobs: None = None
    stop_reason: int | str | None = None
    matched_stop: int | str | None = None
    token_ids: None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: Count | None = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: Count | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    system_fingerprint: str | None = None
    error: msgspec.Raw = msgspec.Raw()


class _SlowChunk(msgspec.Struct, gc=False):
    choices: list[msgspec.Raw] | None = None
    usage: _Usage | None = None
    system_fingerprint: str | None = None
    error: msgspec.Raw = msgspec.Raw()


_fast = msgspec.json.Decoder(_Chunk).decode
_slow = msgspec.json.Decoder(_SlowChunk).decode


class ChatStream:
    """Reads one answer of `choices` choices; `where` names the provider in errors."""

    __slots__ = ("_choices", "_events", "_fingerprint", "_finished", "_given", "_usage", "_where", "done", "failure")

    def __init__(self, where: str, choices: int = 1) -> None:
        self._where = where
        self._choices = choices
        self._events = EventStream()
        self._finished: set[int] = set()
        self._fingerprint: str | None = None
        self._usage: Usage | None = None
        self._given = False
        self.done = False
        self.failure: HeadraceError | None = None
        """What is wrong with the bytes after the pieces that `feed` returned last; nothing may be fed any more."""

    def feed(self, data: bytes) -> list[Piece]:
        """Pieces of the events that `data` completes. Raises `ProviderError`, or a refusal sent as the first event.

        Pieces before the fault are still given out: the fault is then in `failure`.
        """
        pieces: list[Piece] = []
        try:
            self._events_of(data, pieces)
        except HeadraceError as problem:
            if not pieces:
                raise
            self.failure = problem
        if pieces:
            self._given = True
        return pieces

    def _events_of(self, data: bytes, pieces: list[Piece]) -> None:
        try:
            for payload in self._events.feed(data):
                if self.done:
                    raise GarbageError("an event follows [DONE]")
                self._event(payload, pieces)
        except (GarbageError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
            raise self._error(f"sent what is not a chat stream: {problem}") from problem

    def truncated(self) -> ProviderError:
        """The error for a stream that ended here, before its `[DONE]`."""
        return self._error("ended its stream in the middle of the answer: its engine probably died")

    def _event(self, payload: bytes, pieces: list[Piece]) -> None:
        try:
            chunk = _fast(payload)
        except msgspec.DecodeError:
            if payload.strip() == b"[DONE]":
                self._end(pieces)
            else:
                self._slow_event(payload, pieces)
            return
        choices = chunk.choices
        if choices is None or chunk.usage is not None or chunk.error:
            self._rest(chunk)
            choices = choices or ()  # type: ignore[assignment]
        if chunk.system_fingerprint is not None:
            self._fingerprint = chunk.system_fingerprint
        for choice in choices:  # type: ignore[union-attr]
            index = choice.index
            if index >= self._choices:
                raise GarbageError(f"choice {index} of {self._choices}")
            if choice.delta.content:
                pieces.append(Text(index, choice.delta.content))
            if choice.finish_reason is not None:
                self._finish(index, choice.finish_reason, pieces)

    def _slow_event(self, payload: bytes, pieces: list[Piece]) -> None:
        chunk = _slow(payload)
        self._rest(chunk)
        self._fingerprint = chunk.system_fingerprint or self._fingerprint
        for raw in chunk.choices or ():
            self._slow_choice(bytes(raw), pieces)

    def _slow_choice(self, raw: bytes, pieces: list[Piece]) -> None:
        choice = msgspec.json.decode(raw, type=dict[str, object])
        index, delta, reason = choice.get("index", 0), choice.get("delta"), choice.get("finish_reason")
        if not isinstance(index, int) or not 0 <= index < self._choices:
            raise GarbageError(f"choice {index!r} of {self._choices}")
        if delta is not None and not isinstance(delta, dict):
            raise GarbageError("a delta is not an object")
        if reason is not None and not isinstance(reason, str):
            raise GarbageError("a finish reason is not a string")
        delta = cast(dict[str, object], delta or {})
        content = delta.get("content")
        if content is not None and not isinstance(content, str):
            raise GarbageError("a delta's content is not a string")
        extra = [key for key, value in delta.items() if key not in ("role", "content") and _says(value)]
        extra += [key for key, value in choice.items() if key not in _ENGINE_FIELDS and _says(value)]
        if extra:
            if reason is not None:
                raw = msgspec.json.encode({**choice, "finish_reason": None})
            pieces.append(Choices(b"[" + raw + b"]", _tokens(choice, delta)))
        elif content:
            pieces.append(Text(index, content))
        if reason is not None:
            self._finish(index, reason, pieces)

    def _rest(self, chunk: _Chunk | _SlowChunk) -> None:
        """Usage, an error, or nothing that belongs to a chat stream."""
        if bytes(chunk.error) not in (b"", b"null"):
            raise self._fault(msgspec.json.decode(chunk.error))
        if chunk.usage is not None:
            self._usage = _usage(chunk.usage)
        elif chunk.choices is None:
            raise GarbageError("an event has neither choices nor usage")

    def _finish(self, index: int, reason: str, pieces: list[Piece]) -> None:
        known = REASONS.get(reason)
        if known is None:
            raise self._error(f"ended the answer for a reason of its own: {reason[:80]!r}")
        if index not in self._finished:
            self._finished.add(index)
            pieces.append(Finish(index, known))

    def _end(self, pieces: list[Piece]) -> None:
        if len(self._finished) < self._choices:
            missing = self._choices - len(self._finished)
            raise self._error(f"ended its stream with {missing} of {self._choices} choices not finished")
        self.done = True
        pieces.append(Done(self._usage, self._fingerprint))

    def _fault(self, decoded: object) -> HeadraceError:
        fault = fault_of(decoded)
        if not self._given and fault.status is not None:
            return from_fault(self._where, fault.status, fault)
        return self._error(f"failed in the middle of the answer: {fault.message}")

    def _error(self, text: str) -> ProviderError:
        return ProviderError(f"{self._where} {text}")


def _says(value: object) -> bool:
    """Whether a field holds something: null and empty containers are how servers write nothing."""
    return value is not None and value != [] and value != {}


def _tokens(choice: dict[str, object], delta: dict[str, object]) -> int:
    """Tokens of a delta that is not plain text: exact where it carries log probabilities, else 1 if it has content."""
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict) and isinstance(content := logprobs.get("content"), list):
        return len(content)
    return int(any(_says(value) and value != "" for key, value in delta.items() if key != "role"))


def _usage(given: _Usage) -> Usage:
    prompt, completion = given.prompt_tokens_details, given.completion_tokens_details
    return Usage(
        prompt_tokens=given.prompt_tokens,
        completion_tokens=given.completion_tokens,
        cached_tokens=(prompt.cached_tokens or 0) if prompt else 0,
        reasoning_tokens=(completion.reasoning_tokens or 0) if completion else 0,
    )
