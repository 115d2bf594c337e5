"""Places that no terminal will give back any more: the reaper asks the log who has ended, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from headrace.cancellation import end
from headrace.limits import lua
from headrace.limits.amounts import Worst
from headrace.limits.limiter import ROUTE, Limiter
from headrace.limits.scopes import Scope
from headrace.redis_client import connect
from headrace.settings import Settings
from processors.metering import settlement
from processors.metering.settlement import Settlement
from schemas.ids import idempotent_request_id, new_request_id
from tests.support.chat import fresh
from tests.support.projections import TENANT, send_log, terminal
from tests.support.valkey import Valkey
from tests.support.waiting import until
from topics.catalogue import LOG
from topics.clients import Producer

SCOPE = Scope("key", "k", None, None, 8, None)


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Redis]:
    server = Valkey(tmp_path)
    server.start()
    client = connect(server.url)
    await server.answer(client)
    yield client
    await client.aclose()
    server.kill()


@contextlib.asynccontextmanager
async def settling(conf: Settings, limiter: Limiter, partition: int) -> AsyncIterator[None]:
    """A member of the metering group that has one partition."""
    made = Settlement(conf, limiter)
    made.gained(frozenset({partition}))
    task = asyncio.create_task(made.run())
    try:
        yield
    finally:
        await end(task)


def beside(request_id: str) -> str:
    """Another request whose records are in the same partition."""
    return next(other for other in iter(new_request_id, "") if LOG.partition_of(other) == LOG.partition_of(request_id))


@pytest.mark.parametrize("searched", [False, True], ids=["of late", "long ago"])
async def test_a_place_is_given_back_when_the_log_has_its_end(
    infra: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch, searched: bool
) -> None:
    """Its terminal was settled, and its routed record was read again when nobody remembered that any more."""
    monkeypatch.setattr(settlement, "REAP_EVERY_S", 0.1)
    monkeypatch.setattr(settlement, "REAP_AFTER_MS", 0)
    if searched:
        monkeypatch.setattr(settlement, "LONGEST_REQUEST_MS", 0)
    ended = idempotent_request_id(TENANT, fresh("key")) if searched else new_request_id()
    runs, limiter = beside(ended), Limiter(redis)
    async with Producer(infra.kafka, "test") as producer:
        written = await send_log(producer, terminal(ended))
        settled = f"{written.partition} {written.offset + 1}"
        await redis.register_script(lua.FLIP)(args=["", "197001", 1, settled])
        for request_id in (ended, runs):
            await limiter.admit(TENANT, request_id, [SCOPE], Worst(1, 0, 1), "m", mode=ROUTE, month="202601")
        await asyncio.sleep(0.05)  # What ended is older than what is read next.
        async with settling(infra, limiter, written.partition):
            await send_log(producer, terminal(beside(ended)))

            async def given_back() -> bool:
                return (await limiter.open(bound_us=0, limit=10)).bound == 1

            await until(given_back, "one has its place back", 15)
            await asyncio.sleep(0.5)
            [(ref, _)] = (await limiter.open(bound_us=0, limit=10)).oldest
            assert ref.endswith(runs), "what has no end keeps its place, however long"
            await send_log(producer, terminal(runs))

            async def free() -> bool:
                return (await limiter.open(bound_us=0, limit=10)).bound == 0

            await until(free, "its own end gives it back", 15)
