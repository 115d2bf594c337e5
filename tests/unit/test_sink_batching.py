"""When the sink's batches are due, what becomes of bad records, and how it waits for ClickHouse."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from decimal import Decimal

import msgspec
import pytest
from aiokafka import TopicPartition
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError

from clickhouse import errors
from clickhouse.projection import is_void
from clickhouse.rows import FIRST_WINS, Unreadable, read, usage_row
from clickhouse.tables import ATTEMPTS, EVENTS, REQUESTS, USAGE
from processors.sink.batch import Batch, Limits
from processors.sink.role import Stopped, retry
from schemas.events import AttemptOpened, ErrorInfo, LifecycleEvent, Stage, Status, Terminal, Timings, Usage, UsageEvent

NOW_MS = 1_790_000_000_000
LIMITS = Limits(rows=3, bytes=1000, linger_s=0.1, interval_s=0.5)


@dataclass(frozen=True)
class Record:
    topic: str
    offset: int
    value: bytes | None
    partition: int = 0
    timestamp: int = NOW_MS
    key: bytes | None = b"k"
    headers: tuple[tuple[str, bytes], ...] = ()


def event(offset: int = 0, detail: str = "", **changes: object) -> Record:
    made = LifecycleEvent("a" * 32, "t", Stage.QUEUED, NOW_MS, "scheduler", "s1", detail={"pool": detail})
    return Record("inference.events", offset, msgspec.json.encode(msgspec.structs.replace(made, **changes)))


USAGE_EVENT = UsageEvent(
    usage_id="u", request_id="a" * 32, tenant="t", key_id="k", model="m", alias="m", provider="p", worker="w",
    status=Status.COMPLETED, attempts=1, prompt_tokens=1, cached_tokens=0, completion_tokens=1, reasoning_tokens=0,
    estimated=False, price_version=1, currency="USD", cost=Decimal("0.000001"), stream=False, accepted_ms=NOW_MS,
    finished_ms=NOW_MS, queue_ms=0, ttft_ms=0, generation_ms=0,
)  # fmt: skip


def test_an_empty_batch_is_never_due() -> None:
    assert Batch(LIMITS).due_in(1e9) is None


def test_the_first_record_after_an_idle_time_waits_for_the_linger_only() -> None:
    batch = Batch(LIMITS, last_flush_s=0.0)
    batch.add([event()], now=100.0)
    assert batch.due_in(100.0) == pytest.approx(0.1)
    assert batch.due_in(100.1) == 0.0


def test_under_load_batches_start_an_interval_apart() -> None:
    batch = Batch(LIMITS, last_flush_s=100.0)
    batch.add([event()], now=100.01)
    assert batch.due_in(100.2) == pytest.approx(0.3)


def test_a_full_batch_is_due_at_once() -> None:
    by_rows = Batch(LIMITS, last_flush_s=100.0)
    by_rows.add([event(offset) for offset in range(3)], now=100.0)
    assert by_rows.due_in(100.0) == 0.0
    assert by_rows.room == 0
    by_bytes = Batch(LIMITS, last_flush_s=100.0)
    by_bytes.add([event(detail="x" * 1000)], now=100.0)
    assert by_bytes.due_in(100.0) == 0.0


def test_unreadable_records_stand_apart_and_their_offsets_are_committed_with_the_rest() -> None:
    batch = Batch(LIMITS)
    batch.add([event(7), Record("inference.events", 8, b"{"), Record("inference.events", 9, None)], now=0.0)
    assert [item.source.offset for item in batch.items] == [7]
    assert [record.offset for record, _ in batch.unreadable] == [8, 9]
    assert batch.offsets() == {TopicPartition("inference.events", 0): 10}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"completion_tokens": 2**64}, "completion_tokens"),
        ({"accepted_ms": 1}, "accepted_ms"),
        ({"cost": Decimal("NaN")}, "cost"),
        ({"cost": Decimal("1e30")}, "cost"),
        ({"usage_id": ""}, "usage_id"),
        ({"request_id": "x" * 65}, "request_id"),
    ],
)
def test_values_that_no_column_holds_are_named(change: dict[str, object], name: str) -> None:
    record = Record("usage.events", 1, b"")
    with pytest.raises(Unreadable, match=name):
        usage_row(msgspec.structs.replace(USAGE_EVENT, **change), record)


def test_a_cost_is_exact_to_18_places() -> None:
    exact = Decimal("12345678901234567890.123456789012345678")
    row = usage_row(msgspec.structs.replace(USAGE_EVENT, cost=exact), Record("usage.events", 1, b""))
    assert row[USAGE.index("cost")] == exact


def test_rows_fit_their_tables() -> None:
    opened = AttemptOpened("a" * 32, "t", 2, 5, "w2", "lost", NOW_MS)
    ended = Terminal("a" * 32, "t", 1, 1, Status.FAILED)
    for value, topic, table in (
        (opened, "inference.log", ATTEMPTS),
        (ended, "inference.log", REQUESTS),
        (USAGE_EVENT, "usage.events", USAGE),
    ):
        item = read(Record(topic, 4, msgspec.json.encode(value)))
        assert item.table is table
        assert len(item.row) == len(table.columns)
        assert item.row[-1] == FIRST_WINS - 4
    assert len(read(event()).row) == len(EVENTS.columns)


def test_no_prompt_and_no_output_reaches_a_row() -> None:
    ended = msgspec.json.encode(
        Terminal(
            "a" * 32, "t", 1, 1, Status.COMPLETED, usage=Usage(prompt_tokens=3),
            error=ErrorInfo(status=502, code="provider_error", message="the provider failed"),
            timings=Timings(accepted_ms=NOW_MS, finished_ms=NOW_MS + 5),
        )
    )  # fmt: skip
    with_answer = ended[:-1] + b',"choices":[{"message":{"content":"SECRET"}}]}'
    row = read(Record("inference.log", 1, with_answer)).row
    assert "SECRET" not in repr(row)
    assert row[REQUESTS.index("total_ms")] == 5


@pytest.mark.parametrize(
    ("attempt", "offset", "openings", "void"),
    [
        (1, 5, [], False),
        (1, 5, [(2, 6)], False),
        (1, 5, [(2, 4)], True),
        (2, 5, [(2, 4)], False),
        (2, 9, [(2, 4), (3, 8)], True),
        (2, 9, [(2, 4), (3, 10)], False),
    ],
)
def test_a_terminal_is_void_after_a_higher_attempt_was_opened(
    attempt: int, offset: int, openings: list[tuple[int, int]], void: bool
) -> None:
    assert is_void(attempt, offset, openings) is void


async def test_a_write_is_tried_until_clickhouse_is_back() -> None:
    failures: list[Exception] = [ConnectionRefusedError(), OperationalError("Code: 241. MEMORY_LIMIT_EXCEEDED")]

    async def write() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert await retry(write, asyncio.Event()) == "done"


async def test_a_wish_to_stop_ends_the_wait() -> None:
    stop = asyncio.Event()

    async def write() -> None:
        stop.set()
        raise ConnectionRefusedError

    with pytest.raises(Stopped):
        await asyncio.wait_for(retry(write, stop), 5)


async def test_a_bug_is_not_tried_again() -> None:
    async def write() -> None:
        raise AttributeError("no such name")

    with pytest.raises(AttributeError):
        await retry(write, asyncio.Event())


@pytest.mark.parametrize(
    ("error", "at_fault"),
    [
        (DatabaseError("Code: 469. DB::Exception: Constraint `c` is violated. (VIOLATED_CONSTRAINT)", code=469), True),
        (DatabaseError("Code: 60. DB::Exception: Table does not exist. (UNKNOWN_TABLE)", code=60), False),
        (DatabaseError("Code: 241. DB::Exception: Memory limit exceeded. (MEMORY_LIMIT_EXCEEDED)", code=241), False),
        (OperationalError("Connection refused"), False),
        (OverflowError("int too big to convert"), True),
    ],
)
def test_only_data_is_at_fault_where_a_retry_is_of_no_use(error: Exception, at_fault: bool) -> None:
    assert errors.is_data_error(error) is at_fault


def test_an_error_of_clickhouse_is_told_in_a_sentence() -> None:
    raw = "Code: 47. DB::Exception: Unknown identifier `x`. (UNKNOWN_IDENTIFIER) (version 26.9 (chdb))\n (for url x)"
    assert errors.sentence(DatabaseError(raw)) == "Unknown identifier `x`. (UNKNOWN_IDENTIFIER)"
    away = OperationalError('Error HTTPConnectionPool(… [Errno 111] Connection refused"))')
    assert errors.sentence(away) == "ClickHouse does not answer: Connection refused"
