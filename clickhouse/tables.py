"""The tables that the sink writes: names and columns, in the order of the rows of `clickhouse.rows`.

Migrations hold the DDL; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT = "String"
LABEL = "LowCardinality(String)"
TIME = "DateTime64(3, 'UTC')"
MAYBE_TIME = f"Nullable({TIME})"
MAYBE_COUNT = "Nullable(UInt64)"

_SOURCE = (("kafka_partition", "UInt32"), ("kafka_offset", "UInt64"), ("precedence", "UInt64"))


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A raw table, and the view `view` of it that users query and that shows no duplicates.

    One is equal to itself alone: rows are sorted by their table, and a hash of all columns would cost more than a row.
    """

    name: str
    view: str
    columns: tuple[tuple[str, str], ...]

    @property
    def names(self) -> list[str]:
        """Column names."""
        return [name for name, _ in self.columns]

    @property
    def types(self) -> list[str]:
        """ClickHouse types of the columns."""
        return [kind for _, kind in self.columns]

    def index(self, column: str) -> int:
        """Position of a column in a row. Raises `ValueError` on an unknown one."""
        return self.names.index(column)


ATTEMPTS = Table(
    "request_attempts_raw",
    "request_attempts",
    (
        ("request_id", TEXT),
        ("tenant", LABEL),
        ("attempt", "UInt32"),
        ("epoch", "Int64"),
        ("worker", LABEL),
        ("reason", TEXT),
        ("opened_at", TIME),
        *_SOURCE,
    ),
)

_TOKENS = (
    ("prompt_tokens", "UInt64"),
    ("cached_tokens", "UInt64"),
    ("completion_tokens", "UInt64"),
    ("reasoning_tokens", "UInt64"),
    ("estimated", "Bool"),
)

REQUESTS = Table(
    "requests_raw",
    "requests",
    (
        ("request_id", TEXT),
        ("tenant", LABEL),
        ("key_id", LABEL),
        ("model", LABEL),
        ("alias", LABEL),
        ("pool", LABEL),
        ("provider", LABEL),
        ("worker", LABEL),
        ("status", LABEL),
        ("stream", "Bool"),
        ("attempts", "UInt32"),
        ("epoch", "Int64"),
        ("error_status", "UInt16"),
        ("error_code", LABEL),
        ("error_type", LABEL),
        ("error_message", TEXT),
        *_TOKENS,
        ("price_version", "Int64"),
        ("accepted_at", TIME),
        ("routed_at", MAYBE_TIME),
        ("assigned_at", MAYBE_TIME),
        ("started_at", MAYBE_TIME),
        ("first_token_at", MAYBE_TIME),
        ("finished_at", TIME),
        ("queue_ms", MAYBE_COUNT),
        ("ttft_ms", MAYBE_COUNT),
        ("generation_ms", MAYBE_COUNT),
        ("total_ms", "UInt64"),
        *_SOURCE,
    ),
)

EVENTS = Table(
    "request_events_raw",
    "request_events",
    (
        ("request_id", TEXT),
        ("tenant", LABEL),
        ("attempt", "UInt32"),
        ("stage_rank", "UInt8"),
        ("stage", LABEL),
        ("role", LABEL),
        ("instance", LABEL),
        ("epoch", "Int64"),
        ("at", TIME),
        ("detail", "Map(LowCardinality(String), String)"),
        *_SOURCE,
    ),
)

USAGE = Table(
    "usage_lines_raw",
    "usage",
    (
        ("usage_id", TEXT),
        ("request_id", TEXT),
        ("tenant", LABEL),
        ("key_id", LABEL),
        ("user_id", LABEL),
        ("model", LABEL),
        ("alias", LABEL),
        ("provider", LABEL),
        ("worker", LABEL),
        ("status", LABEL),
        ("error_code", LABEL),
        ("attempts", "UInt32"),
        *_TOKENS,
        ("audio_seconds", "Decimal(18, 3)"),
        ("images", "UInt64"),
        ("revision", "UInt32"),
        ("price_version", "Int64"),
        ("currency", LABEL),
        ("cost", "Decimal(38, 18)"),
        ("repriced_of", "Array(Tuple(revision UInt32, price_version Int64, currency String, cost Decimal(38, 18)))"),
        ("stream", "Bool"),
        ("accepted_at", TIME),
        ("finished_at", TIME),
        ("queue_ms", "UInt64"),
        ("load_ms", "UInt64"),
        ("ttft_ms", "UInt64"),
        ("generation_ms", "UInt64"),
        *_SOURCE,
    ),
)

LEASE_EVENTS = Table(
    "lease_events_raw",
    "lease_events",
    (
        ("pool", LABEL),
        ("worker", LABEL),
        ("model", LABEL),
        ("epoch", "Int64"),
        ("device", LABEL),
        ("boot", TEXT),
        ("term", "Int64"),
        ("state", LABEL),
        ("bytes", "UInt64"),
        ("reason", TEXT),
        ("at", TIME),
        *_SOURCE,
    ),
)

AUDIT_EVENTS = Table(
    "audit_events_raw",
    "audit_events",
    (
        ("seq", "UInt64"),
        ("hash", TEXT),
        ("previous", TEXT),
        ("at", TIME),
        ("command", TEXT),
        ("actor", TEXT),
        ("action", LABEL),
        ("kind", LABEL),
        ("key", TEXT),
        ("outcome", LABEL),
        ("reason", TEXT),
        ("refusal", TEXT),
        ("changes", "Map(String, Tuple(before String, after String))"),
        ("detail", "Map(String, String)"),
        *_SOURCE,
    ),
)

TABLES: tuple[Table, ...] = (ATTEMPTS, REQUESTS, EVENTS, USAGE, LEASE_EVENTS, AUDIT_EVENTS)
"""In the order of writing: openings must be durable before the terminals that they void are judged."""
