"""The callers: each asks once, when its time has come, reads the stream, and notes what it saw."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping, Sequence

import httpx
import msgspec

from bench.side_by_side.workload import Ask, body_of

PATIENCE_S = 90.0
"""Seconds without a byte after which a caller gives up; that is a failure, and no leaving."""
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Everything is plain HTTP; reading the trusted certificates would take longer than a call."""


class Server(msgspec.Struct, kw_only=True, frozen=True):
    """Where to ask, and as whom."""

    base_url: str
    """Like OpenAI's: ends in `/v1`."""
    keys: Mapping[str, str]
    """Tenant -> API key; none for a server that knows no tenants."""


class Seen(msgspec.Struct, kw_only=True):
    """What one caller saw. Times are seconds from its asking."""

    status: int = 0
    """Of HTTP; 0 where no answer came."""
    first_s: float | None = None
    """When the first text came."""
    end_s: float = 0.0
    finish: str = ""
    done: bool = False
    """Whether the stream ended in `[DONE]`."""
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    """As the usage says; the pieces of text where there was none."""
    error: str = ""
    """What the server said was wrong, in an answer of its own or in the stream."""
    broken: str = ""
    """How the connection failed."""
    left: bool = False
    """Whether the caller left before the end."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, object] | str | None = None


_chunk = msgspec.json.Decoder(_Chunk)


def take(seen: Seen, line: str, at_s: float) -> None:
    """Note a line of a stream that came at `at_s`. Raises `msgspec.MsgspecError` where it is not one."""
    if not line.startswith("data: "):
        return
    if line == "data: [DONE]":
        seen.done = True
        return
    chunk = _chunk.decode(line.removeprefix("data: "))
    if chunk.error is not None:
        seen.error = msgspec.json.encode(chunk.error).decode()
    for choice in chunk.choices:
        if choice.delta.content:
            seen.first_s = at_s if seen.first_s is None else seen.first_s
            seen.completion_tokens += 1
        seen.finish = choice.finish_reason or seen.finish
    if chunk.usage is not None:
        seen.prompt_tokens, seen.completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens


class Callers:
    """All callers of one run, on as many connections as they need."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._client = httpx.AsyncClient(
            timeout=PATIENCE_S, verify=_NO_TLS, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )

    async def __aenter__(self) -> Callers:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def run(self, asks: Sequence[Ask]) -> list[Seen]:
        """Ask everything at its time; what each caller saw, in the order of `asks`."""
        start = time.monotonic()

        async def later(ask: Ask) -> Seen:
            await asyncio.sleep(max(0.0, start + ask.at_s - time.monotonic()))
            return await self.ask(ask)

        return list(await asyncio.gather(*map(later, asks)))

    async def ask(self, ask: Ask, *, leaves_after: int | None = None) -> Seen:
        """Ask once. The caller leaves when its time is up, or after so many pieces of text."""
        seen, began = Seen(), time.monotonic()
        try:
            async with asyncio.timeout(ask.leaves_s):
                await self._read(ask, seen, began, leaves_after)
        except TimeoutError:
            seen.left = True
        except (httpx.HTTPError, msgspec.MsgspecError) as error:
            seen.broken = repr(error)
        seen.end_s = time.monotonic() - began
        return seen

    async def _read(self, ask: Ask, seen: Seen, began: float, leaves_after: int | None) -> None:
        key = self._server.keys.get(ask.tenant)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = f"{self._server.base_url}/chat/completions"
        async with self._client.stream("POST", url, json=body_of(ask), headers=headers) as response:
            seen.status = response.status_code
            if response.status_code != 200:
                seen.error = (await response.aread()).decode(errors="replace")
                return
            async for line in response.aiter_lines():
                take(seen, line, time.monotonic() - began)
                if leaves_after is not None and seen.completion_tokens >= leaves_after:
                    seen.left = True
                    return
