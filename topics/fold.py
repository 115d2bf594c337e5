"""The whole answer out of its pieces: OpenAI's `choices`, as they grow. For who writes frames, and for who reads them.

Pieces are folded as OpenAI's clients do: strings are joined, tool calls are joined by their index.
"""

from __future__ import annotations

from typing import Any

import msgspec

from schemas.events import NOTHING
from topics.frames import Delta, Kind


class _Choice:
    """One choice, in the making."""

    __slots__ = ("finish", "logprobs", "message", "parts")

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.message: dict[str, Any] = {}
        self.logprobs: dict[str, list[Any]] = {}
        self.finish: str | None = None

    def merge(self, delta: dict[str, Any]) -> None:
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
        content = "".join(self.parts)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or "tool_calls" not in self.message else None,
            "refusal": None,
            **self.message,
        }
        logprobs = {"content": None, "refusal": None, **self.logprobs} if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


class Fold:
    """An answer so far."""

    __slots__ = ("_choices", "plain")

    def __init__(self) -> None:
        self.plain = True
        """Whether all of it is text (no tool calls, logprobs, reasoning, refusals)."""
        self._choices: dict[int, _Choice] = {}

    def __bool__(self) -> bool:
        """Whether anything was generated."""
        return bool(self._choices)

    def text(self, index: int, text: str) -> None:
        """Add a piece of the content of choice `index`."""
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choice(index)
        choice.parts.append(text)

    def finish(self, index: int, reason: str) -> None:
        """Choice `index` ended."""
        self._choice(index).finish = reason

    def raw(self, json: bytes | str) -> None:
        """Add a JSON array of OpenAI stream choices."""
        self.plain = False
        for found in msgspec.json.decode(json):
            choice = self._choice(found.get("index", 0))
            choice.merge(found.get("delta") or {})
            choice.finish = found.get("finish_reason") or choice.finish
            for name, values in (found.get("logprobs") or {}).items():
                if values:
                    choice.logprobs.setdefault(name, []).extend(values)

    def delta(self, delta: Delta) -> None:
        """Add what a frame tells."""
        if delta.kind == Kind.TEXT:
            self.text(delta.index, delta.data)
        elif delta.kind == Kind.FINISH:
            self.finish(delta.index, delta.data)
        elif delta.kind == Kind.CHOICES:
            self.raw(delta.data)

    def _choice(self, index: int) -> _Choice:
        return self._choices.setdefault(index, _Choice())

    @property
    def finished(self) -> int:
        """Choices that have their finish reason."""
        return sum(choice.finish is not None for choice in self._choices.values())

    def content(self) -> str:
        """The text of the first choice so far."""
        choice = self._choices.get(0)
        return "".join(choice.parts) if choice is not None else ""

    def only_text(self) -> str:
        """The text, where there is a single choice and nothing else in it; else empty."""
        return self.content() if self.plain and self._choices.keys() == {0} else ""

    def choices(self) -> msgspec.Raw:
        """The answer so far as OpenAI's non-streamed `choices`; `NOTHING` when there is none."""
        if not self._choices:
            return NOTHING
        return msgspec.Raw(msgspec.json.encode([c.as_openai(i) for i, c in sorted(self._choices.items())]))
