"""Records for tests of ClickHouse's tables, and what the tables then answer."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import msgspec

from clickhouse.rows import Item, read
from headrace import sql
from headrace.settings import Settings
from schemas.events import LogRecord, Status, UsageEvent

NOW_MS = 1_790_000_000_000


@dataclass(frozen=True)
class Record:
    topic: str
    offset: int
    value: bytes
    partition: int = 0
    timestamp: int = NOW_MS


def log_record(offset: int, event: LogRecord) -> Record:
    return Record("inference.log", offset, msgspec.json.encode(event))


def usage_event(number: int, **changes: object) -> UsageEvent:
    made = UsageEvent(
        usage_id=f"u{number}", request_id=f"{number:032x}", tenant="t", key_id="k", model="m", alias="a", provider="p",
        worker="w", status=Status.COMPLETED, attempts=1, prompt_tokens=10, cached_tokens=2, completion_tokens=5,
        reasoning_tokens=1, estimated=False, price_version=3, currency="USD", cost=Decimal("0.000003000000000001"),
        stream=True, accepted_ms=NOW_MS, finished_ms=NOW_MS + 9, queue_ms=1, ttft_ms=2, generation_ms=3,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def items(records: list[Record]) -> list[Item]:
    return [read(record) for record in records]


def answer(conf: Settings, text: str) -> list[tuple[object, ...]]:
    return [tuple(row) for row in sql.run(conf, text, {}).rows]
