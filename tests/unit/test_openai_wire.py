"""Reading OpenAI's chat streams and error bodies: pure, whatever the bytes and wherever they are cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import (
    ContextLengthExceeded,
    HeadraceError,
    ProviderDeclined,
    ProviderError,
    ProviderRateLimited,
    ProviderRefused,
    ProviderUnavailable,
)
from processors.generation.providers.base import Choices, Done, Finish, Piece, Text
from processors.generation.providers.chat_stream import ChatStream
from processors.generation.providers.endpoint import parse_base_url
from processors.generation.providers.refusals import from_answer
from processors.generation.providers.sse import EventStream, GarbageError
from schemas.events import Usage


def event(delta: dict[str, object] | None = None, **choice: object) -> bytes:
    body = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "system_fingerprint": "fp"}
    body["choices"] = [{"index": 0, "delta": delta or {}, "finish_reason": None, **choice}]
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10,'
    b'"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
STREAM = b"".join(
    (
        event({"role": "assistant", "content": ""}),
        event({"content": "Grüße"}),
        b": a comment\r\n\r\n",
        event({"content": " 🌊\n"}).replace(b"\n\n", b"\r\n\r\n"),
        event({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}]}),
        event({"content": "end"}, finish_reason="stop"),
        USAGE,
        DONE,
    )
)


def read(*chunks: bytes, choices: int = 1) -> list[Piece]:
    stream = ChatStream("provider 'p'", choices)
    pieces = []
    for chunk in chunks:
        pieces += stream.feed(chunk)
        if stream.failure is not None:
            raise stream.failure
    return pieces


def test_a_whole_stream_gives_text_tools_finish_and_usage() -> None:
    pieces = read(STREAM)
    assert pieces[:2] == [Text(0, "Grüße"), Text(0, " 🌊\n")]
    assert isinstance(pieces[2], Choices)
    assert json.loads(pieces[2].json)[0]["delta"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{"}
    assert pieces[3:] == [
        Text(0, "end"),
        Finish(0, "stop"),
        Done(Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=4, reasoning_tokens=2), "fp"),
    ]


def test_the_pieces_do_not_depend_on_where_the_bytes_are_cut() -> None:
    whole = read(STREAM)
    for cut in range(len(STREAM) + 1):
        assert read(STREAM[:cut], STREAM[cut:]) == whole, cut
    assert read(*(STREAM[at : at + 1] for at in range(len(STREAM)))) == whole


def test_several_events_in_one_chunk_come_as_one_batch() -> None:
    assert ChatStream("p").feed(event({"content": "a"}) * 50) == [Text(0, "a")] * 50


@pytest.mark.parametrize(
    "extra",
    [
        {"logprobs": {"content": [{"token": "a", "logprob": -0.1}]}},
        {"delta": {"reasoning_content": "hm"}},
        {"delta": {"refusal": "no"}},
        {"delta": {"content": "a", "audio": {"id": "x"}}},
        {"something_new": {"a": 1}},
    ],
)
def test_what_is_more_than_text_keeps_the_providers_own_json(extra: dict[str, object]) -> None:
    choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": None, **extra}
    raw = json.dumps(choice).encode()
    (piece,) = read(b'data: {"choices":[' + raw + b"]}\n\n")
    assert piece == Choices(b"[" + raw + b"]", 1)


def test_a_finish_beside_more_than_text_is_taken_out_of_the_kept_json() -> None:
    pieces = read(event({"refusal": "no"}, finish_reason="content_filter"))
    assert isinstance(pieces[0], Choices)
    assert json.loads(pieces[0].json)[0]["finish_reason"] is None
    assert pieces[1:] == [Finish(0, "content_filter")]


def test_empty_and_null_extras_are_plain_text() -> None:
    chunk = event({"content": "a", "tool_calls": [], "reasoning_content": None}, logprobs=None, token_ids=None)
    assert read(chunk) == [Text(0, "a")]
    assert read(event({"role": "assistant", "content": ""})) == []


def test_choices_are_told_apart_and_must_all_finish() -> None:
    both = event({"content": "a"}) + event({"content": "b"}, index=1) + event(index=1, finish_reason="length")
    assert read(both, choices=2) == [Text(0, "a"), Text(1, "b"), Finish(1, "length")]
    with pytest.raises(ProviderError, match="1 of 2 choices not finished"):
        read(both, DONE, choices=2)


@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        (b"data: {\n\n", "not a chat stream"),
        (b'data: {"choices":[{"delta":{"content":"\xff\xfe"}}]}\n\n', "not a chat stream"),
        (b"\x00\x01\x02\x03\n\n", "not a line of an event stream"),
        (b"<html>502</html>\n", "not a line of an event stream"),
        (b"data: 7\n\n", "not a chat stream"),
        (b"data: {}\n\n", "neither choices nor usage"),
        (b'data: {"choices":[{"delta":{"content":7}}]}\n\n', "content is not a string"),
        (b'data: {"choices":[{"delta":[1]}]}\n\n', "a delta is not an object"),
        (b'data: {"choices":[{"index":-1,"delta":{}}]}\n\n', "choice -1 of 1"),
        (b'data: {"choices":[{"index":1,"delta":{"content":"a"}}]}\n\n', "choice 1 of 1"),
        (b'data: {"choices":[],"usage":{"prompt_tokens":-1}}\n\n', "not a chat stream"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "not a chat stream"),
        (event(finish_reason="abort"), "'abort'"),
        (event({"content": "a"}) + DONE, "1 of 1 choices not finished"),
        (event(finish_reason="stop") + DONE + event({"content": "a"}), r"follows \[DONE\]"),
    ],
)
def test_what_is_no_chat_stream_is_an_error(chunk: bytes, text: str) -> None:
    with pytest.raises(ProviderError, match=text):
        read(chunk)


def test_what_came_before_a_fault_in_the_same_chunk_is_given_out() -> None:
    stream = ChatStream("p")
    assert stream.feed(event({"content": "a"}) + b"data: {broken\n\n") == [Text(0, "a")]
    assert isinstance(stream.failure, ProviderError)


def test_a_line_without_end_is_bounded() -> None:
    events = EventStream(limit=1000)
    with pytest.raises(GarbageError, match="longer than 1000 bytes"):
        for _ in range(20):
            events.feed(b"x" * 100)
    with pytest.raises(GarbageError, match="longer than 1000 bytes"):
        EventStream(limit=1000).feed((b"data: " + b"x" * 90 + b"\n") * 20)


def test_data_lines_of_one_event_are_joined() -> None:
    assert EventStream().feed(b"event: m\ndata: a\ndata:b\nid: 1\n\ndata: c\n") == [b"a\nb"]


def test_an_error_event_fails_the_stream_with_the_providers_words() -> None:
    error = b'data: {"error":{"message":"CUDA out of memory","type":"server_error","code":500}}\n\n'
    with pytest.raises(ProviderError, match="CUDA out of memory"):
        read(event({"content": "a"}), error)


def test_a_refusal_as_the_first_event_is_a_refusal() -> None:
    error = b'data: {"error":{"message":"too long","type":"exceed_context_size_error","code":400}}\n\n'
    with pytest.raises(ContextLengthExceeded):
        read(error)
    with pytest.raises(ProviderError) as late:
        read(event({"content": "a"}), error)
    assert late.value.status == 502


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=8), st.integers(0, len(STREAM)))
def test_any_bytes_give_pieces_or_a_provider_error(chunks: list[bytes], start: int) -> None:
    stream = ChatStream("p")
    try:
        for chunk in (STREAM[:start], *chunks):
            stream.feed(chunk)
            if stream.failure is not None:
                raise stream.failure
    except HeadraceError as error:
        assert error.status in (400, 429, 502, 503)


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        (400, b'{"error":{"message":"bad top_p","type":"x","param":"top_p"}}', ProviderRefused, "bad top_p"),
        (422, b'{"detail":[{"loc":["body"],"msg":"no"}]}', ProviderRefused, "no"),
        (400, b'{"object":"error","message":"top_k must be -1","param":"top_k"}', ProviderRefused, "top_k must"),
        (400, b'{"error":{"message":"x","code":"context_length_exceeded"}}', ContextLengthExceeded, "x"),
        (
            400,
            b'{"error":{"message":"This model\'s maximum context length is 8 tokens."}}',
            ContextLengthExceeded,
            "8 tokens",
        ),
        (401, b'{"error":{"message":"Incorrect API key provided: sk-secret"}}', ProviderError, "check the provider's"),
        (404, b'{"error":"model not found"}', ProviderDeclined, "backend_tag"),
        (429, b"slow down", ProviderRateLimited, "slow down"),
        (503, b"{}", ProviderUnavailable, "takes no requests now"),
        (529, b'{"error":{"message":"Overloaded"}}', ProviderUnavailable, "Overloaded"),
        (500, b"\xff\xfe", ProviderError, "HTTP 500"),
        (301, b"", ProviderError, "https://new/v1"),
    ],
)
def test_a_refusal_means_the_same_in_every_servers_words(
    status: int, body: bytes, kind: type[HeadraceError], text: str
) -> None:
    error = from_answer("provider 'p'", status, {b"location": b"https://new/v1", b"retry-after": b"7"}, body)
    assert type(error) is kind
    assert text in error.message
    assert "sk-secret" not in error.message
    if status == 429:
        assert error.retry_after_s == 7


def test_the_providers_param_is_named() -> None:
    error = from_answer("p", 400, {}, b'{"error":{"message":"bad","param":"top_p"}}')
    assert error.param == "top_p"


def test_base_urls() -> None:
    endpoint = parse_base_url("https://api.example.com/v1/")
    assert (endpoint.tls, endpoint.port, endpoint.path, endpoint.host_header) == (True, 443, "/v1", "api.example.com")
    assert parse_base_url("http://[::1]:8000/v1").host_header == "[::1]:8000"
    assert parse_base_url("unix:///run/s.sock").socket == "/run/s.sock"
    for wrong in ("localhost:8000", "ftp://x/v1", "unix://x/y", "http://u:p@h/v1"):
        with pytest.raises(ValueError, match=r"base URL|absolute"):
            parse_base_url(wrong)
