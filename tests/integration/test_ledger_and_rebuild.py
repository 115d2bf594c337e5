"""The ledger adds up, and what is rebuilt from Kafka gives the same answers as before."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest
from redis import asyncio as redis

from bench.gateway.spec import Spec
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, Seen, body, fresh
from tests.support.stacks import Stack
from tests.support.waiting import until

USAGE = (
    "SELECT model, status, count() AS requests, sum(prompt_tokens) AS prompt, sum(completion_tokens) AS completion, "
    "toString(sum(cost)) AS cost FROM usage GROUP BY model, status ORDER BY model, status"
)
REQUESTS = "SELECT status, count() AS n, uniqExact(request_id) AS ids FROM requests GROUP BY status ORDER BY status"
EVENTS = "SELECT stage, count() AS n FROM request_events GROUP BY stage ORDER BY stage"


async def traffic(api: Api) -> list[Seen]:
    """Requests of every end."""
    specs = [Spec(tokens=4, interval_ms=1), Spec(tokens=9, interval_ms=1, die_after=2), Spec(status=400)]
    seen = [await api.stream(body(spec)) for spec in specs * 2]
    async with api.open(body(Spec(tokens=500, interval_ms=20))) as reader:
        seen.append(await reader.until_tokens(3))
    seen.append(await api.stream(body(Spec(tokens=100, interval_ms=50)), {"x-request-timeout": "0.5"}))
    return seen


async def test_the_ledger_counts_each_request_once(stack: Stack, api: Api) -> None:
    before = await settled(stack)
    seen = await traffic(api)
    after = await settled(stack)
    assert after["adds_up"] is True and after["problems"] == []
    for field in ("records", "accepted", "usage_rows"):
        assert after[field] == before[field] + len(seen), field  # type: ignore[operator]
    grown = {
        status: count - before["terminal"].get(status, 0)  # type: ignore[attr-defined]
        for status, count in after["terminal"].items()  # type: ignore[attr-defined]
    }
    assert {status: count for status, count in grown.items() if count} == {
        "completed": 2, "failed": 2, "rejected": 2, "cancelled": 1, "expired": 1,
    }  # fmt: skip
    text = stack.run("ledger")
    assert text.returncode == 0 and "adds up" in text.stdout


async def test_money_is_exact(stack: Stack, api: Api) -> None:
    seen = await api.stream(body(Spec(tokens=7, interval_ms=1, prompt_tokens=3)))
    await usage_rows(stack, [seen.request_id])
    query = f"SELECT toString(cost) AS cost, price_version FROM usage WHERE request_id = '{seen.request_id}'"  # noqa: S608
    [row] = stack.rows(query)
    assert Decimal(str(row["cost"])) == (3 * Decimal("1.00") + 7 * Decimal("10.00")) / 1_000_000
    assert int(str(row["price_version"])) >= 1


@pytest.mark.parametrize("from_scratch", [False, True])
async def test_clickhouse_is_rebuilt_to_the_same_answers(stack: Stack, api: Api, from_scratch: bool) -> None:
    await usage_rows(stack, [seen.request_id for seen in await traffic(api)])

    async def steady() -> list[object] | None:
        """The answers, once two looks in a row are the same: events are still on their way after the end."""
        looks = [[stack.rows(query) for query in (USAGE, REQUESTS, EVENTS)] for _ in range(2)]
        return looks[0] if looks[0] == looks[1] else None

    before = await until(steady, "the answers are steady", 30)
    rebuilt = await asyncio.to_thread(stack.run, "rebuild", "clickhouse", *(["--from-scratch"] if from_scratch else []))
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert await until(steady, "the answers are steady", 30) == before
    later = await api.stream(body(Spec(tokens=2, interval_ms=1)))
    await usage_rows(stack, [later.request_id])


async def test_redis_is_rebuilt_to_the_same_answers(stack: Stack, api: Api) -> None:
    name = fresh("kept")
    spec, headers = Spec(tokens=3, interval_ms=1, id=name), {"idempotency-key": name}
    first = await api.ask(body(spec), headers)
    models = (await api.get("/v1/models")).json()
    async with redis.from_url(stack.settings.redis_url) as client:
        await client.flushall()
    rebuilt = await asyncio.to_thread(stack.run, "rebuild", "redis")
    assert rebuilt.returncode == 0, rebuilt.stderr

    async def whole() -> bool:
        answer = await api.get("/v1/models")
        assert answer.status_code in (200, 503), answer.text
        return answer.status_code == 200 and answer.json() == models

    await until(whole, "the control plane is whole", 20)
    again = await api.ask(body(spec), headers)
    assert again.json() == first.json()
    assert (await stack.seen(name)).requests == 1
