"""Retention: what the settings say is in force after a migration, and money goes only when that was said twice."""

from __future__ import annotations

import pytest

from clickhouse import retention
from clickhouse.migrate import migrate
from headrace.settings import Settings
from tests.support.tables import answer


def kept(conf: Settings, table: str) -> int | None:
    return retention.days_of(str(answer(conf, f"SHOW CREATE TABLE {table}")[0][0]))


def test_a_migration_puts_retention_into_force_and_takes_it_back(server: Settings) -> None:
    conf = server.model_copy(update={"clickhouse_database": "retention"})
    migrate(conf)
    assert [kept(conf, table) for table in ("usage_lines_raw", "usage_days_raw", "requests_raw")] == [None, None, 400]
    shorter = conf.model_copy(
        update={"retention_usage_days": 800, "retention_requests_days": 30, "retention_audit_days": 90}
    )
    migrate(shorter)
    tables = (
        "usage_lines_raw", "usage_days_raw", "usage_minutes_raw", "requests_raw", "request_events_raw",
        "audit_events_raw",
    )  # fmt: skip
    assert [kept(conf, table) for table in tables] == [800, 800, 800, 30, 30, 90]
    migrate(conf)
    assert [kept(conf, table) for table in tables] == [None, None, None, 400, 400, 400]


def test_usage_goes_early_only_when_that_was_said_twice(server: Settings) -> None:
    conf = server.model_copy(update={"clickhouse_database": "retention", "retention_usage_days": 399})
    with pytest.raises(retention.UnsafeRetention, match="HEADRACE_RETENTION_USAGE_DAYS_AGAIN=399"):
        migrate(conf)
    assert retention.wanted(conf.model_copy(update={"retention_usage_days_again": 399}))["usage_lines_raw"][1] == 399
    with pytest.raises(retention.UnsafeRetention):
        retention.wanted(conf.model_copy(update={"retention_usage_days_again": 398}))


def test_a_user_who_reads_is_named_safely() -> None:
    assert "GRANT SELECT ON headrace.* TO analyst" in retention.analyst("headrace", "analyst")
    with pytest.raises(ValueError, match="user name"):
        retention.analyst("headrace", "x; DROP USER y")
