"""An asynchronous publisher: many requests in flight over one producer and one reader of `replies.<app>`."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec
import structlog
from aiokafka.errors import KafkaError
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from headrace.cancellation import end
from headrace.published_answers import CHUNK_TYPE, RESULT_TYPE
from headrace.publisher.messages import Identity, cancel_headers, signed_headers
from schemas.ids import new_published_id
from topics.catalogue import REQUESTS, answers_of
from topics.clients import LogReader, Producer
from topics.cluster import Cluster
from topics.record import Record

log = structlog.get_logger(__name__)

DEADLINE_S = 600.0
SPARE_S = 15.0
"""How much longer than its deadline a request is waited for: its end must still travel."""


class PublishedError(Exception):
    """A request ended without an answer; `status`, `code` and `message` are those of OpenAI's error object."""

    def __init__(self, request_id: str, status: int, error: Mapping[str, Any], retry_after_s: int | None) -> None:
        super().__init__(f"{error.get('code')}: {error.get('message')} (request {request_id})")
        self.request_id = request_id
        self.status = status
        """The HTTP status that the same error has over HTTP."""
        self.code: str | None = error.get("code")
        self.message: str = error.get("message") or ""
        self.param: str | None = error.get("param")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of a streamed answer: OpenAI's `chat.completion.chunk`."""

    request_id: str
    seq: int
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """The text that it adds to the first choice."""
        return next(
            (choice["delta"].get("content") or "" for choice in self.body["choices"] if choice["index"] == 0), ""
        )


@dataclass(frozen=True, slots=True)
class Result:
    """The whole answer: OpenAI's `chat.completion`."""

    request_id: str
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.body["choices"][0]["message"].get("content") or ""


@dataclass(slots=True)
class _Waiting:
    answers: asyncio.Queue[Chunk | Result | PublishedError | KafkaError] = field(default_factory=asyncio.Queue)
    seq: int = 0


class Publisher:
    """Publishes requests for one app, and waits for their answers. Use it as `async with Publisher(…) as publisher`."""

    def __init__(
        self,
        cluster: Cluster | str,
        *,
        app: str,
        key_id: str,
        private_key: Ed25519PrivateKey | str,
        api_key_id: str = "",
        source: str = "/headrace/publisher",
    ) -> None:
        """`cluster` may be just `host:port,…`; `private_key` may be its 32 bytes in base64.

        `key_id` is the name under which the app holds the public key.
        """
        if isinstance(private_key, str):
            private_key = Ed25519PrivateKey.from_private_bytes(base64.b64decode(private_key))
        self._identity = Identity(app, key_id, private_key, api_key_id, source)
        self._cluster = cluster if isinstance(cluster, Cluster) else Cluster(cluster)
        self._producer = Producer(self._cluster, f"publisher-{app}")
        self._reader = LogReader(self._cluster, f"publisher-{app}", max_wait_ms=1000)
        self._waiting: dict[str, _Waiting] = {}
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect, and read answers from now on. Raises `KafkaError`, such as `AccessRefused`."""
        await self._producer.start()
        await self._reader.start()
        partitions = self._reader.assign([answers_of(self._identity.app)])
        ends = await self._reader.consumer.end_offsets(partitions)
        for partition, offset in ends.items():
            self._reader.consumer.seek(partition, offset)
        self._reading = asyncio.create_task(self._read())
        self._reading.add_done_callback(self._read_ended)

    async def stop(self) -> None:
        """Close. What is in flight goes on without us; its answers stay on the topic for a day."""
        if self._reading is not None:
            await end(self._reading)
        await self._reader.stop()
        await self._producer.stop()

    async def __aenter__(self) -> Publisher:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # --- asking -----------------------------------------------------------------------------------------------

    def new_id(self) -> str:
        """An id for `chat` or `stream`: with one of your own you can cancel, and a retry under it runs only once."""
        return new_published_id(self._identity.app)

    async def chat(
        self,
        body: Mapping[str, Any],
        *,
        request_id: str | None = None,
        deadline_s: float = DEADLINE_S,
        priority: str = "standard",
    ) -> Result:
        """The answer to a chat request, whose body is OpenAI's.

        Raises `PublishedError` with why there is none, `TimeoutError` when nothing came within the deadline (it is
        cancelled then), and `KafkaError` when it could not be published. Cancelling the task cancels the request.
        """
        async with aclosing(self._ask(body, False, request_id, deadline_s, priority)) as answers:
            async for answer in answers:
                if isinstance(answer, Result):
                    return answer
        raise AssertionError("a request ends with its result")

    async def stream(
        self,
        body: Mapping[str, Any],
        *,
        request_id: str | None = None,
        deadline_s: float = DEADLINE_S,
        priority: str = "standard",
    ) -> AsyncGenerator[Chunk | Result, None]:
        """The chunks of an answer, in their order and each once, then the whole of it. Raises as `chat` does.

        Closing the iterator early (`contextlib.aclosing`) cancels the request.
        """
        async with aclosing(self._ask(body, True, request_id, deadline_s, priority)) as answers:
            async for answer in answers:
                yield answer

    async def cancel(self, request_id: str) -> None:
        """Ask for the end of a request of this app; who waits for it gets a `PublishedError` of code `cancelled`."""
        headers = cancel_headers(self._identity, request_id, now_ms=_now_ms())
        await self._producer.send(REQUESTS.name, b"", key=request_id, headers=headers)

    async def _ask(
        self, body: Mapping[str, Any], stream: bool, request_id: str | None, deadline_s: float, priority: str
    ) -> AsyncGenerator[Chunk | Result, None]:
        request_id = request_id or self.new_id()
        wishes = {"hr-deadline": f"{deadline_s:g}"}
        if stream:
            wishes["hr-stream"] = "true"
        if priority != "standard":
            wishes["hr-priority"] = priority
        raw = msgspec.json.encode(body)
        headers = signed_headers(self._identity, request_id, raw, now_ms=_now_ms(), wishes=wishes)
        waiting = self._waiting[request_id] = _Waiting()
        ended = False
        try:
            async with asyncio.timeout(deadline_s + SPARE_S):
                await self._producer.send(REQUESTS.name, raw, key=request_id, headers=headers)
                while not ended:
                    answer = await waiting.answers.get()
                    ended = not isinstance(answer, Chunk)
                    if isinstance(answer, Exception):
                        raise answer
                    yield answer
        finally:
            self._waiting.pop(request_id, None)
            if not ended:
                await self.cancel(request_id)

    # --- answers ----------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            batches = await self._reader.consumer.getmany(timeout_ms=1000)
            for records in batches.values():
                for record in records:
                    self._take(record)

    def _read_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("answers_not_read", error=repr(error))
            for waiting in self._waiting.values():
                waiting.answers.put_nowait(KafkaError(f"answers cannot be read: {error!r}"))

    def _take(self, record: Record) -> None:
        request_id = (record.key or b"").decode(errors="replace")
        waiting = self._waiting.get(request_id)
        if waiting is None or record.value is None:
            return
        told = {name: value.decode() for name, value in record.headers}
        body = msgspec.json.decode(record.value)
        if told["ce_type"] == CHUNK_TYPE:
            seq = int(told["hr-seq"])
            if seq > waiting.seq:  # Others came before; they may come twice.
                waiting.seq = seq
                waiting.answers.put_nowait(Chunk(request_id, seq, body))
        elif told["ce_type"] == RESULT_TYPE:
            if "error" in body:
                retry = told.get("hr-retry-after")
                status = int(told["hr-http-status"])
                error = PublishedError(request_id, status, body["error"], int(retry) if retry is not None else None)
                waiting.answers.put_nowait(error)
            else:
                waiting.answers.put_nowait(Result(request_id, body))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
