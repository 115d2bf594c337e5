"""The load client: N callers, each on a connection of its own, measuring every token on its way.

`python -m bench.gateway.client --base-url http://127.0.0.1:8000/v1 --callers 500 --tokens 240` prints JSON figures.
It asks by `#bench` lines, so behind whatever it calls must stand `bench.gateway.upstream`. Raw asyncio protocols and
httptools keep its own cost to some microseconds a token, since it shares the machine with what it measures.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import time
from typing import Annotated, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import typer
import uvloop

from bench.gateway.figures import Load, Trace, summarise
from bench.gateway.processes import raise_file_limit
from bench.gateway.spec import Spec

TOKEN = re.compile(rb"t(\d+)@(\d+)")
DONE = re.compile(rb"\[DONE\]")
FINISH = re.compile(rb'"finish_reason":\s*"')
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
SEQ_RANGE = 1_000_000
"""Each request's tokens are numbered from a multiple of this, so that a token of another stream is recognised."""


class Target(msgspec.Struct, kw_only=True):
    """Where and as whom to call."""

    base_url: str
    """Like OpenAI's: ends in `/v1`, http only."""
    model: str = "bench"
    api_key: str | None = None
    headers: dict[str, str] = {}
    path: str = "/chat/completions"
    sends_done: bool = True
    """Whether a stream must end in `[DONE]`; for gateways that leave it out, a finish reason is enough."""

    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.base_url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def head(self) -> bytes:
        """The request head, all but the content length."""
        host, port = self.address()
        extra = dict(self.headers)
        if self.api_key:
            extra["authorization"] = f"Bearer {self.api_key}"
        lines = [f"POST {urlsplit(self.base_url).path}{self.path} HTTP/1.1", f"host: {host}:{port}"]
        lines += ["content-type: application/json", *(f"{name}: {value}" for name, value in extra.items())]
        return ("\r\n".join(lines) + "\r\ncontent-length: ").encode()


class Plan(msgspec.Struct, kw_only=True):
    """What the callers do: each sends its requests one after another."""

    callers: int = 1
    stream: bool = True
    tokens: int = 64
    interval_ms: float = 50.0
    ttft_ms: float = 0.0
    rounds: int = 1
    """Requests of each caller."""
    seconds: float | None = None
    """No request begins later than this after the start."""
    ramp_seconds: float = 1.0
    """Callers begin spread evenly over this time."""
    timeout_seconds: float = 120.0
    """A request that takes longer counts as failed."""


class Caller(asyncio.Protocol):
    """One connection that carries one request at a time and fills its trace."""

    def __init__(self, stream: bool, end: re.Pattern[bytes]) -> None:
        self._stream = stream
        self._end = end
        self._trace: Trace | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._rest = b""
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        """A request that was running has failed."""
        self.open = False
        self.fail("connection closed")

    def request(self, data: bytes, trace: Trace) -> asyncio.Future[None]:
        """Send a request; the future is done when its trace is complete."""
        self._trace, self._rest = trace, b""
        self._parser = httptools.HttpResponseParser(self)
        self._waiter = asyncio.get_running_loop().create_future()
        trace.started = time.monotonic_ns()
        self.transport.write(data)
        return self._waiter

    def fail(self, reason: str) -> None:
        """End the running request with an error, and its connection with it."""
        if self._trace is not None:
            self._trace.error = self._trace.error or reason
            self._complete()
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError as error:
            self.fail(f"bad HTTP: {error}")

    def on_body(self, body: bytes) -> None:
        """Called by the parser: note the tokens of whole lines, keep the rest."""
        if self._stream:
            if self._rest:
                body = self._rest + body
                self._rest = b""
            if not body.endswith(b"\n"):
                end = body.rfind(b"\n") + 1
                self._rest = body[end:]
                body = body[:end]
            self._note(body)
        else:
            self._rest += body

    def _note(self, text: bytes) -> None:
        trace, now = self._trace, time.monotonic_ns()
        if trace is None:
            return
        for number, sent in TOKEN.findall(text):
            trace.numbers.append(int(number))
            trace.sent.append(int(sent))
            trace.received.append(now)
        if self._end.search(text):
            trace.done = True
        if b"completion_tokens" in text and (usage := USAGE.search(text)):
            trace.usage = int(usage[1])
        if b'"error"' in text:
            trace.error = f"error: {text.decode('utf-8', 'replace').strip()[:200]}"

    def on_message_complete(self) -> None:
        """Called by the parser at the end of the answer."""
        trace = self._trace
        if trace is None:
            return
        status = self._parser.get_status_code()
        if self._rest:
            self._note(self._rest)
        if status != 200:
            trace.error = f"HTTP {status}: {trace.error or self._rest[:200].decode('utf-8', 'replace')}"
        elif not self._stream:
            trace.done = len(trace.numbers) == trace.expected
        if not self._parser.should_keep_alive():
            self.open = False
        self._complete()

    def _complete(self) -> None:
        if self._trace is not None:
            self._trace.ended = time.monotonic_ns()
        self._trace = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def body(target: Target, plan: Plan, spec: Spec) -> bytes:
    """The JSON body of one request."""
    request: dict[str, object] = {
        "model": target.model,
        "messages": [{"role": "user", "content": spec.line()}],
        "max_tokens": spec.tokens,
        "stream": plan.stream,
    }
    if plan.stream:
        request["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(request)


async def _caller(target: Target, plan: Plan, index: int, until: float, traces: list[Trace]) -> None:
    """All requests of one caller; a lost connection is opened anew for the next request."""
    loop = asyncio.get_running_loop()
    host, port = target.address()
    head = target.head()
    await asyncio.sleep(plan.ramp_seconds * index / plan.callers)
    end = DONE if target.sends_done else FINISH
    connection: Caller | None = None
    for number in range(plan.rounds):
        if loop.time() >= until:
            break
        base = (number * plan.callers + index) * SEQ_RANGE
        spec = Spec(tokens=plan.tokens, interval_ms=plan.interval_ms, ttft_ms=plan.ttft_ms, seq=base)
        trace = Trace(expected=plan.tokens, base=base)
        traces.append(trace)
        payload = body(target, plan, spec)
        try:
            if connection is None or not connection.open:
                _, connection = await loop.create_connection(lambda: Caller(plan.stream, end), host, port)
        except OSError as error:
            trace.started = trace.ended = time.monotonic_ns()
            trace.error = f"no connection: {error.strerror}"
            continue
        limit = loop.call_later(plan.timeout_seconds, connection.fail, "timed out")
        await connection.request(head + b"%d\r\n\r\n" % len(payload) + payload, trace)
        limit.cancel()
    if connection is not None:
        connection.transport.close()


async def run_load(target: Target, plan: Plan) -> tuple[Load, list[Trace]]:
    """Run a plan and return its figures with the traces behind them."""
    traces: list[Trace] = []
    until = asyncio.get_running_loop().time() + (plan.seconds if plan.seconds is not None else float("inf"))
    cpu = time.process_time()
    gc.collect()
    gc.disable()
    try:
        await asyncio.gather(*(_caller(target, plan, index, until, traces) for index in range(plan.callers)))
    finally:
        gc.enable()
    cpu = time.process_time() - cpu
    load = summarise(traces, plan.callers)
    load.client_cpu_seconds = round(cpu, 3)
    return load, traces


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    base_url: Annotated[str, typer.Option(help="Like http://127.0.0.1:8000/v1")],
    model: str = "bench",
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "",
    header: Annotated[list[str] | None, typer.Option(help="Extra header `name: value`; may be given often.")] = None,
    sends_done: Annotated[bool, typer.Option(help="Whether streams must end in [DONE].")] = True,
    callers: int = 1,
    stream: bool = True,
    tokens: int = 64,
    interval_ms: float = 50.0,
    ttft_ms: float = 0.0,
    rounds: Annotated[int, typer.Option(help="Requests of each caller.")] = 1,
    seconds: Annotated[float | None, typer.Option(help="Begin no request later than this.")] = None,
    ramp_seconds: float = 1.0,
    timeout_seconds: float = 120.0,
) -> None:
    """Put load on an OpenAI-compatible endpoint that stands before the mock upstream; print figures as JSON."""
    headers = dict(line.split(": ", 1) for line in header or [])
    key = os.environ.get(api_key_env) or None
    target = Target(base_url=base_url, model=model, api_key=key, headers=headers, sends_done=sends_done)
    plan = Plan(
        callers=callers,
        stream=stream,
        tokens=tokens,
        interval_ms=interval_ms,
        ttft_ms=ttft_ms,
        rounds=rounds,
        seconds=seconds,
        ramp_seconds=ramp_seconds,
        timeout_seconds=timeout_seconds,
    )
    raise_file_limit()
    load, _ = uvloop.run(run_load(target, plan))
    print(msgspec.json.encode(load).decode())


if __name__ == "__main__":
    app()
