"""The sink on real Kafka and ClickHouse: rows appear, once, whatever dies or refuses."""

# ruff: noqa: S608  (ids that the tests make stand in the statements)
from __future__ import annotations

import asyncio
from contextlib import suppress
from decimal import Decimal

import pytest

from clickhouse.migrate import migrate
from headrace import letters
from headrace.settings import Settings
from processors.sink import role
from schemas.events import AttemptOpened, Status
from schemas.ids import new_request_id
from tests.support.projections import (
    TENANT,
    VISIBLE_S,
    Traffic,
    ask,
    eventually,
    now_ms,
    running,
    send_event,
    send_log,
    send_usage,
    settled,
    terminal,
    visible,
)
from topics.clients import Producer


async def test_acknowledged_records_become_rows(conf: Settings, producer: Producer) -> None:
    async with running(conf):
        await settled(conf, producer)
        delays = []
        for _ in range(5):
            request_id = new_request_id()
            await send_log(producer, terminal(request_id))
            await send_event(producer, request_id)
            await send_usage(producer, request_id)
            delays.append(
                await visible(
                    conf,
                    "SELECT r.status, u.cost, e.detail['model'] FROM requests r JOIN usage u USING request_id "
                    f"JOIN request_events e USING request_id WHERE request_id = '{request_id}'",
                    [("completed", Decimal("0.25"), "m")],
                )
            )
        print(f"from acknowledged record to visible row: {sorted(delays)} s")


async def test_a_poison_record_is_dead_lettered_and_the_rest_goes_on(conf: Settings, producer: Producer) -> None:
    async with running(conf):
        await settled(conf, producer)
        good, refused = new_request_id(), new_request_id()
        garbage = await producer.send("usage.events", b"{nonsense", key=TENANT)
        negative = await send_usage(producer, refused, cost="-1")
        await send_usage(producer, good)
        await visible(conf, f"SELECT count() FROM usage WHERE request_id = '{good}'", [(1,)])

        async def buried() -> bool:
            found = [letter.about async for letter in letters.read(conf, topic="usage.events")]
            places = {(about.partition, about.offset): about.reason for about in found}
            return (
                "JSON is malformed" in places.get((garbage.partition, garbage.offset), "")
                and "cost_is_not_negative" in places.get((negative.partition, negative.offset), "")
            )  # fmt: skip

        await eventually(buried, "both records in dead.letters")
        assert ask(conf, f"SELECT count() FROM usage WHERE request_id = '{refused}'") == [(0,)]


async def test_nothing_is_lost_while_clickhouse_refuses(infra: Settings, producer: Producer) -> None:
    missing = f"late_{new_request_id()}"
    conf = infra.model_copy(update={"clickhouse_database": missing, "instance": "sink-test"})
    request_id = new_request_id()
    async with running(conf) as task:
        await send_usage(producer, request_id)

        async def refused() -> bool:
            return role.metrics.SINK_RETRIES.labels(code="81")._value.get() > 1

        await eventually(refused, "inserts into a database that does not exist are tried again")
        assert not task.done()
        await asyncio.to_thread(migrate, conf)
        await visible(conf, f"SELECT count() FROM usage WHERE request_id = '{request_id}'", [(1,)])


async def test_a_death_before_the_commit_changes_nothing(
    conf: Settings, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie, request_id = new_request_id(), new_request_id()
    reached = asyncio.Event()

    async def dies(*_: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    async with running(conf):
        await settled(conf, producer)
    monkeypatch.setattr(role.Sink, "_commit", dies)
    async with running(conf) as task:
        await send_log(producer, AttemptOpened(zombie, TENANT, 2, 7, "w2", "worker lost", now_ms()))
        await send_usage(producer, request_id)
        await asyncio.wait_for(reached.wait(), VISIBLE_S)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    monkeypatch.undo()
    await send_log(producer, terminal(zombie, attempt=1, status=Status.FAILED))
    await send_log(producer, terminal(zombie, attempt=2))
    await send_usage(producer, request_id)
    async with running(conf):
        await visible(conf, f"SELECT status, attempts FROM requests WHERE request_id = '{zombie}'", [("completed", 2)])
        await visible(
            conf, f"SELECT count(), sum(cost) FROM usage WHERE request_id = '{request_id}'", [(1, Decimal("0.25"))]
        )


async def test_members_come_and_go_under_traffic(conf: Settings, producer: Producer) -> None:
    other = conf.model_copy(update={"instance": "sink-test-2"})

    async def shown(at_least: int) -> None:
        async def check() -> bool:
            rows = await asyncio.to_thread(ask, conf, f"SELECT count() FROM usage WHERE tenant = '{TENANT}'")
            return int(str(rows[0][0])) >= at_least

        await eventually(check, f"{at_least} rows")

    async with Traffic(producer) as traffic, running(conf):
        await shown(10)
        async with running(other):
            await shown(len(traffic.request_ids) + 50)
        await shown(len(traffic.request_ids) + 50)
    async with running(other):
        await traffic.all_visible(conf)
