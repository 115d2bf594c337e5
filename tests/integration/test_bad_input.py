"""Bad input: a clear answer in OpenAI's shape, with the request's id, and nothing published."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from bench.gateway.spec import Spec
from tests.support.chat import Api, body
from tests.support.kafka import end_offsets
from tests.support.stacks import Stack
from topics.catalogue import MAX_BODY_BYTES, REQUESTS

HELLO = [{"role": "user", "content": "hi"}]


def refused(answer: httpx.Response, status: int, code: str, *, param: str | None = None) -> dict[str, Any]:
    """The error object, after its shape, status, code and parameter were checked."""
    assert answer.status_code == status, answer.text
    assert len(answer.headers["x-request-id"]) == 32
    shown: dict[str, Any] = answer.json()
    assert set(shown) == {"error"} and set(shown["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = shown["error"]
    assert error["message"] and error["type"]
    assert (error["code"], error["param"]) == (code, param)
    return error


def chat(**fields: object) -> dict[str, Any]:
    return {"model": "bench", "messages": HELLO, **fields}


WRONG: list[tuple[str, bytes | dict[str, Any], str, str | None]] = [
    ("empty body", b"", "invalid_request", None),
    ("no JSON", b'{"model": "bench", "messages": [', "invalid_request", None),
    ("trailing garbage", json.dumps(chat()).encode() + b"x", "invalid_request", None),
    ("NaN", b'{"model":"bench","messages":[{"role":"user","content":"x"}],"top_p":NaN}', "invalid_request", "top_p"),
    ("an array", b"[]", "invalid_request", None),
    ("invalid UTF-8", b'{"model":"bench","messages":[{"role":"user","content":"\xff\xfe"}]}', "invalid_request", None),
    ("UTF-16", json.dumps(chat()).encode("utf-16"), "invalid_request", None),
    ("deep nesting", b'{"model":"bench","messages":' + b"[" * 100_000, "invalid_request", None),
    ("no model", {"messages": HELLO}, "invalid_request", "model"),
    ("model of a wrong type", chat(model=5), "invalid_request", "model"),
    ("empty model", chat(model=""), "invalid_request", "model"),
    ("no messages", {"model": "bench"}, "invalid_request", "messages"),
    ("empty messages", chat(messages=[]), "invalid_request", "messages"),
    ("messages as text", chat(messages="hi"), "invalid_request", "messages"),
    ("unknown role", chat(messages=[{"role": "king", "content": "x"}]), "invalid_request", "messages[0].role"),
    ("no content", chat(messages=[{"role": "user"}]), "invalid_request", "messages[0]"),
    ("content null", chat(messages=[{"role": "user", "content": None}]), "invalid_request", "messages[0]"),
    ("tool without id", chat(messages=[{"role": "tool", "content": "x"}]), "invalid_request", "messages[0]"),
    ("n of 0", chat(n=0), "invalid_request", "n"),
    ("n of 17", chat(n=17), "invalid_request", "n"),
    ("n as text", chat(n="1"), "invalid_request", "n"),
    ("temperature", chat(temperature=2.1), "invalid_request", "temperature"),
    ("temperature below", chat(temperature=-0.1), "invalid_request", "temperature"),
    ("top_p", chat(top_p=1.5), "invalid_request", "top_p"),
    ("max_tokens 0", chat(max_tokens=0), "invalid_request", "max_tokens"),
    ("max_tokens 1.5", chat(max_tokens=1.5), "invalid_request", "max_tokens"),
    ("two limits", chat(max_tokens=1, max_completion_tokens=2), "invalid_request", None),
    ("stream as text", chat(stream="yes"), "invalid_request", "stream"),
    ("stream_options alone", chat(stream_options={"include_usage": True}), "invalid_request", None),
    ("top_logprobs alone", chat(top_logprobs=2), "invalid_request", None),
    ("five stops", chat(stop=list("abcde")), "invalid_request", "stop"),
    ("penalty", chat(presence_penalty=3), "invalid_request", "presence_penalty"),
    ("seed", chat(seed=2**70), "invalid_request", "seed"),
    ("schema missing", chat(response_format={"type": "json_schema"}), "invalid_request", "response_format"),
    ("tool name", chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "invalid_request",
     "tools[0].function.name"),
    ("choice of no tools", chat(tool_choice="required"), "invalid_request", None),
    ("service_tier", chat(service_tier="batch"), "invalid_request", "service_tier"),
    ("unknown field", chat(best_of=2), "unsupported_parameter", "best_of"),
    ("unknown inner field", chat(stream=True, stream_options={"x": 1}), "unsupported_parameter", "stream_options.x"),
    ("image", chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
     "invalid_request", "messages[0].content[0].type"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "code", "param"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
async def test_a_wrong_body_is_refused_by_name_and_not_published(
    api: Api, stack: Stack, given: bytes | dict[str, Any], code: str, param: str | None
) -> None:
    before = await end_offsets(stack.settings, REQUESTS)
    refused(await api.ask(given), 400, code, param=param)
    assert await end_offsets(stack.settings, REQUESTS) == before


async def test_keys(stack: Stack, api: Api) -> None:
    before = await end_offsets(stack.settings, REQUESTS)
    url = api.url("/v1/chat/completions")
    for authorization in (None, "", "Bearer", "Bearer hr-wrong", f"Basic {stack.key}", stack.key,
                          "Bearer " + "x" * 5000, b"Bearer \xff\xfe", f"Bearer {stack.key} x"):  # fmt: skip
        headers = {} if authorization is None else {"authorization": authorization}
        answer = await api.client.post(url, json=chat(), headers=headers)
        refused(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/v1/requests/" + "0" * 32, f"/v1/chat/completions/chatcmpl-{'0' * 48}/stream"):
        refused(await api.client.get(api.url(path)), 401, "invalid_api_key")
    assert await end_offsets(stack.settings, REQUESTS) == before


async def test_unknown_model_and_path(stack: Stack, api: Api) -> None:
    before = await end_offsets(stack.settings, REQUESTS)
    refused(await api.ask(chat(model="no-such")), 404, "model_not_found", param="model")
    refused(await api.get("/v1/no-such"), 404, "http_error")
    refused(await api.get("/v1/chat/completions"), 405, "http_error")
    assert await end_offsets(stack.settings, REQUESTS) == before


@pytest.mark.parametrize("chunked", [False, True])
async def test_ten_megabytes_are_too_large(stack: Stack, api: Api, chunked: bool) -> None:
    before = await end_offsets(stack.settings, REQUESTS)
    large = json.dumps(chat(messages=[{"role": "user", "content": "x" * 10_000_000}])).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 1 << 20):
            yield large[start : start + (1 << 20)]

    headers = {"authorization": f"Bearer {stack.key}"}
    sent = pieces() if chunked else large
    refused(
        await api.client.post(api.url("/v1/chat/completions"), content=sent, headers=headers), 413, "request_too_large"
    )
    assert await end_offsets(stack.settings, REQUESTS) == before


async def test_the_largest_body_is_answered(stack: Stack, api: Api) -> None:
    spec = Spec(tokens=2, interval_ms=1, prompt_tokens=7).line()
    padding = MAX_BODY_BYTES - len(json.dumps(body("", model="bench"))) - len(spec) - 200
    answer = await api.ask(body("é" * (padding // 6) + "\n" + spec))
    assert answer.status_code == 200, answer.text[:500]
    assert answer.json()["usage"]["prompt_tokens"] == 7


async def test_a_prompt_over_the_context_by_bytes_is_refused_at_once(stack: Stack, api: Api) -> None:
    before = await end_offsets(stack.settings, REQUESTS)
    answer = await api.ask(body("word " * 60_000, model="smollm2"))
    refused(answer, 400, "context_length_exceeded", param="messages")
    assert await end_offsets(stack.settings, REQUESTS) == before


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_over_the_context_by_tokens_is_refused_by_the_worker(
    stack: Stack, api: Api, stream: bool
) -> None:
    answer = await api.ask(body("word " * 1_100, model="smollm2", stream=stream))
    error = refused(answer, 400, "context_length_exceeded", param="messages")
    assert "1024" in error["message"]
    life = (await api.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
    assert (life["status"], life["error"]["code"]) == ("rejected", "context_length_exceeded")
    near = await api.ask(body("word " * 950, model="smollm2", max_tokens=2))
    assert near.status_code == 200 and near.json()["usage"]["prompt_tokens"] > 950


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-hr-resume": "-1"}, "x-hr-resume"),
        ({"x-hr-resume": "99999"}, "x-hr-resume"),
        ({"x-hr-resume": "²"}, "x-hr-resume"),
        ({"x-request-timeout": "nan"}, "x-request-timeout"),
        ({"x-request-timeout": "inf"}, "x-request-timeout"),
        ({"x-request-timeout": "0"}, "x-request-timeout"),
        ({"x-request-timeout": "soon"}, "x-request-timeout"),
        ({"x-hr-start-within": "0"}, "x-hr-start-within"),
        ({"x-hr-start-within": "nan"}, "x-hr-start-within"),
        ({"idempotency-key": ""}, None),
        ({"idempotency-key": "x" * 256}, None),
        ({"idempotency-key": "a\tb"}, None),
    ],
)
async def test_headers_that_ask_for_nonsense(
    stack: Stack, api: Api, headers: dict[str, str], param: str | None
) -> None:
    before = await end_offsets(stack.settings, REQUESTS)
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    refused(await api.ask(chat(), sent), 400, "invalid_request", param=param)  # type: ignore[arg-type]
    assert await end_offsets(stack.settings, REQUESTS) == before


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": "\xff\xfe"},
        {"traceparent": "00-" + "a" * 5000},
        {"x-request-id": "../../etc/passwd"},
        {"hr-tenant": "somebody-else", "ce_id": "0" * 32, "hr-key-id": "x"},
        {"x-forwarded-for": "1.2.3.4", "forwarded": "for=1.2.3.4"},
    ],
)
async def test_headers_that_are_not_ours_change_nothing(stack: Stack, api: Api, headers: dict[str, str]) -> None:
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = await api.ask(body(Spec(tokens=2, interval_ms=1)), sent)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-request-id"] in answer.json()["id"]
    life = (await api.get(f"/v1/requests/{answer.json()['id']}")).json()
    assert life["tenant"] == "default"


async def _raw(stack: Stack, data: bytes) -> bytes:
    host, port = stack.ingress_urls[0].removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await reader.read(4096)
    finally:
        writer.close()


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
        b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
async def test_broken_http_is_a_400(stack: Stack, head: bytes) -> None:
    before = await end_offsets(stack.settings, REQUESTS)
    assert (await _raw(stack, head)).startswith(b"HTTP/1.1 4")
    assert await end_offsets(stack.settings, REQUESTS) == before


async def test_a_body_that_ends_early_publishes_nothing(stack: Stack) -> None:
    before = await end_offsets(stack.settings, REQUESTS)
    host, port = stack.ingress_urls[0].removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    raw = json.dumps(chat()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {stack.key}\r\n"
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % (len(raw) + 10) + raw)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with Api(stack) as api:
        assert (await api.ask(body(Spec(tokens=1)))).status_code == 200
    after = await end_offsets(stack.settings, REQUESTS)
    assert sum(after.values()) == sum(before.values()) + 1
