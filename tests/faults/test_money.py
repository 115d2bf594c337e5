"""What counts and bills is killed under 2,000 requests: one usage row each, and the sum is that of the log."""

from __future__ import annotations

import asyncio
import random
import time
from decimal import Decimal

import msgspec
import pytest

from bench.gateway.spec import Spec
from tests.faults.conftest import PRICE, Note
from tests.faults.test_kills import told_exactly
from tests.support.accounts import settled
from tests.support.callers import Caller, Outcome
from tests.support.chat import Api, fresh
from tests.support.kafka import end_offsets, records
from tests.support.stacks import Stack
from tests.support.waiting import until
from topics.catalogue import LOG, REQUESTS

CALLERS = 2_000
AT_ONCE = 64
PARTS = ("metering-1", "sink-1", "ingress-1", "clickhouse")
LENGTH_S = 20.0
"""About how long the callers take."""


@pytest.mark.timeout(600)
async def test_every_request_is_billed_once_to_the_cent(victim: Stack, moments: int, seed: int, note: Note) -> None:
    """Each part is killed once, or five times in a long run."""
    await victim.ready()
    chance = random.Random(f"{seed}-money")
    times = 5 if moments > 3 else 1
    kills = sorted((chance.uniform(1.0, LENGTH_S), part) for part in PARTS for _ in range(times))
    before = {topic.name: await end_offsets(victim.settings, topic) for topic in (REQUESTS, LOG)}
    began = time.monotonic()
    crowd = asyncio.create_task(callers(victim, chance))
    for at_s, part in kills:
        await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))
        await victim.killed(part)
    found = await crowd
    seconds = time.monotonic() - began
    for one in found:
        told_exactly(one)

    accepted = {record.key for record in await records(victim.settings, REQUESTS, before[REQUESTS.name])}
    asked = {one.request_id.encode() for one in found}
    assert asked <= accepted and len(asked) == CALLERS
    await settled(victim, 60)
    recount = await recounted(victim, before[LOG.name])
    assert {request_id.encode() for request_id in recount} == accepted
    named = ", ".join(f"'{request_id}'" for request_id in recount)

    async def billed() -> list[dict[str, object]] | None:
        query = f"SELECT count() AS n, sum(cost) AS money FROM usage WHERE request_id IN ({named})"  # noqa: S608
        rows = await asyncio.to_thread(victim.rows, query)
        return rows if int(str(rows[0]["n"])) >= len(accepted) else None

    [row] = await until(billed, "a usage row for each request", 60)
    assert (row["n"], Decimal(str(row["money"]))) == (len(accepted), sum(recount.values()))
    note(
        part="money", kills=[f"{part} at {at_s:.1f} s" for at_s, part in kills], callers=CALLERS,
        accepted=len(accepted), money=str(row["money"]), seconds=round(seconds, 1),
        resumed=sum(one.resumed for one in found), repeated=sum(one.repeated for one in found),
    )  # fmt: skip


async def callers(stack: Stack, chance: random.Random) -> list[Outcome]:
    """What 2,000 saw who ask for a few tokens each, so many of them at once."""
    gate = asyncio.Semaphore(AT_ONCE)
    apis = [Api(stack, ingress=index) for index in range(len(stack.ingress_urls))]

    async def one(number: int, spec: Spec) -> Outcome:
        async with gate:
            return await Caller(apis, number, spec, model="paid").run()

    specs = [
        Spec(
            tokens=chance.randint(1, 40), interval_ms=chance.uniform(1, 20), prompt_tokens=chance.randint(1, 5_000),
            seq=1_000 * number, id=fresh("money"),
        )
        for number in range(CALLERS)
    ]  # fmt: skip
    try:
        return list(await asyncio.gather(*(one(number, spec) for number, spec in enumerate(specs))))
    finally:
        for api in apis:
            await api.client.aclose()


async def recounted(stack: Stack, since: dict[int, int]) -> dict[str, Decimal]:
    """What each request costs by the log alone, by nothing of what meters: JSON and the price list."""
    found: dict[str, Decimal] = {}
    prices = {name: Decimal(amount) for name, amount in PRICE.items()}
    for record in await records(stack.settings, LOG, since):
        event = msgspec.json.decode(record.value or b"null")
        if event is None or event["type"] != "terminal":
            continue
        assert event["request_id"] not in found, "nothing was killed that could end a request twice"
        used = event.get("usage", {}) if event["model"] == "paid" else {}
        cached = used.get("cached_tokens", 0)
        found[event["request_id"]] = (
            (used.get("prompt_tokens", 0) - cached) * prices["input"]
            + cached * prices["cached"]
            + used.get("completion_tokens", 0) * prices["output"]
        ) / 1_000_000
    return found
