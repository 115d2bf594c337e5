"""The answer that grows as pieces arrive: frames on the one side, the whole choices for the log on the other."""

from __future__ import annotations

from typing import Any

import msgspec

from processors.generation.providers.base import Choices, Done, Finish, Piece, Text
from schemas.events import NOTHING, Usage
from topics import frames


class _Choice:
    """One choice, in the making."""

    __slots__ = ("finish", "logprobs", "message", "parts", "refusal")

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.refusal: list[str] = []
        self.message: dict[str, Any] = {}
        self.logprobs: dict[str, list[Any]] = {}
        self.finish: str | None = None

    def merge(self, delta: dict[str, Any]) -> None:
        """Fold a delta as OpenAI's clients do: strings are joined, tool calls are joined by their index."""
        for name, value in delta.items():
            if value is None or name == "role":
                continue
            if name == "content":
                self.parts.append(value)
            elif name == "tool_calls":
                for call in value:
                    self._merge_call(call)
            elif isinstance(value, str):
                self.message[name] = self.message.get(name, "") + value
            else:
                self.message[name] = value

    def _merge_call(self, call: dict[str, Any]) -> None:
        calls: list[dict[str, Any]] = self.message.setdefault("tool_calls", [])
        index = call.get("index", len(calls))
        while len(calls) <= index:
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        into = calls[index]
        if call.get("id"):
            into["id"] = call["id"]
        if call.get("type"):
            into["type"] = call["type"]
        function = call.get("function") or {}
        into["function"]["name"] += function.get("name") or ""
        into["function"]["arguments"] += function.get("arguments") or ""

    def as_openai(self, index: int) -> dict[str, Any]:
        """The choice as a non-streamed answer shows it."""
        content = "".join(self.parts)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or "tool_calls" not in self.message else None,
            "refusal": None,
            **self.message,
        }
        logprobs = {"content": None, "refusal": None, **self.logprobs} if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


class Answer:
    """Folds a provider's pieces; gives the frames to send for each."""

    __slots__ = ("_choices", "attempt", "done", "rid", "seq", "tokens")

    def __init__(self, request_id: str, attempt: int, first_seq: int) -> None:
        self.rid = bytes.fromhex(request_id)
        self.attempt = attempt
        self.seq = first_seq
        self.tokens = 0
        self.done: Done | None = None
        self._choices: dict[int, _Choice] = {}

    def add(self, piece: Piece) -> frames.Delta | None:
        """Take a piece; returns the frame that tells of it, None for the end."""
        if isinstance(piece, Text):
            choice = self._choices.get(piece.index) or self._choice(piece.index)
            choice.parts.append(piece.text)
            self.tokens += piece.tokens
            return self._delta(frames.Kind.TEXT, piece.index, piece.text, piece.tokens)
        if isinstance(piece, Finish):
            self._choice(piece.index).finish = piece.reason
            return self._delta(frames.Kind.FINISH, piece.index, piece.reason, 0)
        if isinstance(piece, Choices):
            for found in msgspec.json.decode(piece.json):
                choice = self._choice(found.get("index", 0))
                choice.merge(found.get("delta") or {})
                choice.finish = found.get("finish_reason") or choice.finish
                for name, values in (found.get("logprobs") or {}).items():
                    if values:
                        choice.logprobs.setdefault(name, []).extend(values)
            self.tokens += piece.tokens
            return self._delta(frames.Kind.CHOICES, 0, piece.json.decode(), piece.tokens)
        self.done = piece
        return None

    def _choice(self, index: int) -> _Choice:
        return self._choices.setdefault(index, _Choice())

    def _delta(self, kind: frames.Kind, index: int, data: str, tokens: int) -> frames.Delta:
        self.seq += 1
        return frames.Delta(self.rid, self.attempt, self.seq, kind, index, data, tokens)

    @property
    def started(self) -> bool:
        """Whether anything was generated."""
        return bool(self._choices)

    def choices(self) -> msgspec.Raw:
        """The answer so far as OpenAI's `choices`; `NOTHING` when there is none."""
        if not self._choices:
            return NOTHING
        return msgspec.Raw(msgspec.json.encode([c.as_openai(i) for i, c in sorted(self._choices.items())]))

    def usage(self, prompt_tokens: int) -> Usage:
        """What the provider reported; else the pieces counted, and `prompt_tokens`, marked as estimated."""
        if self.done is not None and self.done.usage is not None:
            return self.done.usage
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=self.tokens, estimated=True)
