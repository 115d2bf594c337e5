"""A mock OpenAI-compatible server whose tokens carry sequence number and send time.

`python -m bench.gateway.upstream --port N` serves `/v1/chat/completions` (streamed or not), `/v1/models`, `/stats`
and `/health`. A `#bench` line in the last message (see `spec.py`) says what each answer shall be. Token k reads
` t{k}@{ns}`, where ns is CLOCK_MONOTONIC at the moment of writing: one clock for all processes of a host, so a
reader subtracts it from its own time and has the delay of that token. A last message of the assistant with such tokens
is continued after its last one. A stream has as many choices (all with the same tokens) and log probabilities as the
body asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections import deque
from typing import Annotated, cast
from urllib.parse import parse_qs, unquote

import httptools
import msgspec
import typer
import uvloop

from bench.gateway.answers import StreamedAnswer, WholeAnswer
from bench.gateway.processes import raise_file_limit
from bench.gateway.spec import Spec, SpecError
from bench.gateway.tally import Stats, Try
from bench.gateway.wheel import Wheel
from bench.gateway.wire import Chat, Rendering, chat_decoder, error, response

MOST_CHOICES = 16


class Upstream:
    """What all connections share: the wheel, the tallies, and the defaults of the command line."""

    def __init__(self, loop: asyncio.AbstractEventLoop, default: Spec, models: list[str], api_key: str | None) -> None:
        self.wheel = Wheel(loop)
        self.stats = Stats()
        self.default = default
        self.models = models
        self.authorization = f"Bearer {api_key}".encode() if api_key else None

    def model(self, name: str) -> dict[str, object]:
        """One entry of `/v1/models`."""
        return {"id": name, "object": "model", "created": 0, "owned_by": "bench"}


class Request:
    """One request while it is read."""

    __slots__ = ("authorization", "body", "keep_alive", "method", "url")

    def __init__(self) -> None:
        self.url = b""
        self.method = b""
        self.keep_alive = True
        self.authorization: bytes | None = None
        self.body: list[bytes] = []


class Connection(asyncio.Protocol):
    """One caller's connection: reads requests one after another and lets the wheel write their answers."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request()
        self._waiting: deque[Request] = deque()
        self._answer: StreamedAnswer | WholeAnswer | None = None
        self._running: tuple[str, Try] | None = None
        self._keep_alive = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; answers write to it directly."""
        self._transport = cast(asyncio.Transport, transport)
        self.send = self._transport.write

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller has gone: stop generating for it, and say so in the tallies."""
        self._waiting.clear()
        if self._running is not None:
            self._end("disconnected")

    def data_received(self, data: bytes) -> None:
        """Feed the parser; what is not HTTP closes the connection."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError:
            self._transport.write(error(400, "this is not an HTTP request"))
            self._transport.close()

    def on_url(self, url: bytes) -> None:
        """Called by the parser with (a part of) the request target."""
        self._request.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser for each header; only the key matters here."""
        if name.lower() == b"authorization":
            self._request.authorization = value

    def on_body(self, body: bytes) -> None:
        """Called by the parser with a part of the body."""
        self._request.body.append(body)

    def on_message_complete(self) -> None:
        """A request is whole: answer it now, or after the one that runs (pipelining)."""
        request, self._request = self._request, Request()
        request.method = self._parser.get_method()
        request.keep_alive = self._parser.should_keep_alive()
        if self._running is None:
            self._serve(request)
        else:
            self._waiting.append(request)

    def finished(self, outcome: str) -> None:
        """The running answer is complete; take the next waiting request."""
        self._end(outcome)
        if not self._keep_alive:
            self._transport.close()
        while self._waiting and self._running is None:
            self._serve(self._waiting.popleft())

    def drop(self, outcome: str) -> None:
        """Close the connection after what was written, with the answer unfinished."""
        self._end(outcome)
        self._transport.close()

    def _end(self, outcome: str) -> None:
        if self._answer is not None:
            self._answer.closed = True
            self._answer = None
        if self._running is not None:
            request_id, attempt = self._running
            self._running = None
            self._upstream.stats.end(request_id, attempt, outcome, time.monotonic_ns())

    def _serve(self, request: Request) -> None:
        upstream = self._upstream
        self._keep_alive = request.keep_alive
        path, _, query = request.url.decode("latin-1").partition("?")
        if upstream.authorization is not None and request.authorization != upstream.authorization:
            self.send(error(401, "wrong API key"))
        elif path == "/v1/chat/completions" and request.method == b"POST":
            self._chat(b"".join(request.body))
        elif path == "/v1/models":
            data = [upstream.model(name) for name in upstream.models]
            self.send(response(200, msgspec.json.encode({"object": "list", "data": data})))
        elif path.startswith("/v1/models/") and (name := unquote(path[11:])) in upstream.models:
            self.send(response(200, msgspec.json.encode(upstream.model(name))))
        elif path == "/stats" and request.method == b"DELETE":
            upstream.stats = Stats(active=upstream.stats.active)
            self.send(response(200, b"{}"))
        elif path == "/stats":
            only = parse_qs(query).get("id")
            self.send(response(200, upstream.stats.render(only[0] if only else None)))
        elif path == "/health":
            self.send(response(200, b'{"status":"ok"}'))
        else:
            self.send(error(404, f"no such path: {path}"))
        if self._running is None and not self._keep_alive:
            self._transport.close()

    def _chat(self, body: bytes) -> None:
        upstream, now = self._upstream, time.monotonic_ns()
        try:
            chat = chat_decoder.decode(body)
            spec = chat.spec(upstream.default)
        except (msgspec.DecodeError, SpecError) as problem:
            self.send(error(400, str(problem)))
            return
        if chat.n is not None and not 1 <= chat.n <= (MOST_CHOICES if chat.stream else 1):
            self.send(error(400, f"n must be 1, or up to {MOST_CHOICES} in a stream"))
            return
        attempt = upstream.stats.begin(spec.id, now)
        self._running = (spec.id, attempt)
        if spec.keep_body:
            attempt.body = body.decode("utf-8", "replace")
        spec = spec.for_try(attempt.number)
        if spec.refuse:
            self.drop("refused")
        elif spec.status is not None:
            self.send(error(spec.status, f"the {spec.status} that the caller asked for"))
            self.finished(f"failed:{spec.status}")
        else:
            self._generate(chat, spec, attempt)

    def _generate(self, chat: Chat, spec: Spec, attempt: Try) -> None:
        rendering = Rendering(
            self._upstream.stats.requests, chat.model, spec.filler,
            choices=chat.n or 1, logprobs=bool(chat.logprobs), calls=spec.calls,
        )  # fmt: skip
        prompt = chat.words() if spec.prompt_tokens is None else spec.prompt_tokens
        if chat.stream:
            usage = chat.stream_options is not None and chat.stream_options.include_usage
            self._answer = StreamedAnswer(
                self, spec, attempt, rendering, prompt=prompt, limit=chat.limit(), include_usage=usage
            )
        else:
            self._answer = WholeAnswer(self, spec, attempt, rendering, prompt, chat.limit())
        due = self._answer.first_due()
        if due > attempt.received_ns:
            self._upstream.wheel.add(self._answer, due)
        else:
            again = self._answer.fire(attempt.received_ns)
            if again and self._answer is not None:
                self._upstream.wheel.add(self._answer, again)


async def serve(host: str, port: int, default: Spec, models: list[str], api_key: str | None = None) -> asyncio.Server:
    """Listen on `host:port` (0 takes a free port) and return the running server."""
    loop = asyncio.get_running_loop()
    upstream = Upstream(loop, default, models, api_key)
    return await loop.create_server(lambda: Connection(upstream), host, port, backlog=4096)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free port; the line `ready http://HOST:PORT` says which.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer whose prompt does not say.")] = 64,
    interval_ms: Annotated[float, typer.Option(help="Milliseconds between two tokens.")] = 50.0,
    ttft_ms: Annotated[float, typer.Option(help="Milliseconds to the first token.")] = 20.0,
    model: Annotated[list[str] | None, typer.Option(help="Model to list; may be given often.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Refuse callers without this bearer key.")] = None,
) -> None:
    """Serve a mock OpenAI-compatible upstream until stopped; prompts steer it by a `#bench` line."""

    async def run() -> None:
        server = await serve(
            host, port, Spec(tokens=tokens, interval_ms=interval_ms, ttft_ms=ttft_ms), model or ["bench"], api_key
        )
        print(f"ready http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()

    raise_file_limit()
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(run())


if __name__ == "__main__":
    app()
