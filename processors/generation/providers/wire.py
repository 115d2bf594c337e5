"""One HTTP/1.1 connection to a provider: a request at a time, its answer handed over in whole chunks.

This is the path of every token that a worker reads, so it is an `asyncio.Protocol` around httptools: one socket read
is one parse, one wake-up of the reader, and no copy but the parser's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import httptools

HIGH_WATER_BYTES = 256 * 1024
"""Unread body above which the socket is no longer read, so that a slow reader slows the provider."""
HEAD_LIMIT_BYTES = 256 * 1024


class WireError(Exception):
    """The connection failed; the text says how."""


class IdleTimeout(WireError):
    """Not one byte came for the idle timeout."""


class Connection(asyncio.Protocol):
    """A connection that carries one exchange after another. Only `Pool` makes and reuses them."""

    __slots__ = (
        "_body",
        "_chunked_or_sized",
        "_complete",
        "_failure",
        "_head_bytes",
        "_headers_done",
        "_idle_s",
        "_in_exchange",
        "_last_read",
        "_loop",
        "_parser",
        "_paused",
        "_time",
        "_timer",
        "_transport",
        "_unread",
        "_waiter",
        "answered",
        "headers",
        "idle_since",
        "keep_alive",
        "on_complete",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, idle_s: float) -> None:
        self._loop = loop
        self._time = loop.time
        self._idle_s = idle_s
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failure: WireError | None = None
        self._in_exchange = False
        self._complete = False
        self._paused = False
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self._body: list[bytes] = []
        self._unread = 0
        self._head_bytes = 0
        self._headers_done = False
        self._chunked_or_sized = False
        self._last_read = self._time()
        self.answered = False
        self.keep_alive = False
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.on_complete: Callable[[Connection], None] | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Parse what came and wake the reader once."""
        self._last_read = self._time()
        if not self._in_exchange:
            self._fail(WireError("the server sent bytes that nobody asked for"))
            return
        self.answered = True
        if not self._headers_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as problem:
            self._fail(WireError(f"the answer is not HTTP/1.1: {problem}"))
            return
        if not self._headers_done and self._head_bytes > HEAD_LIMIT_BYTES:
            self._fail(WireError("the answer's headers do not end"))
            return
        if self._unread > HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """An answer without a length ends with its connection; every other one is cut by it."""
        if self._in_exchange and self._headers_done and not self._chunked_or_sized and exc is None:
            self._complete = True
            self.keep_alive = False
            self._wake()
        else:
            self._fail(WireError(f"the connection was closed{f' ({exc})' if exc else ''}"))

    # httptools' side

    def on_message_begin(self) -> None:
        """An answer begins; a second one in the same exchange was not asked for."""
        if self._complete:
            self._fail(WireError("the server sent two answers to one request"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header of the answer."""
        name = name.lower()
        self.headers[name] = value
        if name == b"content-length" or name == b"transfer-encoding":
            self._chunked_or_sized = True

    def on_headers_complete(self) -> None:
        """The status is known; informational answers (1xx) are passed over."""
        self.status = self._parser.get_status_code()
        self.keep_alive = self._parser.should_keep_alive()
        self._headers_done = self.status >= 200

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body.append(body)
        self._unread += len(body)

    def on_message_complete(self) -> None:
        """The answer is whole, as its framing says."""
        if self._headers_done:
            self._complete = True
            if self.on_complete is not None:
                self.on_complete(self)

    # the exchange

    async def exchange(self, request: bytes) -> None:
        """Send a request and return when the answer's headers are there. Raises `WireError`."""
        if self._failure is not None:
            raise self._failure
        self._reset()
        self._in_exchange, self._complete = True, False
        self._timer = self._loop.call_later(self._idle_s, self._check_idle)
        self._transport.write(request)
        while not self._headers_done:
            await self._wait()

    async def receive(self) -> bytes:
        """What came of the body since the last call, at least one byte; `b""` at its end. Raises `WireError`."""
        body = self._body
        while not body:
            if self._complete:
                return b""
            await self._wait()
        data = body[0] if len(body) == 1 else b"".join(body)
        body.clear()
        self._unread = 0
        if self._paused:
            self._paused = False
            self._last_read = self._time()
            if not self._transport.is_closing():
                self._transport.resume_reading()
        return data

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises `WireError` when it is over `limit` bytes or cut."""
        parts, size = [], 0
        while data := await self.receive():
            size += len(data)
            if size > limit:
                raise WireError(f"the answer is larger than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    @property
    def complete(self) -> bool:
        """Whether the answer has fully arrived."""
        return self._complete

    @property
    def usable(self) -> bool:
        """Whether another request may go over this connection."""
        return self._failure is None and self._complete and self.keep_alive and not self._transport.is_closing()

    def finish(self) -> None:
        """The exchange is over; the connection may rest. Unread body is dropped."""
        self._in_exchange = False
        self._body.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.idle_since = self._time()

    def abort(self) -> None:
        """Close at once; the server sees it and stops generating."""
        self.finish()
        if self._failure is None:
            self._failure = WireError("we closed the connection")
        self._transport.abort()

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _fail(self, failure: WireError) -> None:
        if self._failure is None:
            self._failure = failure
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(failure)
        self._transport.abort()

    def _check_idle(self) -> None:
        """One timer an exchange, moved on when it fires: re-arming it for every token would cost more than reading."""
        now = self._time()
        due = self._last_read + self._idle_s
        if self._paused or due > now:
            self._timer = self._loop.call_later(self._idle_s if self._paused else due - now, self._check_idle)
        else:
            self._fail(IdleTimeout(f"no byte came for {self._idle_s:g} s"))
