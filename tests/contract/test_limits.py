"""Limits on a real Valkey: all or nothing, exact to the unit and the microsecond, given back once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from decimal import Decimal
from pathlib import Path

import pytest

from headrace.errors import (
    ConcurrencyLimited,
    InsufficientQuota,
    LimitExceeded,
    RequestsLimited,
    TokensLimited,
    Unavailable,
)
from headrace.limits import lua
from headrace.limits.limiter import ROUTE, Admission, ref_of
from headrace.limits.months import month_of
from headrace.limits.scopes import Scope
from tests.support.limits import (
    START_US,
    UNIT,
    WINDOW_US,
    Clocked,
    Plain,
    budget,
    by_the_tests_clock,
    limiting,
    rid,
    whole,
)

KEY = Scope("key", "k", budget=Decimal(1))
REFILLING = by_the_tests_clock(lua.REFILL)


@pytest.fixture
async def limits(tmp_path: Path) -> AsyncIterator[Clocked]:
    async with limiting(tmp_path) as made:
        yield made


async def agrees_with_its_log(limits: Clocked, scopes: Iterable[Scope]) -> None:
    """What is kept as sums is what the log of each window says, and goes by itself unless something is open."""
    for scope in scopes:
        kept = await limits.redis.hgetall(f"hr:lim:s:{scope.name}")
        logged = await limits.redis.zrange(f"hr:lim:w:{scope.name}", 0, -1)
        sums = int(kept.get(b"requests", 0)), int(kept.get(b"tokens", 0))
        assert sums == (len(logged), sum(int(one.rpartition(b":")[2]) for one in logged))
        expires = await limits.redis.pttl(f"hr:lim:s:{scope.name}")
        assert (expires == -1) == (int(kept.get(b"open", 0)) > 0), "-2 where there is no key"


def refused(found: object, kind: type[LimitExceeded]) -> LimitExceeded:
    assert isinstance(found, kind), found
    return found


async def test_a_window_slides_by_the_microsecond(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=3)
    for number in range(3):
        await limits.at(START_US + number * 1_000_000)
        found = await limits.take(number, scope)
        assert isinstance(found, Admission)
        assert found.headers["x-ratelimit-remaining-requests"] == str(2 - number)
        assert found.headers["x-ratelimit-reset-requests"] == "1m0s"
    await limits.at(START_US + WINDOW_US - 1)
    error = refused(await limits.take(9, scope), RequestsLimited)
    assert (error.param, error.retry_after_s) == ("key.rate_limit_rpm", 1)
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "2.001s"
    await limits.at(START_US + WINDOW_US)
    assert isinstance(await limits.take(9, scope), Admission)
    refused(await limits.take(10, scope), RequestsLimited)


async def test_tokens_say_when_enough_of_them_are_free_again(limits: Clocked) -> None:
    scope = Scope("app", "a", tpm=1000)
    for number in range(10):
        await limits.at(START_US + number * 1_000_000)
        assert isinstance(await limits.take(number, scope, tokens=100), Admission)
    error = refused(await limits.take(99, scope, tokens=250), TokensLimited)
    assert error.retry_after_s == 53  # the third of them leaves after 62 s, and 9 have passed
    assert "250" in error.message
    assert "app 'a'" in error.message
    never = refused(await limits.take(99, scope, tokens=1001), TokensLimited)
    assert never.retry_after_s is None
    assert "never" in never.message


async def test_what_a_request_came_to_takes_the_place_of_what_was_reserved(limits: Clocked) -> None:
    scope = Scope("key", "k", tpm=1000)
    await limits.take(1, scope, tokens=900)
    refused(await limits.take(2, scope, tokens=200), TokensLimited)
    await limits.end(1, 0, tokens=40)
    assert (await limits.used(scope))[:3] == (1, 40, 0)
    assert isinstance(await limits.take(2, scope, tokens=960), Admission)


async def test_all_scopes_or_none(limits: Clocked) -> None:
    key, model = Scope("key", "k", rpm=10, budget=Decimal(5)), Scope("model", "m", concurrency=1)
    assert isinstance(await limits.take(1, key, model, units=UNIT), Admission)
    before = await limits.used(key)
    error = refused(await limits.take(2, key, model, units=UNIT), ConcurrencyLimited)
    assert error.param == "model.concurrency_limit"
    assert await limits.used(key) == before == (1, 1, 1, 0, UNIT)


async def test_the_refusal_that_lasts_longest_is_told(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=1, concurrency=1, budget=Decimal(1))
    await limits.take(1, scope, units=UNIT)
    await limits.end(1, 0, ["key:k"], units=UNIT)
    error = refused(await limits.take(2, scope, units=1), InsufficientQuota)
    assert (error.status, error.code, error.type, error.waits) == (
        429,
        "insufficient_quota",
        "insufficient_quota",
        True,
    )
    assert error.retry_after_s == 31 * 86400  # to the first of February
    assert "1e-12" not in error.message
    assert "0.000000000001" in error.message


async def test_a_budget_is_used_to_its_last_unit_and_no_further(limits: Clocked) -> None:
    scope = Scope("key", "k", budget=Decimal("90071992547409.930000000001"))
    units = 90071992547409930000000000
    assert isinstance(await limits.take(1, scope, units=units), Admission)
    held = refused(await limits.take(2, scope, units=2), InsufficientQuota)
    assert (held.waits, held.retry_after_s) == (False, 1), "what runs may cost less than it reserved"
    assert isinstance(await limits.take(3, scope, units=1), Admission)
    assert isinstance(await limits.take(4, scope, units=0), Admission), "what costs nothing needs no budget"
    await limits.end(1, 0, ["key:k"], units=units)
    await limits.end(3, 1, ["key:k"], units=1)
    assert (await limits.used(scope))[3:] == (units + 1, 0)
    assert refused(await limits.take(5, scope, units=1), InsufficientQuota).waits


async def test_pending_is_gone_by_itself_and_bound_never(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=5, concurrency=2, budget=Decimal(1))
    await limits.take(1, scope, units=10, bound=False)
    await limits.take(2, scope, units=10, bound=False)
    await limits.bind("t", rid(2))
    await limits.at(START_US + lua.PENDING_US - 1)
    refused(await limits.take(3, scope, bound=False), ConcurrencyLimited)
    await limits.at(START_US + lua.PENDING_US)
    assert await limits.used(scope) == (1, 1, 1, 0, 10)
    await limits.at(START_US + 40 * 86_400_000_000)
    assert (await limits.used(scope))[2] == 1, "only its terminal frees it"
    await limits.bind("t", rid(1))
    assert (await limits.used(scope))[2] == 1, "what is gone cannot be bound"
    await limits.end(2, 0)
    assert (await limits.used(scope))[2] == 0


async def test_cancelled_before_it_was_published(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=1, budget=Decimal(1))
    await limits.take(1, scope, units=UNIT, bound=False)
    await limits.cancel("t", rid(1))
    assert await limits.used(scope) == (0, 0, 0, 0, 0)
    await limits.take(2, scope, units=UNIT)
    await limits.cancel("t", rid(2))
    assert await limits.used(scope) == (1, 1, 1, 0, UNIT), "what the brokers have is not taken back"


async def test_ingress_and_router_charge_once(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=9, concurrency=1, budget=Decimal(1))
    await limits.take(1, scope, units=7, bound=False)
    for _ in range(3):  # the ingress asks again, the router reads the record again after a crash
        assert isinstance(await limits.take(1, scope, units=7), Admission)
        found = await limits.take(1, scope, units=7, mode=ROUTE)
        assert isinstance(found, Admission)
        assert found.verdict is not None
        assert (found.verdict.kind, found.verdict.state) == ("held", "r")
        assert await limits.used(scope) == (1, 1, 1, 0, 7)
    await limits.end(1, 0, ["key:k"], units=5)
    again = await limits.take(1, scope, units=7, mode=ROUTE)
    assert isinstance(again, Admission)
    assert again.verdict is not None
    assert again.verdict.kind == "known"
    assert await limits.used(scope) == (1, 1, 0, 5, 0)


async def test_the_router_admits_anew_where_it_chose_another_model(limits: Clocked) -> None:
    key, small, big = (
        Scope("key", "k", rpm=2, budget=Decimal(1)),
        Scope("model", "s", rpm=1),
        Scope("model", "b", rpm=1),
    )
    await limits.take(1, key, small, units=3, model="s")
    await limits.bind("t", rid(1))
    assert isinstance(await limits.take(1, key, big, units=5, model="b", mode=ROUTE), Admission)
    assert await limits.used(key) == (1, 1, 1, 0, 5)
    assert await limits.used(small) == (0, 0, 0, 0, 0)
    assert await limits.used(big) == (1, 1, 1, 0, 5)
    kept = await limits.take(1, key, small, units=3, model="s", mode=ROUTE)
    assert isinstance(kept, Admission)
    assert kept.verdict is not None
    assert kept.verdict.model == "b", "once routed, it stays"


async def test_the_routers_refusal_stands_when_the_record_is_read_again(limits: Clocked) -> None:
    scope = Scope("key", "k", concurrency=1)
    await limits.take(1, scope)
    first = refused(await limits.take(2, scope, mode=ROUTE), ConcurrencyLimited)
    await limits.end(1, 0)
    again = refused(await limits.take(2, scope, mode=ROUTE), ConcurrencyLimited)
    assert again.message == first.message
    assert (await limits.used(scope))[2] == 0


async def test_settlement_counts_each_offset_once(limits: Clocked) -> None:
    scope = KEY
    await limits.take(1, scope, units=50)
    for _ in range(3):
        assert await limits.end(1, 0, ["key:k"], units=20) == 1
        assert await limits.used(scope) == (0, 0, 0, 20, 0)
    await limits.redis.delete(f"hr:lim:r:{ref_of('t', rid(1))}")  # what it remembers of the request has run out
    assert await limits.end(1, 0, ["key:k"], units=20) == 1
    assert (await limits.used(scope))[3] == 20
    assert await limits.end(2, 5, ["key:k"], units=20) == 1, "what was left out comes first"
    assert (await limits.used(scope))[3] == 20


async def test_months(limits: Clocked) -> None:
    february = 1_769_904_000_000_000
    scope = Scope("key", "k", budget=Decimal(1))
    await limits.at(february - 1)
    await limits.take(1, scope, units=UNIT)
    refused(await limits.take(2, scope, units=1), InsufficientQuota)
    await limits.at(february)
    assert isinstance(await limits.take(2, scope, units=UNIT), Admission), "a new month has its whole budget"
    await limits.end(1, 0, ["key:k"], units=UNIT, month="202601")
    assert (await limits.used(scope))[3:] == (0, UNIT), "what straddles belongs to the month of its acceptance"
    other = Scope("key", "other", budget=Decimal(1))
    await limits.take(3, other, units=9)
    assert (await limits.used(other))[4] == 9
    await limits.take(3, other, units=9, mode=ROUTE, month="202603")
    assert (await limits.used(other))[4] == 0, "the brokers' clock says which month"


async def test_the_month_is_the_calendars(limits: Clocked) -> None:
    for day in range(0, 40_000, 97):
        moment = day * 86_400_000_000 + 86_399_999_999
        await limits.at(moment)
        found = await limits.take(day, Scope("key", "k", rpm=1), bound=False)
        assert isinstance(found, Admission)
        assert found.verdict is not None
        assert found.verdict.month == month_of(moment // 1000)


async def test_redis_that_is_not_complete_or_takes_no_writes(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=1)
    generous = Clocked(limits.redis, allow_on_outage=True)
    await limits.redis.config_set("min-replicas-to-write", 1)
    with pytest.raises(Unavailable) as away:
        await limits.take(1, scope)
    assert away.value.retry_after_s == 2
    assert (await generous.take(1, scope)) == Admission(None, {})
    await limits.redis.config_set("min-replicas-to-write", 0)
    assert isinstance(await limits.take(1, scope), Admission)
    await limits.redis.set("hr:lim:whole", "another server's")
    with pytest.raises(Unavailable):
        await limits.take(2, scope)
    assert (await generous.take(2, scope)) == Admission(None, {})
    assert await limits.end(1, 0) is None, "nothing is settled on what will be thrown away"


@pytest.mark.parametrize("seed", range(6))
async def test_random_histories_agree_with_a_plain_model(limits: Clocked, seed: int) -> None:
    """Every answer and every sum, after each of 400 steps, is that of lists that are walked."""
    chance, plain = random.Random(seed), Plain()
    scopes = [
        Scope("key", "a", rpm=7, tpm=400, concurrency=4, budget=budget(3 * UNIT + 7)),
        Scope("key", "b", budget=budget(2 * UNIT)),
        Scope("app", "x", tpm=900, budget=budget(4 * UNIT)),
        Scope("model", "m", rpm=11, concurrency=5),
    ]
    names: list[str] = []
    offset = 0
    for _ in range(400):
        plain.now += chance.choice([0, 1, 900_000, 4_000_000, 11_000_000])
        if chance.random() < 0.004:
            plain.now += 20 * 86_400_000_000
        await limits.at(plain.now)
        move = chance.random()
        name = chance.choice(names) if names and chance.random() < 0.7 else f"{len(names):012x}7{seed:019x}"
        if move < 0.55:
            if name not in names:
                names.append(name)
            held = plain.open.get(name)
            mine = held.scopes if held is not None else tuple(scopes[at] for at in (chance.randrange(2), 2, 3))
            tokens, units = chance.randrange(1, 200), chance.randrange(UNIT)
            expected = plain.admit(name, mine, tokens, units)
            found = await limits.take(name, *mine, tokens=tokens, units=units, bound=False)
            assert isinstance(found, Admission) is expected, found
        elif move < 0.65:
            plain.sweep()
            await limits.open(bound_us=0, limit=0)
            held = plain.open.get(name)
            if held is not None and held.pending_until is not None:
                plain.drop(name)
            await limits.cancel("t", name)
        elif move < 0.8:
            plain.sweep()
            await limits.open(bound_us=0, limit=0)
            plain.bind(name)
            await limits.bind("t", name)
        else:
            month = month_of(plain.now // 1000)
            payers = [scopes[0].name, scopes[2].name]
            tokens, units = chance.randrange(200), chance.randrange(UNIT // 4)
            plain.sweep()
            await limits.open(bound_us=0, limit=0)
            plain.settle(name, payers, tokens, units, month)
            for _ in range(chance.randrange(1, 3)):
                await limits.end(name, offset, payers, tokens=tokens, units=units, month=month)
            offset += 1
        await agrees_with_its_log(limits, scopes)
        for scope in scopes:
            seen, meant = await limits.used(scope), plain.used(scope)
            windowed = scope.rpm is not None or scope.tpm is not None
            assert seen == (meant if windowed else (0, 0, *meant[2:])), scope


async def test_many_at_once_never_pass_a_limit_and_leave_nothing(tmp_path: Path) -> None:
    """64 callers, each reserving, binding or dying, settling for less: sums stay below all limits."""
    async with limiting(tmp_path) as limits:
        chance = random.Random(11)
        scope = Scope("key", "k", concurrency=8, budget=Decimal(1))
        price, runs, admitted, spent, died = UNIT // 100, 0, 0, 0, 0
        offsets = iter(range(10_000))
        settling = asyncio.Lock()

        async def caller(who: int) -> None:
            nonlocal runs, admitted, spent, died
            for turn in range(25):
                number = who * 1000 + turn
                if not isinstance(await limits.take(number, scope, units=price, bound=False), Admission):
                    await asyncio.sleep(0)
                    continue
                runs += 1
                assert runs + died <= 8
                if chance.random() < 0.05:
                    runs -= 1
                    died += 1
                    return  # pending, and nobody comes back for it
                await limits.bind("t", rid(number))
                cost = chance.choice([price, price, price // 3])
                admitted += 1
                async with settling:
                    runs -= 1  # before the script: from then on another may be admitted
                    spent += cost
                    await limits.end(number, next(offsets), [scope.name], units=cost)
                used = await limits.used(scope)
                assert used[3] + used[4] <= UNIT
                assert used[2] <= 8

        await asyncio.gather(*(limits.redis.ping() for _ in range(64)))  # so that all connections are there
        await asyncio.gather(*(caller(who) for who in range(64)))
        await limits.at(START_US + lua.PENDING_US)
        assert await limits.used(scope) == (0, 0, 0, spent, 0)
        assert admitted > 30
        assert spent <= UNIT
        left = [key async for key in limits.redis.scan_iter("hr:lim:*")]
        assert not [key for key in left if key.startswith((b"hr:lim:s:", b"hr:lim:pending", b"hr:lim:bound"))]


@pytest.mark.parametrize("later_us", [WINDOW_US, 3 * WINDOW_US])
async def test_a_window_ends_with_its_last_request(limits: Clocked, later_us: int) -> None:
    scope, keys = Scope("key", "k", rpm=100, tpm=100_000), ("hr:lim:w:key:k", "hr:lim:s:key:k")
    for number in range(50):
        await limits.take(number, scope, tokens=10)
    assert await limits.redis.pttl("hr:lim:s:key:k") == -1, "what is open is never forgotten"
    for number in range(50):
        await limits.end(number, number, tokens=7)
        assert [0 < await limits.redis.pttl(key) <= 122_000 for key in keys] == [True, number == 49]
    assert (await limits.used(scope))[:2] == (50, 350)
    await limits.at(START_US + later_us)
    assert (await limits.used(scope))[:2] == (0, 0)
    assert await limits.redis.exists(*keys) == 0


async def test_a_window_is_empty_when_the_last_that_stayed_in_it_leaves(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=100)
    for number in range(3):
        await limits.at(START_US + number * 5_000_000)
        await limits.take(number, scope, bound=number < 2)
    await limits.cancel("t", rid(2))
    found = await limits.take(1, scope)
    assert isinstance(found, Admission)
    assert found.headers["x-ratelimit-remaining-requests"] == "98"
    assert found.headers["x-ratelimit-reset-requests"] == "55s"


async def test_counts_that_were_lost_do_not_outlive_their_window(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=3)
    for number in range(3):
        await limits.take(number, scope)
        await limits.end(number, number)
    await limits.redis.delete("hr:lim:s:key:k")
    assert isinstance(await limits.take(3, scope), Admission)
    await limits.at(START_US + WINDOW_US)
    assert (await limits.used(scope))[:2] == (0, 0)
    await agrees_with_its_log(limits, [scope])


async def test_a_log_that_was_lost_refuses_and_gives_back_as_ever(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=2, concurrency=9)
    await limits.take(1, scope)
    await limits.at(START_US + 1)
    await limits.take(2, scope, bound=False)
    await limits.redis.delete("hr:lim:w:key:k")
    assert refused(await limits.take(3, scope), RequestsLimited).retry_after_s == 60
    await limits.cancel("t", rid(2))
    await limits.end(1, 0)
    assert (await limits.used(scope))[2] == 0
    await limits.at(START_US + 2 * WINDOW_US + 1)
    assert (await limits.used(scope))[:2] == (0, 0)


async def test_a_request_that_two_restores_counted_is_counted_once_in_the_end(limits: Clocked) -> None:
    scope = Scope("key", "k", rpm=9)
    await limits.take(1, scope, tokens=50)
    await limits.redis.register_script(REFILLING)(args=[ref_of("t", rid(1)), START_US, 7, scope.name])
    await limits.end(1, 0, tokens=7)
    assert (await limits.used(scope))[:3] == (1, 7, 0)
    await agrees_with_its_log(limits, [scope])


async def test_reservations_can_be_listed_and_given_back(limits: Clocked) -> None:
    scope = KEY
    await limits.take(1, scope, units=5, bound=False)
    await limits.take(2, scope, units=5)
    await limits.at(START_US + 5_000_000)
    found = await limits.open(bound_us=1_000_000, limit=10)
    assert (found.pending, found.bound, found.oldest) == (1, 1, [(ref_of("t", rid(2)), START_US)])
    assert await limits.reap(ref_of("t", rid(2)))
    assert not await limits.reap(ref_of("t", rid(2)))
    assert (await limits.used(scope))[4] == 5


async def test_a_restarted_server_is_not_whole(limits: Clocked) -> None:
    assert (await limits.state()).whole
    await limits.invalidate()
    assert not (await limits.state()).whole
    await whole(limits.redis)
    assert (await limits.state()).whole
