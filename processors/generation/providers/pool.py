"""Keep-alive connections to one provider, and the retries that are safe: those before the first byte of an answer."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping

import structlog

from headrace.errors import HeadraceError, ProviderError
from processors.generation.providers.endpoint import Endpoint
from processors.generation.providers.refusals import from_answer, is_transient, retry_after_s
from processors.generation.providers.wire import Connection, IdleTimeout, WireError

log = structlog.get_logger(__name__)

BACKOFF_S = (0.1, 0.4)
"""Waits before the second and third try."""
RETRY_AFTER_LIMIT_S = 2.0
"""A server that wants a longer pause is not asked again: its answer goes to the caller with that pause."""
BODY_LIMIT_BYTES = 64 * 1024 * 1024
ERROR_LIMIT_BYTES = 256 * 1024
DRAIN_S = 1.0
"""How long a finished stream may take to end its HTTP message before the connection is dropped."""
KEEP_ALIVE_S = 30.0
IDLE_TIMEOUT_S = 120.0


class Pool:
    """Connections to one endpoint, on one event loop."""

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        *,
        headers: Mapping[str, str] | None = None,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        connect_timeout_s: float = 5.0,
        max_idle: int = 512,
    ) -> None:
        self.name = name
        self.endpoint = endpoint
        self._idle_timeout_s = idle_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._max_idle = max_idle
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._ssl: ssl.SSLContext | None = endpoint.ssl_context()
        self._closed = False
        fixed = {"Host": endpoint.host_header, "User-Agent": "headrace", **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())
        if lines.count("\n") != len(fixed) or lines.count("\r") != len(fixed):
            raise ValueError(f"provider {name!r}: a header or API key holds a line break")
        self._head = lines.encode("latin-1")

    async def open(self, method: str, path: str, body: bytes = b"", *, accept: str = "application/json") -> Connection:
        """Send a request and return the connection with a 2xx answer's headers read; the caller releases it.

        Retries a stale keep-alive connection, a failed connect, a close before the first byte, 429 and 5xx. Raises
        what `refusals.from_answer` makes of any other status, and `ProviderError`.
        """
        request = self._render(method, path, body, accept)
        fresh = False
        tries = 0
        while True:
            pause = BACKOFF_S[tries] if tries < len(BACKOFF_S) else None
            try:
                connection, reused = await self._acquire(fresh)
            except WireError as problem:
                if pause is None:
                    raise self._error(str(problem)) from problem
                await self._wait_to_retry(pause, str(problem))
                tries += 1
                continue
            try:
                await connection.exchange(request)
            except WireError as problem:
                self.drop(connection)
                if connection.answered or isinstance(problem, IdleTimeout):
                    raise self._error(str(problem)) from problem
                if reused:
                    # The server closed the idle connection while we wrote: it never saw the request.
                    fresh = True
                    continue
                if pause is None:
                    raise self._error(f"{problem} before it answered") from problem
                await self._wait_to_retry(pause, str(problem))
                tries += 1
                continue
            except BaseException:
                self.drop(connection)
                raise
            if 200 <= connection.status < 300:
                return connection
            refusal = await self._refusal(connection)
            asked = retry_after_s(connection.headers) or 0
            if not is_transient(connection.status) or pause is None or asked > RETRY_AFTER_LIMIT_S:
                raise refusal
            await self._wait_to_retry(max(pause, asked), refusal.message)
            tries += 1

    async def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request whose answer is read whole. Raises as `open` does."""
        connection = await self.open(method, path, body)
        try:
            answer = await connection.read(BODY_LIMIT_BYTES)
        except WireError as problem:
            raise self._error(str(problem)) from problem
        finally:
            self.release(connection)
        return answer

    def release(self, connection: Connection) -> None:
        """Take a connection back: kept if its answer is complete, else closed at once."""
        if connection.usable and not self._closed and len(self._idle) < self._max_idle:
            connection.finish()
            self._idle.append(connection)
        else:
            self.drop(connection)

    def release_soon(self, connection: Connection) -> None:
        """Take back a connection whose content is complete; the end of its HTTP message may still be on the way."""
        if connection.complete or self._closed:
            self.release(connection)
            return
        timer = asyncio.get_running_loop().call_later(DRAIN_S, self.drop, connection)

        def completed(done: Connection) -> None:
            timer.cancel()
            self.release(done)

        connection.on_complete = completed

    def drop(self, connection: Connection) -> None:
        """Close a connection at once."""
        self._open.discard(connection)
        connection.abort()

    async def close(self) -> None:
        """Close every connection, also those that still carry an answer."""
        self._closed = True
        for connection in list(self._open):
            self.drop(connection)
        self._idle.clear()
        await asyncio.sleep(0)

    def _render(self, method: str, path: str, body: bytes, accept: str) -> bytes:
        content = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        if method == "POST" and not body:
            content = "Content-Length: 0\r\n"
        first = f"{method} {self.endpoint.path}{path} HTTP/1.1\r\n"
        return b"".join((first.encode(), self._head, f"Accept: {accept}\r\n{content}\r\n".encode(), body))

    async def _acquire(self, fresh: bool) -> tuple[Connection, bool]:
        if self._closed:
            raise self._error("it is closing")
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if not fresh and connection.usable and now - connection.idle_since < _keep_alive_s(connection):
                return connection, True
            self.drop(connection)
        return await self._connect(), False

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        connection = Connection(loop, self._idle_timeout_s)
        at = self.endpoint
        name = at.host if at.tls else None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if at.socket:
                    await loop.create_unix_connection(lambda: connection, at.socket)
                else:
                    await loop.create_connection(
                        lambda: connection, at.host, at.port, ssl=self._ssl, server_hostname=name
                    )
        except ssl.SSLCertVerificationError as problem:
            raise self._error(f"its certificate is not trusted: {problem.verify_message}") from problem
        except TimeoutError as problem:
            raise WireError(f"no connection within {self._connect_timeout_s:g} s") from problem
        except OSError as problem:
            raise WireError(f"no connection: {problem.strerror or problem}") from problem
        self._open.add(connection)
        return connection

    async def _refusal(self, connection: Connection) -> HeadraceError:
        try:
            body = await connection.read(ERROR_LIMIT_BYTES)
        except WireError as problem:
            body = str(problem).encode()
        finally:
            self.release(connection)
        return from_answer(self._where, connection.status, connection.headers, body)

    async def _wait_to_retry(self, pause: float, reason: str) -> None:
        log.info("provider_retry", provider=self.name, pause_s=pause, reason=reason)
        await asyncio.sleep(pause)

    @property
    def _where(self) -> str:
        return f"provider {self.name!r} ({self.endpoint})"

    def _error(self, text: str) -> ProviderError:
        return ProviderError(f"{self._where}: {text}")


def _keep_alive_s(connection: Connection) -> float:
    """How long a resting connection is trusted: a second less than the server says, else our own limit."""
    said = connection.headers.get(b"keep-alive", b"")
    for part in said.split(b","):
        key, _, value = part.strip().partition(b"=")
        if key.lower() == b"timeout" and value.isdigit():
            return max(0.0, min(KEEP_ALIVE_S, int(value) - 1.0))
    return KEEP_ALIVE_S
