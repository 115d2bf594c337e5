"""Records as the roles write them, a running sink, and waiting for its rows: for tests on the real stack."""

# ruff: noqa: S608  (ids that the tests make stand in the statements)
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal

import msgspec
from aiokafka.structs import RecordMetadata

from headrace import sql
from headrace.settings import Settings
from processors.sink import role
from schemas.events import AttemptOpened, LifecycleEvent, LogRecord, Stage, Status, Terminal, Timings, UsageEvent
from schemas.ids import new_request_id, usage_id
from topics.clients import Producer

TENANT = "sink-test"
VISIBLE_S = 20.0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def running(conf: Settings) -> AsyncIterator[asyncio.Task[None]]:
    """A sink; on leaving it is told to stop, and must do so in order."""
    stop = asyncio.Event()
    task = asyncio.create_task(role.run(conf, stop))
    try:
        yield task
    finally:
        stop.set()
        if not task.cancelled():
            await asyncio.wait_for(task, 20)


def ask(conf: Settings, text: str) -> list[tuple[object, ...]]:
    return [tuple(row) for row in sql.run(conf, text, {}).rows]


async def eventually(check: Callable[[], Awaitable[bool]], what: str, within_s: float = VISIBLE_S) -> float:
    """Wait for `check`, and say how long it took in seconds."""
    started = time.monotonic()
    while time.monotonic() - started < within_s:
        if await check():
            return time.monotonic() - started
        await asyncio.sleep(0.02)
    raise TimeoutError(f"not within {within_s} s: {what}")


async def visible(conf: Settings, text: str, expected: list[tuple[object, ...]]) -> float:
    seen: list[tuple[object, ...]] = []

    async def check() -> bool:
        seen[:] = await asyncio.to_thread(ask, conf, text)
        return seen == expected

    try:
        return await eventually(check, text[:300])
    except TimeoutError as error:
        raise AssertionError(f"{error}: expected {expected}, have {seen[:10]}") from None


async def send_log(producer: Producer, event: LogRecord) -> RecordMetadata:
    return await producer.send("inference.log", msgspec.json.encode(event), key=event.request_id)


async def send_usage(producer: Producer, request_id: str, cost: str = "0.25", tenant: str = TENANT) -> RecordMetadata:
    at = now_ms()
    event = UsageEvent(
        usage_id=usage_id(tenant, request_id), request_id=request_id, tenant=tenant, key_id="k", model="m", alias="m",
        provider="p", worker="w", status=Status.COMPLETED, attempts=1, prompt_tokens=3, cached_tokens=0,
        completion_tokens=4, reasoning_tokens=0, estimated=False, price_version=1, currency="USD", cost=Decimal(cost),
        stream=False, accepted_ms=at, finished_ms=at, queue_ms=0, ttft_ms=1, generation_ms=2,
    )  # fmt: skip
    return await producer.send("usage.events", msgspec.json.encode(event), key=tenant)


async def send_event(producer: Producer, request_id: str, stage: Stage = Stage.ACCEPTED) -> RecordMetadata:
    event = LifecycleEvent(request_id, TENANT, stage, now_ms(), "ingress", "i1", detail={"model": "m", "n": 1})
    return await producer.send("inference.events", msgspec.json.encode(event), key=request_id)


def terminal(request_id: str, attempt: int = 1, status: Status = Status.COMPLETED) -> Terminal:
    times = Timings(accepted_ms=now_ms() - 50, finished_ms=now_ms())
    return Terminal(request_id, TENANT, attempt, 1, status, model="m", timings=times, choices=msgspec.Raw(b'[{"x":1}]'))


async def settled(conf: Settings, producer: Producer) -> None:
    """Wait until the sink has joined its group and reads: a first row is there."""
    request_id = new_request_id()
    await send_usage(producer, request_id, tenant="warm-up")
    await visible(conf, f"SELECT count() FROM usage WHERE request_id = '{request_id}'", [(1,)])


class Traffic:
    """Requests whose first worker dies: its terminal comes late and is void, the second attempt's decides."""

    def __init__(self, producer: Producer) -> None:
        self.request_ids: list[str] = []
        self._producer = producer
        self._done = asyncio.Event()

    async def __aenter__(self) -> Traffic:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._done.set()
        await self._task

    async def _run(self) -> None:
        while not self._done.is_set():
            request_id = new_request_id()
            await send_log(self._producer, AttemptOpened(request_id, TENANT, 2, 1, "w2", "lost", now_ms()))
            await send_log(self._producer, terminal(request_id, 1, Status.FAILED))
            await send_log(self._producer, terminal(request_id, 2))
            await send_usage(self._producer, request_id)
            self.request_ids.append(request_id)

    async def all_visible(self, conf: Settings) -> None:
        """Wait until every request has one row of its second attempt, and one usage."""
        ids = ", ".join(f"'{request_id}'" for request_id in self.request_ids)
        await visible(
            conf,
            "SELECT count(), uniqExact(request_id), countIf(attempts = 2), countIf(u.cost = 0.25) "
            f"FROM requests r JOIN usage u USING (tenant, request_id) WHERE request_id IN ({ids})",
            [(len(self.request_ids),) * 4],
        )
