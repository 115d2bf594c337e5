"""The registry over a real Valkey: what is in force, what is not known, and that a doubt is never a 401."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
from redis.asyncio import Redis

from headrace.errors import Unavailable
from headrace.projection import Outcome, Projection
from headrace.registry import MAX_AGE_S, Registry
from schemas.control import Key, Model
from tests.support.valkey import BIG, KEY, KEYS, MODELS, OFFSETS, SHA, SMALL, Clock, Valkey, fill, put_key, put_model


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def registry(redis: Redis, clock: Clock) -> AsyncIterator[Registry]:
    made = Registry(redis, clock=clock)
    await made.start()
    yield made
    await made.stop()


async def until(holds: Callable[[], bool | Awaitable[bool]], within: float) -> None:
    """Wait for something to become true; fail after `within` seconds."""
    async with asyncio.timeout(within):
        while True:
            found = holds()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.005)


def unavailable(registry: Registry) -> bool:
    try:
        return registry.snapshot is None
    except Unavailable:
        return True


async def test_an_empty_server_is_a_doubt_and_not_an_absence(registry: Registry) -> None:
    with pytest.raises(Unavailable):
        _ = registry.snapshot
    with pytest.raises(Unavailable):
        await registry.key(SHA)
    with pytest.raises(Unavailable):
        await registry.wait_complete(0.05)


async def test_a_whole_projection_is_served(registry: Registry, projection: Projection) -> None:
    await fill(projection)
    snapshot = await registry.wait_complete(2)
    assert snapshot.resolve("fast") == snapshot.resolve("small") == SMALL
    assert snapshot.resolve("other") is None
    assert (list(snapshot.providers), list(snapshot.apps)) == (["local"], ["default"])
    assert await registry.key(SHA) == KEY
    assert await registry.key("cd" * 32) is None


async def test_a_key_is_found_by_its_id_as_well(registry: Registry, projection: Projection) -> None:
    await fill(projection)
    await registry.wait_complete(2)
    assert await registry.key_by_id(KEY.id) == KEY
    assert await registry.key_by_id(SHA) is None and await registry.key(KEY.id) is None
    revoked = msgspec.structs.replace(KEY, enabled=False)
    await put_key(projection, revoked, 1)
    await until(lambda: _is(registry.key_by_id(KEY.id), revoked), within=0.75)
    renamed = msgspec.structs.replace(KEY, id="key-2")
    await put_key(projection, renamed, 2)
    await until(lambda: _is(registry.key_by_id(KEY.id), None), within=0.75)
    assert await registry.key_by_id("key-2") == renamed
    await projection.apply("keys", SHA, None, topic=KEYS, offset=3)
    await until(lambda: _is(registry.key_by_id("key-2"), None), within=0.75)


async def _is(asked: Awaitable[Key | None], wanted: Key | None) -> bool:
    return await asked == wanted


async def test_a_name_with_an_adapter_means_its_model(registry: Registry, projection: Projection) -> None:
    tuned = msgspec.structs.replace(SMALL, adapters={"tone": "/a/tone", "law": "/a/law"})
    exact = Model(id="small:law", provider="local", backend_tag="l")
    await fill(projection, models=(tuned, exact))
    snapshot = await registry.wait_complete(2)
    for name in ("small:tone", "fast:tone"):
        assert (snapshot.resolve(name), tuned.adapter(name)) == (tuned, "tone")
    assert (snapshot.resolve("small"), tuned.adapter("small")) == (tuned, "")
    assert (snapshot.resolve("small:law"), exact.adapter("small:law")) == (exact, ""), "a model's own name is first"
    assert exact.adapter("small:tone") == "", "a fallback answers as it is"
    for name in ("small:", "small:other", "other:tone", ":tone", "small:tone:tone"):
        assert snapshot.resolve(name) is None
    await fill(projection, models=(msgspec.structs.replace(tuned, enabled=False),))
    await until(lambda: registry.snapshot.resolve("small:tone") is None, within=2)


async def test_a_server_that_answers_text_is_read_as_well(valkey: Valkey, projection: Projection) -> None:
    await fill(projection)
    client: Redis = Redis.from_url(valkey.url, decode_responses=True)
    registry = Registry(client)
    await registry.start()
    assert registry.snapshot.resolve("small") == SMALL
    assert await registry.key(SHA) == KEY
    await registry.stop()
    await client.aclose()


async def test_a_change_is_seen_within_a_quarter_of_a_second(registry: Registry, projection: Projection) -> None:
    await fill(projection)
    before = (await registry.wait_complete(2)).version
    assert await put_model(projection, BIG, 1) is Outcome.APPLIED
    await until(lambda: registry.snapshot.resolve("big") == BIG, within=0.25)
    assert registry.snapshot.version > before
    assert await projection.apply("models", "big", None, topic=MODELS, offset=2) is Outcome.APPLIED
    await until(lambda: registry.snapshot.resolve("big") is None, within=0.25)


async def test_a_change_that_was_not_announced_is_seen_by_the_poll(
    registry: Registry, projection: Projection, redis: Redis
) -> None:
    await fill(projection)
    await registry.wait_complete(2)
    generation = (await projection.state()).generation
    await redis.hset(f"hr:{generation}:models", "big", msgspec.json.encode(BIG).decode())
    await redis.incr(f"hr:{generation}:version")
    await until(lambda: registry.snapshot.resolve("big") == BIG, within=2)


async def test_what_is_confirmed_is_as_redis_has_it(registry: Registry, projection: Projection) -> None:
    await fill(projection)
    await registry.wait_complete(2)
    await registry.stop()  # from here on it follows nothing by itself
    await put_model(projection, BIG, 1)
    assert registry.snapshot.resolve("big") is None
    assert (await registry.confirmed()).resolve("big") == registry.snapshot.resolve("big") == BIG


async def test_what_cannot_be_confirmed_is_a_doubt(valkey: Valkey, registry: Registry, projection: Projection) -> None:
    await fill(projection)
    await registry.wait_complete(2)
    valkey.kill()
    try:
        with pytest.raises(Unavailable):
            await registry.confirmed()
    finally:
        valkey.start()


async def test_a_new_key_works_at_once_after_it_was_unknown(registry: Registry, projection: Projection) -> None:
    await fill(projection, keys=())
    await registry.wait_complete(2)
    for _ in range(3):
        assert await registry.key(SHA) is None
    await put_key(projection, KEY, 1)
    assert await registry.key(SHA) == KEY


async def test_lookups_that_run_together_agree_with_what_was_in_force_when_they_began(
    registry: Registry, projection: Projection
) -> None:
    await fill(projection, keys=())
    await registry.wait_complete(2)
    early = asyncio.create_task(registry.key(SHA))
    await asyncio.sleep(0)
    await put_key(projection, KEY, 1)
    assert await asyncio.gather(*(registry.key(SHA) for _ in range(50))) == [KEY] * 50
    assert await early in (None, KEY)


async def test_a_revoked_key_is_refused_when_the_change_is_seen(registry: Registry, projection: Projection) -> None:
    await fill(projection)
    await registry.wait_complete(2)
    assert await registry.key(SHA) == KEY

    async def revoked() -> bool:
        found = await registry.key(SHA)
        return found is not None and not found.enabled

    await put_key(projection, msgspec.structs.replace(KEY, enabled=False), 1)
    await until(revoked, within=0.25)


async def test_a_cached_key_is_not_used_for_longer_than_half_a_second(
    registry: Registry, projection: Projection, redis: Redis, clock: Clock
) -> None:
    await fill(projection)
    await registry.wait_complete(2)
    assert await registry.key(SHA) == KEY
    generation = (await projection.state()).generation
    await redis.hdel(f"hr:{generation}:keys", SHA)  # Behind everyone's back, without a new version.
    assert await registry.key(SHA) == KEY
    clock.now += 0.51
    assert await registry.key(SHA) is None


async def test_a_flushed_server_is_a_doubt_until_it_is_filled_again(
    registry: Registry, projection: Projection, redis: Redis
) -> None:
    await fill(projection)
    before = (await registry.wait_complete(2)).version
    await redis.flushall()
    with pytest.raises(Unavailable):
        await registry.key("cd" * 32)
    await until(lambda: unavailable(registry), within=1.2)
    await fill(projection, models=(SMALL, BIG))
    await until(lambda: not unavailable(registry), within=0.5)
    assert registry.snapshot.resolve("big") == BIG
    assert registry.snapshot.version > before


async def test_a_server_that_came_back_with_old_data_is_a_doubt(
    valkey: Valkey, registry: Registry, projection: Projection, redis: Redis
) -> None:
    await fill(projection)
    await registry.wait_complete(2)
    valkey.kill()
    with pytest.raises(Unavailable):
        await registry.key("cd" * 32)
    valkey.start()
    await valkey.answer(redis)
    state = await projection.state()
    assert (state.offsets, state.complete) == (OFFSETS, False)
    with pytest.raises(Unavailable):
        await registry.key(SHA)
    assert await put_key(projection, KEY, 9) is Outcome.INCOMPLETE
    await fill(projection)
    await registry.wait_complete(2)
    assert await registry.key(SHA) == KEY


async def test_a_snapshot_that_is_not_confirmed_is_not_answered_from(
    valkey: Valkey, registry: Registry, projection: Projection, clock: Clock
) -> None:
    await fill(projection)
    await registry.wait_complete(2)
    valkey.kill()
    try:
        assert registry.snapshot.resolve("small") == SMALL  # A blip does not stop the service,
        clock.now += MAX_AGE_S + 0.1
        with pytest.raises(Unavailable):  # but an absence does.
            _ = registry.snapshot
        with pytest.raises(Unavailable):
            await registry.key(SHA)
    finally:
        valkey.start()
