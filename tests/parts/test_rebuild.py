"""Rebuilding ClickHouse from Kafka gives the same answers; the ledger reads the same topics."""

# ruff: noqa: S608  (ids that the tests make stand in the statements)
from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete

from clickhouse import tables as clickhouse_tables
from clickhouse.client import connect
from clickhouse.migrate import migrate
from clickhouse.rebuild import rebuild
from clickhouse.rows import lease_row
from headrace import ledger_snapshot
from headrace.settings import Settings
from schemas.events import AttemptOpened, LeaseEvent, Status
from schemas.ids import new_request_id
from tests.support.projections import (
    TENANT,
    Traffic,
    ask,
    now_ms,
    running,
    send_event,
    send_log,
    send_usage,
    settled,
    terminal,
)
from topics.catalogue import LEASES
from topics.clients import Producer
from topics.envelope import Envelope

TABLES = ("requests", "request_events", "usage", "request_attempts", "lease_events")


def everything(conf: Settings) -> dict[str, list[tuple[object, ...]]]:
    return {view: sorted(ask(conf, f"SELECT * FROM {view}"), key=repr) for view in TABLES}


async def test_a_rebuild_gives_the_same_answers_while_the_sink_runs(conf: Settings, producer: Producer) -> None:
    async with running(conf):
        await settled(conf, producer)
        first_report = await rebuild(conf)
        assert first_report.rows["usage"] >= 1
        before = await asyncio.to_thread(everything, conf)
        async with Traffic(producer) as traffic:
            for _ in range(3):
                await rebuild(conf)
        await traffic.all_visible(conf)
        after = await asyncio.to_thread(everything, conf)
        for view in TABLES:
            assert set(map(repr, before[view])) <= set(map(repr, after[view])), view
        assert ask(
            conf, "SELECT count() FROM system.tables WHERE database = currentDatabase() AND name LIKE '%rebuild%'"
        ) == [(0,)]


async def test_a_rebuild_after_the_tables_were_dropped(conf: Settings, producer: Producer) -> None:
    request_id = new_request_id()
    await send_log(producer, AttemptOpened(request_id, TENANT, 2, 1, "w2", "lost", now_ms()))
    await send_log(producer, terminal(request_id, 1, Status.FAILED))
    await send_log(producer, terminal(request_id, 2))
    await send_event(producer, request_id)
    await send_usage(producer, request_id)
    await rebuild(conf)
    before = await asyncio.to_thread(everything, conf)
    assert before["requests"] and before["usage"] and before["request_events"] and before["request_attempts"]
    await asyncio.to_thread(migrate, conf, 0)
    await rebuild(conf)
    assert await asyncio.to_thread(everything, conf) == before


async def test_a_rebuild_keeps_what_kafka_no_longer_holds_unless_told_otherwise(
    conf: Settings, producer: Producer
) -> None:
    request_id = new_request_id()
    sent = await send_event(producer, request_id)
    await rebuild(conf)
    admin = AIOKafkaAdminClient(bootstrap_servers=conf.kafka_bootstrap)
    await admin.start()
    try:
        where = TopicPartition("inference.events", sent.partition)
        await admin.delete_records({where: RecordsToDelete(before_offset=sent.offset + 1)})
    finally:
        await admin.close()
    count = f"SELECT count() FROM request_events WHERE request_id = '{request_id}'"
    report = await rebuild(conf)
    assert report.carried["request_events"] >= 1
    assert ask(conf, count) == [(1,)]
    await rebuild(conf, from_scratch=True)
    assert ask(conf, count) == [(0,)]


async def test_the_ledger_finds_a_terminal_without_usage(infra: Settings, producer: Producer) -> None:
    request_id = new_request_id()
    envelope = Envelope(request_id, "/test", now_ms(), TENANT, "k", 0, "d", 600.0)
    before = await ledger_snapshot.take(infra, wait_s=0)
    await producer.send("inference.requests", b"{}", key=request_id, headers=envelope.headers())
    await producer.send("inference.requests", b"{}", key=request_id, headers=envelope.headers())
    accepted = await ledger_snapshot.take(infra, wait_s=0)
    assert (accepted.records - before.records, accepted.duplicates - before.duplicates) == (2, 1)
    assert accepted.in_flight - before.in_flight == 1
    await send_log(producer, terminal(request_id))
    ended = await ledger_snapshot.take(infra, wait_s=0)
    assert request_id in ended.without_usage
    assert ended.problems()
    await send_usage(producer, request_id)
    metered = await ledger_snapshot.take(infra, wait_s=0)
    assert request_id not in metered.without_usage
    assert metered.balanced
    assert metered.usage_rows - before.usage_rows == 1


async def test_leases_are_rebuilt_and_those_that_kafka_compacted_away_are_kept(
    conf: Settings, producer: Producer
) -> None:
    pool = f"pool-{new_request_id()[-8:]}"
    granted = LeaseEvent("w1:m", pool, 1, "w1", "m", "granted", now_ms() - 60_000, bytes=5, device="d0")
    written = await producer.send(LEASES.name, msgspec.json.encode(granted), key="w1:m/1")
    freed = msgspec.structs.replace(granted, state="free", epoch=written.offset, at_ms=now_ms(), reason="done")
    await producer.send(LEASES.name, msgspec.json.encode(freed), key="w1:m/1")
    old = msgspec.structs.replace(granted, lease_id="w1:old", model="old")
    table = clickhouse_tables.LEASE_EVENTS
    client = await connect(conf)
    gone = _Gone(LEASES.name, 0, 2**40, now_ms(), msgspec.json.encode(old))
    await client.insert(
        f"{conf.clickhouse_database}.{table.name}", [lease_row(old, gone)], column_names=table.names,
        column_type_names=table.types,
    )  # fmt: skip
    await client.close()
    held = f"SELECT model, device, bytes, reason FROM leases WHERE pool = '{pool}' ORDER BY model"
    report = await rebuild(conf)
    assert ask(conf, held) == [("m", "d0", 5, "done"), ("old", "d0", 5, "")]
    assert (report.rows["lease_events"] >= 2, report.carried["lease_events"]) == (True, 1)
    await rebuild(conf, from_scratch=True)
    assert ask(conf, held) == [("m", "d0", 5, "done")]


@dataclass(frozen=True)
class _Gone:
    """A record that Kafka no longer holds."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    value: bytes | None
