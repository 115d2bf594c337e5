"""The tables on the real engine: replays in any shape give the same rows, and bad rows stand alone."""

# ruff: noqa: S608  (ids that the tests make stand in the statements)
from __future__ import annotations

import asyncio
import itertools
import random
import re
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import msgspec
import pytest
from clickhouse_connect.driver.asyncclient import AsyncClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clickhouse.client import connect_sync
from clickhouse.migrate import applied_migrations, migrate
from clickhouse.migration import load
from clickhouse.projection import Projection
from clickhouse.queries import QUERIES, Query
from clickhouse.tables import EVENTS, REQUESTS, TABLES, USAGE, Table
from headrace import sql
from headrace.settings import Settings
from schemas.events import AttemptOpened, LifecycleEvent, LogRecord, Stage, Status, Terminal, Timings
from tests.support.tables import NOW_MS, Record, answer, items, log_record, usage_event
from topics.request_log import deciding_terminal

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""Without shrinking: an example costs inserts, and a failing run should not take minutes."""
_ids = itertools.count(1)


def test_migrations_are_recorded_and_run_once(server: Settings) -> None:
    migrate(server)
    assert migrate(server).apply == ()
    with connect_sync(server, database=server.clickhouse_database) as client:
        assert [step.number for step in applied_migrations(client)] == [step.number for step in load()]


def test_migrations_can_be_reverted_run_at_once_and_resumed(server: Settings) -> None:
    conf = server.model_copy(update={"clickhouse_database": "elsewhere"})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, [conf] * 4))
    with connect_sync(conf, database="elsewhere") as client:
        # As after a death between a statement and its record.
        client.command("DROP VIEW usage")
        client.command("TRUNCATE TABLE schema_migrations")
    assert len(migrate(conf).apply) == len(load())
    assert answer(conf, "SELECT count() FROM usage") == [(0,)]
    assert [step.number for step in migrate(conf, 0).revert] == list(range(len(load()), 0, -1))
    assert answer(conf, "SHOW TABLES") == [("schema_migrations",)]
    assert len(migrate(conf).apply) == len(load())


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.view)
def test_columns_are_those_of_the_rows_and_views_show_all_but_the_precedence(migrated: Settings, table: Table) -> None:
    shown = answer(migrated, f"DESCRIBE TABLE {table.name}")
    kinds = [re.sub(r"\s+", " ", str(row[1])).replace("( ", "(") for row in shown]
    assert [(row[0], kind) for row, kind in zip(shown, kinds, strict=True)] == list(table.columns)
    names = [row[0] for row in answer(migrated, f"DESCRIBE TABLE {table.view}")]
    assert set(map(str, names)) >= set(table.names) - {"precedence"} and "precedence" not in names


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_every_named_query_runs(migrated: Settings, query: Query) -> None:
    text, bound = sql.statement(query.name, dict.fromkeys(query.parameters - set(query.defaults), "x"))
    sql.run(migrated, text, bound)


OPEN, END = "open", "end"
Step = tuple[str, int]
"""What happens to a request, and the attempt it happens to."""
LOGS = st.lists(st.tuples(st.sampled_from([OPEN, END]), st.integers(1, 3)), min_size=1, max_size=8)


def request_log(request_id: str, steps: list[Step]) -> list[LogRecord]:
    return [
        AttemptOpened(request_id, "t", attempt + 1, 1, "w", "lost", NOW_MS)
        if kind == OPEN
        else Terminal(
            request_id, "t", attempt, position, Status.COMPLETED,
            timings=Timings(accepted_ms=NOW_MS, finished_ms=NOW_MS + position),
        )
        for position, (kind, attempt) in enumerate(steps)
    ]  # fmt: skip


@settings(max_examples=40, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(
    logs=st.lists(LOGS, min_size=1, max_size=6),
    runs=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(1, 7)), max_size=5),
    seed=st.randoms(use_true_random=False),
)
async def test_requests_show_the_deciding_terminal_whatever_is_replayed(
    client: AsyncClient,
    migrated: Settings,
    logs: list[list[Step]],
    runs: list[tuple[float, float, int]],
    seed: random.Random,
) -> None:
    """Members of the sink's group die and are replaced: each starts at or before what was committed, in order."""
    by_id = {f"{next(_ids):032x}": steps for steps in logs}
    waiting = {request_id: request_log(request_id, steps) for request_id, steps in by_id.items()}
    records: list[Record] = []
    while any(waiting.values()):
        request_id = seed.choice(sorted(key for key, left in waiting.items() if left))
        records.append(log_record(len(records), waiting[request_id].pop(0)))
    projection = Projection(client, migrated.clickhouse_database)
    reached = 0
    for back, on, size in [*runs, (0.0, 1.0, 3)]:
        start = int(reached * (1 - back))
        end = max(start, int(len(records) * on))
        for first in range(start, end, size):
            batch = items(records[first : min(first + size, end)])
            seed.shuffle(batch)
            await projection.write(batch)
        reached = max(reached, end)
    expected = {}
    for request_id, steps in by_id.items():
        terminal = deciding_terminal(request_log(request_id, steps))
        if terminal is not None:
            expected[request_id] = (terminal.attempt, terminal.epoch)
    ids = ", ".join(f"'{request_id}'" for request_id in by_id)
    for _ in range(2):
        rows = answer(migrated, f"SELECT request_id, attempts, epoch FROM requests WHERE request_id IN ({ids})")
        assert {row[0]: row[1:] for row in rows} == expected
        assert len(rows) == len(expected)
        await client.command(f"OPTIMIZE TABLE {migrated.clickhouse_database}.requests_raw FINAL")


@pytest.mark.parametrize(
    ("steps", "decides"),
    [
        ([(END, 1), (OPEN, 1)], (1, 0)),
        ([(OPEN, 1), (END, 1)], None),
        ([(OPEN, 1), (END, 1), (END, 2)], (2, 2)),
        ([(END, 1), (OPEN, 1), (END, 2)], (1, 0)),
        ([(OPEN, 1), (OPEN, 2), (END, 2), (END, 1), (END, 3), (END, 3)], (3, 4)),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 9])
async def test_a_zombies_terminal_decides_only_before_the_next_attempt(
    client: AsyncClient, migrated: Settings, steps: list[Step], decides: tuple[int, int] | None, size: int
) -> None:
    request_id = f"{next(_ids):032x}"
    records = [log_record(offset, event) for offset, event in enumerate(request_log(request_id, steps))]
    projection = Projection(client, migrated.clickhouse_database)
    for first in [*range(0, len(records), size), *range(len(records) - 1, len(records), size)]:
        await projection.write(items(records[first : first + size]))
    rows = answer(migrated, f"SELECT attempts, epoch FROM requests WHERE request_id = '{request_id}'")
    assert rows == ([decides] if decides else [])


@settings(max_examples=20, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(
    events=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(list(Stage)), st.integers(1, 2)), max_size=12),
    order=st.randoms(use_true_random=False),
    times=st.integers(1, 3),
)
async def test_usage_and_events_hold_each_fact_once_in_any_order(
    client: AsyncClient, migrated: Settings, events: list[tuple[int, Stage, int]], order: random.Random, times: int
) -> None:
    base = next(_ids) * 1000
    records = [
        Record("usage.events", offset, msgspec.json.encode(usage_event(base + number)))
        for offset, (number, _, _) in enumerate(events)
    ]
    for offset, (number, stage, attempt) in enumerate(events):
        event = LifecycleEvent(f"{base + number:032x}", "t", stage, NOW_MS + offset, "router", f"i{offset}", attempt)
        records.append(Record("inference.events", offset, msgspec.json.encode(event)))
    projection = Projection(client, migrated.clickhouse_database)
    for _ in range(times):
        order.shuffle(records)
        half = len(records) // 2
        await projection.write(items(records[:half]))
        await projection.write(items(records[half:]))
        await projection.write(items(records[:half]))
    numbers = {number for number, _, _ in events}
    ids = ", ".join(f"'{base + number:032x}'" for number in range(5))
    got = answer(migrated, f"SELECT count(), sum(cost) FROM usage WHERE request_id IN ({ids})")
    assert got == [(len(numbers), len(numbers) * Decimal("0.000003000000000001"))]
    first_seen: dict[tuple[str, str, int], str] = {}
    for offset, (number, stage, attempt) in enumerate(events):
        first_seen.setdefault((f"{base + number:032x}", stage.value, attempt), f"i{offset}")
    rows = answer(
        migrated, f"SELECT request_id, stage, attempt, instance FROM request_events WHERE request_id IN ({ids})"
    )
    assert sorted(rows) == sorted((*key, instance) for key, instance in first_seen.items())


async def test_a_row_that_clickhouse_refuses_stands_alone(client: AsyncClient, migrated: Settings) -> None:
    base = next(_ids) * 1000
    events = [usage_event(base + n, cost=Decimal(-1) if n in (3, 7) else Decimal(1)) for n in range(10)]
    records = [Record("usage.events", offset, msgspec.json.encode(event)) for offset, event in enumerate(events)]
    outcome = await Projection(client, migrated.clickhouse_database).write(items(records))
    assert [item.source.offset for item, _ in outcome.refused] == [3, 7]
    assert all("cost_is_not_negative" in reason for _, reason in outcome.refused)
    assert outcome.written == {"usage": 8}
    ids = ", ".join(f"'{base + n:032x}'" for n in range(10))
    assert answer(migrated, f"SELECT count() FROM usage WHERE request_id IN ({ids})") == [(8,)]


async def test_two_terminals_in_different_months_are_one_row(client: AsyncClient, migrated: Settings) -> None:
    request_id = f"{next(_ids):032x}"
    month = 31 * 86_400_000
    projection = Projection(client, migrated.clickhouse_database)
    for offset, accepted in ((0, NOW_MS), (1, NOW_MS + month)):
        late = Terminal(request_id, "t", 1, offset, Status.COMPLETED, timings=Timings(accepted_ms=accepted))
        await projection.write(items([log_record(offset, late)]))
    assert answer(migrated, f"SELECT epoch FROM requests WHERE request_id = '{request_id}'") == [(0,)]


async def test_times_and_durations_are_those_of_the_event(client: AsyncClient, migrated: Settings) -> None:
    request_id = f"{next(_ids):032x}"
    times = Timings(
        accepted_ms=NOW_MS, routed_ms=NOW_MS + 1, assigned_ms=NOW_MS + 5, started_ms=NOW_MS + 6, finished_ms=NOW_MS + 99
    )
    ended = Terminal(request_id, "t", 1, 1, Status.FAILED, timings=times)
    await Projection(client, migrated.clickhouse_database).write(items([log_record(0, ended)]))
    columns = "toUnixTimestamp64Milli(accepted_at), queue_ms, ttft_ms, generation_ms, total_ms, first_token_at"
    rows = answer(migrated, f"SELECT {columns} FROM requests WHERE request_id = '{request_id}'")
    assert rows == [(NOW_MS, 4, None, 93, 99, None)]


def test_tables_of_money_have_no_expiry(migrated: Settings) -> None:
    shown = {table.name: str(answer(migrated, f"SHOW CREATE TABLE {table.name}")[0][0]) for table in TABLES}
    assert "TTL" not in shown[USAGE.name]
    for table in (REQUESTS, EVENTS):
        assert "toIntervalDay(400)" in shown[table.name]


async def test_inserts_of_many_clients_at_once_all_arrive(client: AsyncClient, migrated: Settings) -> None:
    base = next(_ids) * 1000
    projection = Projection(client, migrated.clickhouse_database)
    batches = [items([Record("usage.events", n, msgspec.json.encode(usage_event(base + n)))]) for n in range(20)]
    await asyncio.gather(*(projection.write(batch) for batch in batches))
    ids = ", ".join(f"'{base + n:032x}'" for n in range(20))
    assert answer(migrated, f"SELECT count() FROM usage WHERE request_id IN ({ids})") == [(20,)]
