"""The projection over a real Valkey: each record once, whole generations only."""

from __future__ import annotations

import msgspec
from redis.asyncio import Redis

from headrace.projection import CommandOutcome, Outcome, Projection
from tests.support.valkey import BIG, MODELS, OFFSETS, SMALL, fill, put_model


async def test_a_record_is_applied_once_and_in_order(projection: Projection) -> None:
    await fill(projection)
    assert await put_model(projection, BIG, 5) is Outcome.APPLIED
    version = (await projection.state()).version
    assert await put_model(projection, msgspec.structs.replace(BIG, backend_tag="old"), 5) is Outcome.KNOWN
    assert await put_model(projection, msgspec.structs.replace(BIG, backend_tag="old"), 4) is Outcome.KNOWN
    state = await projection.state()
    assert (state.version, state.offsets[MODELS]) == (version, 6)
    assert msgspec.json.encode(BIG) in await projection.records("models")


async def test_nothing_is_applied_to_a_projection_that_is_not_whole(projection: Projection, redis: Redis) -> None:
    assert await put_model(projection, BIG, 0) is Outcome.INCOMPLETE
    assert await redis.dbsize() == 0


async def test_a_generation_that_is_behind_is_not_put_into_force(projection: Projection) -> None:
    await fill(projection)
    behind = await projection.begin({}, OFFSETS)
    await put_model(projection, BIG, 1)
    assert await projection.flip(behind, OFFSETS) == "behind"
    assert len(await projection.records("models")) == 2
    assert await projection.flip(behind, OFFSETS, force=True) == "flipped"
    assert await projection.records("models") == []


async def test_a_generation_that_the_server_forgot_is_not_put_into_force(projection: Projection, redis: Redis) -> None:
    lost = await projection.begin({"models": {"small": msgspec.json.encode(SMALL)}}, OFFSETS)
    await redis.flushall()
    assert await projection.flip(lost, OFFSETS) == "lost"
    assert not (await projection.state()).complete


async def test_old_and_dropped_generations_leave_nothing_behind(projection: Projection, redis: Redis) -> None:
    await fill(projection)
    await fill(projection, models=(BIG,))
    await projection.drop(await projection.begin({"models": {"x": b"{}"}}, OFFSETS))
    generation = (await projection.state()).generation
    parts = ("models", "providers", "apps", "keys", "key_ids", "offsets", "version", "complete")
    assert {key.decode() for key in await redis.keys("*")} == {"hr:gen", *(f"hr:{generation}:{part}" for part in parts)}
    assert await redis.ttl(f"hr:{generation}:models") == -1


async def test_outcomes_of_commands_can_be_asked_for(projection: Projection) -> None:
    assert await projection.outcome("c1") is None
    await projection.tell([CommandOutcome("c1", "refused", "because")])
    assert await projection.outcome("c1") == CommandOutcome("c1", "refused", "because")
