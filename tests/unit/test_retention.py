"""How long each table keeps its rows is what the settings say."""

from __future__ import annotations

from typing import Any

import pytest

from clickhouse import retention
from headrace.settings import Settings


def test_without_settings_money_stays_and_all_else_goes_after_400_days() -> None:
    days = {table: kept for table, (_, kept) in retention.wanted(Settings()).items()}
    assert {table for table, kept in days.items() if kept is None} == {
        "usage_lines_raw", "usage_minutes_raw", "usage_hours_raw", "usage_days_raw", "latency_hours_raw",
    }  # fmt: skip
    assert {kept for kept in days.values() if kept is not None} == {400}
    assert {"requests_raw", "lease_events_raw", "audit_events_raw"} <= days.keys()


@pytest.mark.parametrize(
    ("setting", "tables"),
    [
        ("requests", {"requests_raw": "accepted_at", "request_attempts_raw": "opened_at", "request_events_raw": "at"}),
        ("leases", {"lease_events_raw": "at"}),
        ("audit", {"audit_events_raw": "at"}),
        ("minutes", {"usage_minutes_raw": "minute"}),
    ],
)
def test_a_setting_is_that_of_its_tables_and_of_no_other(setting: str, tables: dict[str, str]) -> None:
    changed: dict[str, Any] = {f"retention_{setting}_days": 31}
    wanted, before = retention.wanted(Settings(**changed)), retention.wanted(Settings())
    assert wanted == before | {table: (column, 31) for table, column in tables.items()}


@pytest.mark.parametrize("setting", ["requests", "leases", "audit", "minutes", "usage"])
def test_nothing_is_kept_for_no_time(setting: str) -> None:
    changed: dict[str, Any] = {f"retention_{setting}_days": 0}
    with pytest.raises(ValueError, match=f"retention_{setting}_days"):
        Settings(**changed)
