"""The OpenAI provider against servers that misbehave: retries before the first byte, errors after it, never a hang."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from headrace.errors import HeadraceError, ProviderError, ProviderRateLimited, ProviderUnavailable
from processors.generation.providers.base import Done, Piece, Text
from processors.generation.providers.factory import make_provider
from processors.generation.providers.openai import OpenAICompatible
from schemas.control import Model, Provider

MODEL = Model(id="m", provider="p", backend_tag="m")
BODY = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


GOOD = HEAD + chunk(TEXT) + chunk(END) + b"0\r\n\r\n"


def refusal(status: int, headers: str = "") -> bytes:
    body = b'{"error":{"message":"the server says no"}}'
    return f"HTTP/1.1 {status} No\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


class Server:
    """Runs a script for each request, and counts what it saw."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests = 0
        self.connections = 0
        self.gone = asyncio.Event()
        self.sent = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
                )
                await reader.readexactly(length)
                self.requests += 1
                await self.script(reader, writer, self.requests)
        self.gone.set()
        writer.close()


@contextlib.asynccontextmanager
async def serving(
    script: Script, *, idle_timeout_s: float = 5.0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Server, OpenAICompatible]]:
    server = Server(script)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    url = f"https://localhost:{port}/v1" if tls else f"http://127.0.0.1:{port}/v1"
    record = Provider(name="p", kind="openai", base_url=url, options={"idle_timeout_s": idle_timeout_s})
    provider = make_provider(record)
    assert isinstance(provider, OpenAICompatible)
    try:
        yield server, provider
    finally:
        await provider.close()
        listener.close()


def always(answer: bytes) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter, __: int) -> None:
        writer.write(answer)
        await writer.drain()

    return script


def in_turn(*answers: bytes | None) -> Script:
    """One answer a request; None closes the connection without one."""

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        answer = answers[min(number, len(answers)) - 1]
        if answer is None:
            writer.close()
        else:
            writer.write(answer)
            await writer.drain()

    return script


async def pieces(provider: OpenAICompatible) -> list[Piece]:
    return [piece async for batch in provider.generate(MODEL, BODY) for piece in batch]


async def failure(provider: OpenAICompatible) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        await asyncio.wait_for(pieces(provider), 10)
    return caught.value


async def test_streams_share_a_connection_that_is_kept_alive() -> None:
    async with serving(always(GOOD)) as (server, provider):
        for _ in range(5):
            got = await pieces(provider)
            assert got[0] == Text(0, "a")
            assert isinstance(got[-1], Done)
            await asyncio.sleep(0)
        assert (server.requests, server.connections) == (5, 1)


@pytest.mark.parametrize("first", [refusal(503), refusal(429), refusal(500), refusal(503, "Retry-After: 1\r\n"), None])
async def test_a_failure_before_the_first_byte_is_retried(first: bytes | None) -> None:
    async with serving(in_turn(first, GOOD)) as (server, provider):
        assert (await pieces(provider))[0] == Text(0, "a")
        assert server.requests == 2


@pytest.mark.parametrize(
    ("status", "kind", "ours"),
    [
        (429, ProviderRateLimited, (429, "provider_rate_limited", "rate_limit_error", 10)),
        (503, ProviderUnavailable, (503, "provider_unavailable", "server_error", 5)),
        (500, ProviderError, (502, "provider_error", "server_error", None)),
    ],
)
async def test_retries_end_in_the_providers_own_status_where_it_is_the_callers_too(
    status: int, kind: type[ProviderError], ours: tuple[int, str, str, int | None]
) -> None:
    async with serving(always(refusal(status))) as (server, provider):
        error = await failure(provider)
        assert type(error) is kind
        assert "provider 'p'" in error.message and "the server says no" in error.message
        info = error.info()
        assert (info.status, info.code, info.type, info.retry_after_s) == ours
        assert server.requests == 3


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    "header",
    [
        "Retry-After: 30\r\n",
        "Date: Wed, 04 Nov 2026 23:59:45 GMT\r\nRetry-After: Thu, 05 Nov 2026 00:00:15 GMT\r\n",
    ],
)
async def test_a_long_retry_after_is_passed_on_instead_of_waited_for(status: int, header: str) -> None:
    async with serving(always(refusal(status, header))) as (server, provider):
        error = await failure(provider)
        assert (error.status, error.retry_after_s) == (status, 30)
        assert server.requests == 1


async def test_a_limit_is_named_and_the_account_is_not() -> None:
    said = (
        "Rate limit reached for m in organization org-aB3dE5 on tokens per min (TPM): Limit 10000, Used 9000. "
        "Key sk-proj-aaBB11ccDD22, Bearer plain-secret, 0123456789abcdef0123456789abcdef, "
        "9b2f7c1e-0c3a-4a5e-8f00-112233445566."
    )
    body = b'{"error":{"message":"%s"}}' % said.encode()
    answer = b"HTTP/1.1 429 No\r\nRetry-After: 6\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with serving(always(answer)) as (_, provider):
        message = (await failure(provider)).message
    assert "on tokens per min (TPM): Limit 10000, Used 9000." in message
    for secret in ("aB3dE5", "aaBB11", "plain-secret", "0123456789abcdef", "112233445566"):
        assert secret not in message


@pytest.mark.parametrize("status", [400, 401, 404, 422, 501])
async def test_a_refusal_is_not_retried(status: int) -> None:
    async with serving(always(refusal(status))) as (server, provider):
        await failure(provider)
        assert server.requests == 1


async def test_a_connection_that_the_server_closed_meanwhile_is_replaced() -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 2:
            writer.close()
        else:
            writer.write(GOOD)

    async with serving(script) as (server, provider):
        await pieces(provider)
        began = time.monotonic()
        assert (await pieces(provider))[0] == Text(0, "a")
        assert (server.requests, server.connections) == (3, 2)
        assert time.monotonic() - began < 0.09, "a stale connection is replaced without back-off"


async def test_a_server_that_is_down_is_an_error_within_a_second() -> None:
    async with serving(always(GOOD)) as (_, provider):
        pass
    record = Provider(name="p", kind="openai", base_url=f"http://{provider._pool.endpoint}/v1")
    again = make_provider(record)
    assert isinstance(again, OpenAICompatible)
    began = time.monotonic()
    assert "no connection" in (await failure(again)).message
    with pytest.raises(ProviderError):
        await again.health()
    assert time.monotonic() - began < 2
    await again.close()


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + chunk(TEXT), HEAD + b"ff\r\nhalf a chunk"])
async def test_a_server_that_hangs_is_an_error_after_the_idle_timeout(sent: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        writer.write(sent)
        await reader.read()
        writer.close()

    async with serving(script, idle_timeout_s=0.3) as (server, provider):
        assert "no byte came for 0.3 s" in (await failure(provider)).message
        assert server.requests == 1
        await asyncio.wait_for(server.gone.wait(), 1)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (HEAD + chunk(TEXT), "broke off in the middle"),
        (HEAD + chunk(TEXT) + b"0\r\n\r\n", "ended its stream in the middle"),
        (HEAD + chunk(TEXT) + b"zz\r\n", "not HTTP"),
        (HEAD + chunk(TEXT) + chunk(b"data: {\n\n"), "not a chat stream"),
        (HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"") + TEXT, "ended its stream in the middle"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", "application/json"),
        (b"SSH-2.0-OpenSSH_9\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000, "headers do not end"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://else\r\nContent-Length: 0\r\n\r\n", "redirects to 'http://else'"),
    ],
)
async def test_what_breaks_after_the_first_byte_is_an_error_and_is_not_retried(answer: bytes, text: str) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter, __: int) -> None:
        writer.write(answer)
        writer.close()

    async with serving(script) as (server, provider):
        error = await failure(provider)
        assert text in error.message
        assert error.status == 502
        assert server.requests == 1


async def test_closing_the_stream_closes_the_connection_at_once() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        writer.write(HEAD + chunk(TEXT))
        await reader.read()
        writer.close()

    async with serving(script) as (server, provider):
        stream = provider.generate(MODEL, BODY)
        assert await anext(stream) == [Text(0, "a")]
        await stream.aclose()
        await asyncio.wait_for(server.gone.wait(), 0.5)


@pytest.mark.parametrize("sent", [b"", HEAD + chunk(TEXT)])
async def test_cancelling_the_reader_closes_the_connection_at_once(sent: bytes) -> None:
    begun = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        writer.write(sent)
        begun.set()
        await reader.read()
        writer.close()

    async with serving(script) as (server, provider):
        task = asyncio.create_task(pieces(provider))
        await begun.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(server.gone.wait(), 0.5)


async def test_a_slow_reader_slows_the_server() -> None:
    blocked = asyncio.Event()

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter, __: int) -> None:
        writer.write(HEAD)
        burst = chunk(TEXT * 1000)
        for _ in range(500):
            writer.write(burst)
            server.sent += len(burst)
            try:
                await asyncio.wait_for(writer.drain(), 0.5)
            except TimeoutError:
                blocked.set()
                await writer.drain()
        writer.write(chunk(END) + b"0\r\n\r\n")

    async with serving(script) as (server, provider):
        stream = provider.generate(MODEL, BODY)
        count = len(await anext(stream))
        await asyncio.wait_for(blocked.wait(), 10)
        assert server.sent < 20_000_000, "the server was not slowed down"
        async for batch in stream:
            count += sum(isinstance(piece, Text) for piece in batch)
        assert count == 500_000


def self_signed(directory: Path) -> tuple[Path, Path]:
    key, certificate = directory / "key.pem", directory / "cert.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    return key, certificate


async def test_https_is_checked_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    key, certificate = self_signed(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with serving(always(GOOD), tls=context) as (server, provider):
        assert "certificate is not trusted" in (await failure(provider)).message
        assert server.requests == 0
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with serving(always(GOOD), tls=context) as (_, provider):
        assert (await pieces(provider))[0] == Text(0, "a")


async def test_the_key_is_sent_and_a_missing_one_is_named() -> None:
    record = Provider(name="box", kind="openai", base_url="http://127.0.0.1:1/v1", api_key_env="BOX_KEY")
    with pytest.raises(ProviderError, match="BOX_KEY"):
        make_provider(record, environ={})
    provider = make_provider(record, environ={"BOX_KEY": "secret"})
    assert isinstance(provider, OpenAICompatible)
    assert b"Authorization: Bearer secret\r\n" in provider._pool._head
    with pytest.raises(ProviderError, match="line break"):
        make_provider(record, environ={"BOX_KEY": "a\r\nX: y"})
    with pytest.raises(ProviderError, match="options"):
        make_provider(Provider(name="box", kind="openai", base_url="http://h/v1", options={"idle": 3}))
    with pytest.raises(ProviderError, match="kind"):
        make_provider(Provider(name="box", kind="vllm"))
