"""Whether a part answers: the cheapest question each of them knows, over a plain socket."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

_TIMEOUT = 5.0


async def _ask(host: str, port: int, question: bytes) -> bytes:
    async with asyncio.timeout(_TIMEOUT):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(question)
            await writer.drain()
            return await reader.read(4096)
        finally:
            writer.close()


async def kafka_answers(bootstrap: str) -> bool:
    """Whether a broker answers ApiVersions (version 0) at `host:port`."""
    host, _, port = bootstrap.partition(":")
    correlation = 7
    body = struct.pack(">hhih", 18, 0, correlation, -1)
    try:
        answer = await _ask(host, int(port), struct.pack(">i", len(body)) + body)
    except (OSError, TimeoutError):
        return False
    return len(answer) >= 10 and struct.unpack_from(">ih", answer, 4) == (correlation, 0)


async def valkey_answers(url: str) -> bool:
    """Whether a Redis-like server at a `redis://` URL says PONG."""
    parts = urlsplit(url)
    login = f"AUTH {parts.password}\r\n" if parts.password else ""
    try:
        answer = await _ask(parts.hostname or "127.0.0.1", parts.port or 6379, f"{login}PING\r\n".encode())
        return b"+PONG" in answer or (answer == b"+OK\r\n" and bool(login))
    except (OSError, TimeoutError):
        return False


async def http_answers(url: str) -> bool:
    """Whether a GET of an `http://` URL is answered by 200."""
    parts = urlsplit(url)
    try:
        answer = await _ask(parts.hostname or "127.0.0.1", parts.port or 80, _question(parts))
    except (OSError, TimeoutError):
        return False
    return answer.split(b" ", 2)[1:2] == [b"200"]


@dataclass(frozen=True, slots=True)
class Health:
    """What an ingress says of itself in `/health/ready`."""

    ready: bool = False
    waiting_for: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether it serves, and nothing is on its way any more."""
        return self.ready and not self.waiting_for


async def health(url: str) -> Health:
    """How the ingress at this URL stands; not ready when it does not answer."""
    try:
        said = json.loads(await _http_body(f"{url}/health/ready"))
        return Health(said["status"] == "ready", said["waiting_for"], said["failed"])
    except (ValueError, KeyError, TypeError):
        return Health()


def _question(parts: SplitResult) -> bytes:
    return f"GET {parts.path or '/'} HTTP/1.0\r\nHost: {parts.hostname}\r\nConnection: close\r\n\r\n".encode()


async def _http_body(url: str) -> bytes:
    """The body that a GET of an `http://` URL is answered with, whatever its status; empty without an answer."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_TIMEOUT):
            reader, writer = await asyncio.open_connection(parts.hostname or "127.0.0.1", parts.port or 80)
            try:
                writer.write(_question(parts))
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""
    return answer.partition(b"\r\n\r\n")[2]


async def until(answers: Callable[[], Awaitable[bool]], deadline: float, pause: float = 0.05) -> bool:
    """Ask again and again until the answer is yes; False after `deadline` seconds."""
    try:
        async with asyncio.timeout(deadline):
            while not await answers():  # noqa: ASYNC110 - what is waited for is in another process
                await asyncio.sleep(pause)
    except TimeoutError:
        return False
    return True
