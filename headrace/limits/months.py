"""Calendar months in UTC, as budgets count them. Pure; `lua` has the same rule for Redis's own clock."""

from __future__ import annotations

from datetime import UTC, datetime


def month_of(unix_ms: int) -> str:
    """The month of a moment, as `YYYYMM`."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y%m")


def month_start_ms(month: str) -> int:
    """Unix ms at which a month begins."""
    return int(datetime(int(month[:4]), int(month[4:]), 1, tzinfo=UTC).timestamp()) * 1000


def next_month_ms(month: str) -> int:
    """Unix ms at which the month after it begins, and its budget ends."""
    year, number = int(month[:4]), int(month[4:])
    return month_start_ms(f"{year + number // 12:04d}{number % 12 + 1:02d}")
