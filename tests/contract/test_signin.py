"""Sessions, lockout and users over a real Valkey."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from redis.asyncio import Redis

from headrace.errors import InvalidToken, TooManyAttempts
from headrace.projection import Projection
from headrace.redis_client import connect
from headrace.registry import Registry
from ingress.signin.attempts import FREE_BY_ACCOUNT, FREE_BY_ADDRESS, Attempts
from ingress.signin.sessions import AGE_S, Sessions
from schemas.control import User
from tests.support.valkey import KEY, Clock, Valkey, fill

ADA = User(id="u1", email="ada@example.org", password_hash="$argon2id$x")


async def test_a_refresh_token_is_good_once_and_used_again_ends_the_session(redis: Redis) -> None:
    sessions = Sessions(redis)
    session_id, first = await sessions.begin(ADA)
    assert first.partition(".")[2].encode() not in b"".join([await redis.get(key) for key in await redis.keys("hr:s*")])
    same_id, session, second = await sessions.refresh(first)
    assert (same_id, session.user) == (session_id, "u1") and session.is_of(ADA)
    await sessions.refresh(second)
    with pytest.raises(InvalidToken):
        await sessions.refresh(first)
    assert await Sessions(redis).get(session_id) is None


async def test_a_session_that_was_ended_elsewhere_is_seen_within_half_a_second(redis: Redis) -> None:
    clock = Clock()
    here, there = Sessions(redis, clock=clock), Sessions(redis)
    session_id, _ = await here.begin(ADA)
    assert await here.get(session_id) is not None
    await there.end(session_id)
    clock.now += AGE_S + 0.01
    assert await here.get(session_id) is None


async def test_another_role_or_password_is_another_stamp(redis: Redis) -> None:
    sessions = Sessions(redis)
    session_id, _ = await sessions.begin(ADA)
    session = await sessions.get(session_id)
    assert session is not None
    assert session.is_of(msgspec.structs.replace(ADA, name="Ada", apps=("a",)))
    assert not session.is_of(msgspec.structs.replace(ADA, role="owner"))
    assert not session.is_of(msgspec.structs.replace(ADA, password_hash="$argon2id$y"))


async def test_a_server_that_comes_back_with_old_data_has_no_sessions(valkey: Valkey, redis: Redis) -> None:
    session_id, refresh = await Sessions(redis).begin(ADA)
    valkey.kill()
    valkey.start()
    client = connect(valkey.url)
    try:
        await valkey.answer(client)
        sessions = Sessions(client)
        assert await client.keys("hr:session:*"), "the data is back"
        assert await sessions.get(session_id) is None
        with pytest.raises(InvalidToken):
            await sessions.refresh(refresh)
    finally:
        await client.aclose()


async def test_failures_make_an_account_wait_and_a_success_forgets_them(redis: Redis) -> None:
    attempts = Attempts(redis)
    for _ in range(FREE_BY_ACCOUNT):
        last = await attempts.begin("ada", "10.0.0.1")
    over = await attempts.begin("ada", "10.0.0.1")
    with pytest.raises(TooManyAttempts) as waiting:
        await attempts.begin("ada", "10.0.0.2")
    assert waiting.value.retry_after_s == 1
    await attempts.begin("bob", "10.0.0.1")
    await attempts.succeeded(over)
    assert last.account == over.account
    await attempts.begin("ada", "10.0.0.1")


async def test_many_guesses_at_once_are_no_more_than_the_free_ones(redis: Redis) -> None:
    attempts = Attempts(redis)
    tried = await asyncio.gather(*(attempts.begin("ada", "10.0.0.3") for _ in range(40)), return_exceptions=True)
    assert sum(not isinstance(one, TooManyAttempts) for one in tried) == FREE_BY_ACCOUNT + 1


async def test_an_address_waits_too_whatever_the_account(redis: Redis) -> None:
    attempts = Attempts(redis)
    for number in range(FREE_BY_ADDRESS + 1):
        await attempts.begin(f"user {number}", "10.0.0.4")
    with pytest.raises(TooManyAttempts):
        await attempts.begin("another", "10.0.0.4")
    await attempts.begin("another", "10.0.0.5")


async def put_user(projection: Projection, user: User | None, offset: int) -> None:
    value = msgspec.json.encode(user) if user is not None else None
    await projection.apply("users", ADA.id, value, topic="control.users", offset=offset)


async def test_a_user_is_found_by_id_and_by_the_address_it_has_now(redis: Redis, projection: Projection) -> None:
    await fill(projection)
    registry = Registry(redis)
    await registry.start()
    try:
        await put_user(projection, ADA, 1)
        assert await registry.user("u1") == ADA == await registry.user_by_email("ada@example.org")
        moved = msgspec.structs.replace(ADA, email="ada@example.com")
        await put_user(projection, moved, 2)
        assert await registry.user_by_email("ada@example.org") is None
        assert await registry.user_by_email("ada@example.com") == moved
        assert await registry.user("u1", fresh=True) == moved
        assert await registry.callers([("user", "u1"), ("id", KEY.id), ("id", "none")]) == [moved, KEY, None]
        await put_user(projection, None, 3)
        assert await registry.user_by_email("ada@example.com") is None
    finally:
        await registry.stop()
