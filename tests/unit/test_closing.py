"""Kafka clients are closed in bounded time, whatever they do with a cancellation."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from topics import clients


async def test_a_client_that_suppresses_cancellations_is_closed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "CLOSE_S", 0.05)
    suppressed = 0

    async def stop() -> None:
        nonlocal suppressed
        for _ in range(3):  # as aiokafka waits for one of its tasks after the other
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                suppressed += 1
        await asyncio.Event().wait()

    async with asyncio.timeout(10):
        await clients.close("stubborn", stop())
    assert suppressed == 3


async def test_what_a_client_says_when_it_closes_is_heard() -> None:
    async def stop() -> None:
        raise ConnectionError("not in order")

    with pytest.raises(ConnectionError, match="not in order"):
        await clients.close("failing", stop())


async def test_who_closes_a_client_may_be_cancelled() -> None:
    ended = asyncio.Event()

    async def stop() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    closing = asyncio.create_task(clients.close("slow", stop()))
    await asyncio.sleep(0.01)
    closing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    assert ended.is_set()
