"""The cache of what models are, over a real Valkey: whole or record by record, and twice is once."""

from __future__ import annotations

import msgspec
from redis.asyncio import Redis

from headrace.model_facts import FactsCache
from schemas.events import ModelCard

ONE, TWO = (ModelCard("w1", name, "p", "t", 1) for name in ("one", "two"))


async def test_records_are_applied_in_order_and_twice_is_once(redis: Redis) -> None:
    cache = FactsCache(redis)
    assert await cache.next() is None and await cache.cards() == []
    for _ in range(2):
        await cache.apply("w1/one", msgspec.json.encode(ONE), 4)
    assert await cache.cards() == [ONE] and await cache.next() == 5
    await cache.apply("w1/one", None, 5)
    assert await cache.cards() == [] and await cache.next() == 6


async def test_a_whole_one_replaces_all(redis: Redis) -> None:
    cache = FactsCache(redis)
    await cache.apply("w1/one", msgspec.json.encode(ONE), 9)
    await cache.replace({"w1/two": msgspec.json.encode(TWO)}, 7)
    assert await cache.cards() == [TWO] and await cache.next() == 7
    await cache.replace({}, 8)
    assert await cache.cards() == [] and await cache.next() == 8
