"""What direct publishers read on `replies.<app>`: chunks, where they asked for them, and one result a request. Pure.

Records may come twice, byte for byte. A chunk counts when its `hr-seq` is above all that came before for its request,
and the first result of a request ends it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from headrace.openai_objects import completion, error_object
from schemas.events import ErrorInfo, Status, Terminal
from schemas.ids import PublicId
from topics.frames import Delta, Kind

RESULT_TYPE = "headrace.inference.result.v1"
CHUNK_TYPE = "headrace.inference.chunk.v1"
SOURCE = "/headrace/answers"

_json = msgspec.json.Encoder()


class Answer(NamedTuple):
    """A record of `replies.<app>`; its key is the request id."""

    request_id: str
    value: bytes
    headers: list[tuple[str, bytes]]


def result(terminal: Terminal) -> Answer:
    """The one result: OpenAI's `chat.completion`, or its error object."""
    accepted_ms = terminal.timings.accepted_ms
    public = PublicId(terminal.request_id, terminal.reply_partition, accepted_ms)
    if terminal.error is not None:
        value = _json.encode(error_object(terminal.error))
    else:
        value = completion(str(public), accepted_ms // 1000, terminal.model, terminal)
    http_status = terminal.error.status if terminal.error is not None else 200
    answer = _result(terminal.request_id, value, terminal.status, http_status, terminal.timings.finished_ms)
    if terminal.error is not None and terminal.error.retry_after_s is not None:
        answer.headers.append(("hr-retry-after", str(terminal.error.retry_after_s).encode()))
    return answer


def refusal(request_id: str, error: ErrorInfo, now_ms: int) -> Answer:
    """The result of a message that made no request, and so has no terminal."""
    return _result(request_id, _json.encode(error_object(error)), Status.REJECTED, error.status, now_ms)


def _result(request_id: str, value: bytes, status: Status, http_status: int, at_ms: int) -> Answer:
    stamp = datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    told = {"ce_time": stamp, "hr-status": status.value, "hr-http-status": str(http_status)}
    return Answer(request_id, value, _headers(request_id, RESULT_TYPE, f"{request_id}:result", told))


def _headers(request_id: str, kind: str, event_id: str, told: dict[str, str]) -> list[tuple[str, bytes]]:
    common = {
        "ce_specversion": "1.0",
        "ce_id": event_id,
        "ce_type": kind,
        "ce_source": SOURCE,
        "content-type": "application/json",
        "hr-request-id": request_id,
    }
    return [(name, value.encode()) for name, value in (common | told).items()]


class Chunks:
    """Makes OpenAI's `chat.completion.chunk` objects of one request's deltas, one each."""

    __slots__ = ("_begun", "_common", "_request_id")

    def __init__(self, public: PublicId, model: str) -> None:
        self._request_id = public.request_id
        self._common = {
            "id": str(public),
            "object": "chat.completion.chunk",
            "created": public.created_ms // 1000,
            "model": model,
        }
        self._begun: set[int] = set()
        """Choices whose first chunk, which names the role, is made."""

    def of(self, delta: Delta) -> Answer:
        """The chunk of a TEXT, CHOICES or FINISH delta."""
        choices: list[dict[str, Any]]
        if delta.kind == Kind.CHOICES:
            choices = msgspec.json.decode(delta.data)
        elif delta.kind == Kind.TEXT:
            choices = [_choice(delta.index, {"content": delta.data}, None)]
        else:
            choices = [_choice(delta.index, {}, delta.data)]
        for choice in choices:
            if (index := choice.get("index", 0)) not in self._begun:
                self._begun.add(index)
                choice["delta"] = {"role": "assistant"} | choice.get("delta", {})
        event_id = f"{self._request_id}:{delta.attempt}:{delta.seq}"
        told = {"hr-attempt": str(delta.attempt), "hr-seq": str(delta.seq)}
        value = _json.encode(self._common | {"choices": choices})
        return Answer(self._request_id, value, _headers(self._request_id, CHUNK_TYPE, event_id, told))


def _choice(index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
