"""Bodies as they are refused or taken, and answers as OpenAI's clients read them. Pure."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from headrace.chat_body import check_context, parse
from headrace.errors import ContextLengthExceeded, HeadraceError, UnsupportedParameter
from headrace.openai_objects import completion, error_object
from ingress.openai.following import whole_deltas
from ingress.openai.render import ChunkRenderer
from schemas.control import Model
from schemas.events import ErrorInfo, Status, Terminal, Usage
from topics.frames import Delta, Kind

RID = "0" * 32


def chat(**fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode()


@pytest.mark.parametrize(
    ("raw", "param", "says"),
    [
        (b"\xff", None, "not UTF-8: byte 0"),
        (b"{", None, "not valid JSON"),
        (chat(n="1"), "n", "valid integer"),
        (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content", "valid string"),
        (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "required"),
        (chat(tool_choice={"type": "function", "function": {}}), "tool_choice.function.name", "required"),
        (chat(messages=[{"role": "tool", "content": "x"}]), "messages[0]", "needs tool_call_id"),
        (chat(logit_bias={"5": 500}), "logit_bias", "less than or equal"),
        (chat(metadata={"a": 1}), "metadata", "valid string"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(raw: bytes, param: str | None, says: str) -> None:
    with pytest.raises(HeadraceError) as refused:
        parse(raw)
    assert refused.value.status == 400
    assert says in refused.value.message
    assert refused.value.param is None if param is None else str(refused.value.param).startswith(param)


def test_what_is_not_honoured_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        parse(chat(best_of=2))
    assert refused.value.param == "best_of"


def test_a_byte_bound_refuses_only_what_cannot_fit() -> None:
    model = Model("m", "p", "t", context_length=10)
    check_context(parse(chat(messages=[{"role": "user", "content": "é" * 640}]))[0], model)
    with pytest.raises(ContextLengthExceeded):
        check_context(parse(chat(messages=[{"role": "user", "content": "é" * 704}]))[0], model)
    parts = [{"type": "text", "text": "x" * 704}, {"type": "text", "text": "x" * 704}]
    with pytest.raises(ContextLengthExceeded):
        check_context(parse(chat(messages=[{"role": "user", "content": parts}]))[0], model)


def events(raw: bytes) -> list[tuple[str | None, Any]]:
    """(id, data) of each event."""
    found = []
    for block in raw.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("id"), lines["data"] if lines["data"] == "[DONE]" else json.loads(lines["data"])))
    return found


def delta(seq: int, kind: Kind = Kind.TEXT, data: str = "hi", index: int = 0) -> Delta:
    return Delta(bytes.fromhex(RID), 1, seq, kind, index, data)


def test_a_stream_opens_each_choice_with_its_role_once() -> None:
    renderer = ChunkRenderer("chatcmpl-x", 5, 'm"é', include_usage=False)
    [role, text] = events(renderer.delta(delta(1, data='say "é"\n')))
    assert role[0] is None and role[1]["choices"][0]["delta"]["role"] == "assistant"
    assert text[0] == "1:1"
    assert (text[1]["model"], text[1]["choices"][0]["delta"]) == ('m"é', {"content": 'say "é"\n'})
    assert "usage" not in text[1]
    assert len(events(renderer.delta(delta(2)))) == 1
    assert len(events(renderer.delta(delta(3, index=1)))) == 2
    [finish] = events(renderer.delta(delta(4, Kind.FINISH, "stop")))
    assert (finish[1]["choices"][0]["delta"], finish[1]["choices"][0]["finish_reason"]) == ({}, "stop")
    raw = '[{"index":0,"delta":{"tool_calls":[]},"finish_reason":null}]'
    [[_, passed]] = events(renderer.delta(delta(5, Kind.CHOICES, raw)))
    assert passed["choices"] == json.loads(raw)


def test_a_resumed_stream_does_not_open_its_choices_again() -> None:
    renderer = ChunkRenderer("chatcmpl-x", 5, "m", include_usage=False)
    renderer.opened({0})
    assert len(events(renderer.delta(delta(8)))) == 1


def terminal(**fields: object) -> Terminal:
    return Terminal(RID, "t", 1, 1, Status.COMPLETED, usage=Usage(3, 4), **fields)  # type: ignore[arg-type]


def test_the_end_has_usage_when_it_was_asked_for() -> None:
    plain = ChunkRenderer("chatcmpl-x", 5, "m", include_usage=False)
    assert events(plain.end(terminal())) == [(None, "[DONE]")]
    told = ChunkRenderer("chatcmpl-x", 5, "m", include_usage=True)
    assert events(told.delta(delta(1)))[0][1]["usage"] is None
    [(_, usage), (_, done)] = events(told.end(terminal()))
    assert (usage["choices"], usage["usage"]["total_tokens"], done) == ([], 7, "[DONE]")


def test_an_error_ends_a_stream_without_done() -> None:
    error = ErrorInfo(502, "provider_error", "it died")
    renderer = ChunkRenderer("chatcmpl-x", 5, "m", include_usage=True)
    assert events(renderer.end(terminal(error=error))) == [(None, error_object(error))]


def test_a_whole_answer_can_be_streamed_later() -> None:
    choices = [
        {"index": 0, "message": {"role": "assistant", "content": "a", "refusal": None}, "logprobs": None,
         "finish_reason": "stop"},
        {"index": 1, "message": {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}, "logprobs": None,
         "finish_reason": "tool_calls"},
    ]  # fmt: skip
    done = terminal(choices=msgspec.Raw(json.dumps(choices).encode()), last_seq=9)
    deltas = whole_deltas(done)
    shown = [json.loads(one.data)[0] for one in deltas]
    ids = [one for one, _ in events(b"".join(map(ChunkRenderer("x", 5, "m", include_usage=False).delta, deltas)))]
    assert ids == [None, None, None, "1:9"], "whoever resumes after the one id has had everything"
    assert [(one["index"], one["delta"], one["finish_reason"]) for one in shown] == [
        (0, {"content": "a"}, "stop"),
        (1, {"tool_calls": [{"id": "c"}]}, "tool_calls"),
    ]
    whole = json.loads(completion("chatcmpl-x", 5, "m", done))
    assert (whole["object"], whole["choices"]) == ("chat.completion", choices)
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
