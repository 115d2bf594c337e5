"""Calls of the chat API as tests make them: raw, so that every byte and header can be looked at."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.gateway.spec import Spec
from tests.support.stacks import NO_TLS, Stack

TIMEOUT = httpx.Timeout(60.0)
_TOKEN = re.compile(r"t(\d+)@")


def body(spec: Spec | str, *, model: str = "bench", **fields: object) -> dict[str, Any]:
    """A chat body whose prompt steers the upstream."""
    prompt = spec if isinstance(spec, str) else f"count\n{spec.line()}"
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **fields}


def fresh(name: str) -> str:
    """A name that the upstream has not seen."""
    return f"{name}-{uuid.uuid4().hex[:12]}"


def numbers(text: str) -> list[int]:
    """The sequence numbers of the tokens in a text."""
    return [int(number) for number in _TOKEN.findall(text)]


@dataclass
class Seen:
    """What a caller saw of one stream."""

    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    last_id: str | None = None
    """Id of the last event that has one: where to resume."""
    began: dict[int, float] = field(default_factory=dict)
    """Attempt -> when its first event came, in Unix seconds."""
    error: dict[str, Any] | None = None
    done: bool = False
    broken: bool = False
    """Whether the connection ended in the middle."""

    @property
    def request_id(self) -> str:
        return self.headers["x-request-id"]

    @property
    def completion_id(self) -> str:
        return self.headers["x-hr-stream-id"]

    @property
    def text(self) -> str:
        return "".join(
            choice["delta"].get("content") or "" for chunk in self.chunks for choice in chunk.get("choices", ())
        )

    @property
    def tokens(self) -> list[int]:
        return numbers(self.text)

    @property
    def finish(self) -> str | None:
        reasons = [choice["finish_reason"] for chunk in self.chunks for choice in chunk.get("choices", ())]
        return next((reason for reason in reasons if reason), None)

    def take(self, line: str) -> None:
        """Take a line of the stream."""
        if line.startswith("id: "):
            self.last_id = line[4:]
            self.began.setdefault(int(self.last_id.partition(":")[0]), time.time())
        elif line.startswith("data: "):
            assert not self.done, f"after [DONE]: {line}"
            if line == "data: [DONE]":
                self.done = True
                return
            event = json.loads(line[6:])
            if "error" in event:
                self.error = event["error"]
            else:
                self.chunks.append(event)


class Api:
    """The API of a stack as one key sees it; `ingress` is the number of the ingress, from 0."""

    def __init__(self, stack: Stack, *, key: str | None = None, ingress: int = 0) -> None:
        self._stack = stack
        self._headers = {"authorization": f"Bearer {key or stack.key}"}
        self._ingress = ingress
        self.client = httpx.AsyncClient(timeout=TIMEOUT, limits=httpx.Limits(max_connections=None), verify=NO_TLS)

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()

    def url(self, path: str) -> str:
        return self._stack.ingress_urls[self._ingress] + path

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(self.url(path), headers={**self._headers, **headers})

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.client.post(self.url(path), json=body, headers=self._headers)

    async def ask(self, body: dict[str, Any] | bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        """A whole answer; `body` as bytes is sent as it is."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        content = {"content-type": "application/json"}
        sent = {**self._headers, **content, **(headers or {})}
        return await self.client.post(self.url("/v1/chat/completions"), content=raw, headers=sent)

    async def answers(self, model: str = "bench") -> bool:
        """Whether a chat request is answered now."""
        try:
            return (await self.ask(body(Spec(tokens=1, interval_ms=1), model=model, max_tokens=2))).status_code == 200
        except httpx.TransportError:
            return False

    @asynccontextmanager
    async def open(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> AsyncIterator[Reader]:
        """A stream that the caller may leave."""
        sent = {**self._headers, **(headers or {})}
        asked = self.client.stream(
            "POST", self.url("/v1/chat/completions"), json={**body, "stream": True}, headers=sent
        )
        async with asked as response:
            yield Reader(response)

    async def stream(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> Seen:
        """A stream read to its end, or to where it broke; an error answer is in `error`."""
        async with self.open(body, headers) as reader:
            return await reader.rest()

    async def resume(self, completion_id: str, last_id: str | None = None, *, by_query: bool = False) -> Seen:
        """The rest of a stream after an event."""
        async with self.follow(completion_id, last_id, by_query=by_query) as reader:
            return await reader.rest()

    @asynccontextmanager
    async def follow(
        self, completion_id: str, last_id: str | None = None, *, by_query: bool = False
    ) -> AsyncIterator[Reader]:
        """The rest of a stream, from which the caller may leave."""
        headers, query = dict(self._headers), ""
        if last_id is not None and by_query:
            query = f"?starting_after={last_id}"
        elif last_id is not None:
            headers["last-event-id"] = last_id
        url = self.url(f"/v1/chat/completions/{completion_id}/stream{query}")
        async with self.client.stream("GET", url, headers=headers) as response:
            yield Reader(response)


class Reader:
    """A stream on its way."""

    def __init__(self, response: httpx.Response) -> None:
        self.seen = Seen(response.status_code, response.headers)
        self._response = response
        self._lines = response.aiter_lines()

    async def until_tokens(self, count: int) -> Seen:
        """Read until at least `count` tokens are there."""
        while len(self.seen.tokens) < count:
            self.seen.take(await anext(self._lines))
        return self.seen

    async def until_text(self) -> Seen:
        """Read until there is some text, or the answer turns out to have none."""
        while self.seen.status == 200 and not (self.seen.text or self.seen.done or self.seen.error or self.seen.broken):
            try:
                self.seen.take(await anext(self._lines))
            except (StopAsyncIteration, httpx.TransportError):
                self.seen.broken = True
        return self.seen

    async def close(self) -> None:
        """Leave."""
        await self._response.aclose()

    async def rest(self) -> Seen:
        """Read to the end, or to where the connection broke."""
        if self.seen.status != 200:
            answer = json.loads(await self._response.aread())
            self.seen.error = answer.get("error", answer)
            return self.seen
        try:
            async for line in self._lines:
                self.seen.take(line)
        except httpx.TransportError:
            self.seen.broken = True
        return self.seen
