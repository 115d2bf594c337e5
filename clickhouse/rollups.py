"""Adds usage up by minute, hour and day: which windows are due (pure), and the statements that do it.

Every write of usage rows is followed, before its offsets are committed, by rows of `usage_touched` for its hours. A
window is added up from the deduplicated rows as a whole, under a number of its own, and then recorded in `usage_rolled`
with what `touched` was *before* the rows were read. The views take the record that saw most, and only while nothing has
touched the window since; else they read the rows. So nobody has to be the only one who does this, and whoever dies or
comes late in the middle leaves nothing that counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import cast

import structlog
from clickhouse_connect.driver.asyncclient import AsyncClient

from clickhouse.client import INSERT_SETTINGS
from clickhouse.rows import Item
from clickhouse.tables import USAGE

log = structlog.get_logger(__name__)

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
LENGTH = {"hour": HOUR, "day": DAY}
GRACE = timedelta(minutes=2)
"""A window is added up this long after its end: most requests that were accepted in it have ended by then …"""
QUIET = timedelta(seconds=20)
"""… and when no row came to it for this long …"""
PATIENCE = timedelta(minutes=5)
"""… or when it was not added up for this long, though rows keep coming."""
WINDOWS_AT_ONCE = 48
ROWS_AT_ONCE = 2_000_000
"""Bounds on one statement's memory."""
KEPT_S = 600
"""Results that no longer count stay this long, for queries that have begun with them."""
_STATEMENT = {**INSERT_SETTINGS, "max_execution_time": 0, "max_bytes_before_external_group_by": 400_000_000}

_TABLES = {
    "hour": (
        ("usage_minutes_raw", "usage_minutes_live", "toStartOfHour(minute)"),
        ("usage_hours_raw", "usage_hours_live", "hour"),
        ("latency_hours_raw", "latency_hours_live", "hour"),
    ),
    "day": (("usage_days_raw", "usage_days_live", "day"),),
}
"""Of each grain: where its results go, what computes them, and the window of a result."""

_ACCEPTED = USAGE.index("accepted_at")


@dataclass(frozen=True, slots=True)
class Window:
    """An hour or a day with usage, as `usage_windows` shows it."""

    start: datetime
    touched: int
    last_at: datetime
    """When a row of it came last."""
    seen: int
    """`touched` when it was added up; 0 before."""
    computed_at: datetime
    """When that was; the epoch before."""


def touches(items: Iterable[Item]) -> Counter[datetime]:
    """How many of the usage rows fall into each hour."""
    hours = Counter(cast("int", item.row[_ACCEPTED]) // 3_600_000 for item in items)
    return Counter({datetime.fromtimestamp(hour * 3600, UTC): count for hour, count in hours.items()})


def due(windows: Iterable[Window], length: timedelta, now: datetime) -> list[Window]:
    """The windows to add up now, the latest first: closed, changed, and quiet or kept waiting for long."""
    return sorted(
        (
            window
            for window in windows
            if window.seen != window.touched
            and window.start + length + GRACE <= now
            and (now - window.last_at >= QUIET or now - window.computed_at >= PATIENCE)
        ),
        key=lambda window: window.start,
        reverse=True,
    )


def portion(windows: Sequence[Window]) -> list[Window]:
    """As many of the first windows as one statement may take, at least one."""
    taken: list[Window] = []
    rows = 0
    for window in windows[:WINDOWS_AT_ONCE]:
        rows += window.touched
        if taken and rows > ROWS_AT_ONCE:
            break
        taken.append(window)
    return taken


class Rollups:
    """The rollups of one database."""

    def __init__(self, client: AsyncClient, database: str) -> None:
        self._client = client
        self._database = database

    async def touch(self, hours: Mapping[datetime, int], now: datetime) -> None:
        """Say that rows of these hours were written, after they are durable and before their offsets are committed."""
        if hours:
            await self._client.insert(
                f"{self._database}.usage_touched",
                [[hour, rows, now] for hour, rows in hours.items()],
                column_names=["hour", "touched", "last_at"],
                column_type_names=["DateTime('UTC')", "UInt64", "DateTime('UTC')"],
                settings=dict(INSERT_SETTINGS),
            )

    async def touch_all(self, now: datetime, *, since: datetime | None = None) -> None:
        """Let the windows since then be added up anew, also those that hold no rows any more."""
        where = "WHERE accepted_at >= %(since)s" if since is not None else ""
        hours = "SELECT hour, 1, %(now)s FROM {0}.usage_touched GROUP BY hour UNION ALL " if since is None else ""
        await self._client.command(
            f"INSERT INTO {{0}}.usage_touched {hours}SELECT toStartOfHour(accepted_at) AS hour, 1, %(now)s "  # noqa: S608
            f"FROM {{0}}.usage_lines_raw {where} GROUP BY hour".format(self._database),
            parameters={"now": now, "since": since},
            settings=_STATEMENT,
        )

    async def run(self, now: datetime) -> int:
        """Add up what is due; how many windows that was. Days follow their hours. Raises as ClickHouse does."""
        count = 0
        for grain in ("hour", "day"):
            waiting = due(await self._windows(grain), LENGTH[grain], now)
            while waiting:
                some = portion(waiting)
                waiting = waiting[len(some) :]
                await self._add_up(grain, some, now)
                count += len(some)
        if count:
            await self._forget(now)
            log.info("usage_rolled_up", windows=count)
        return count

    async def _windows(self, grain: str) -> list[Window]:
        found = await self._client.query(
            "SELECT window, touched, last_at, seen, toDateTime64(computation / 1e9, 3, 'UTC') "  # noqa: S608
            f"FROM {self._database}.usage_windows WHERE grain = %(grain)s AND NOT clean",
            parameters={"grain": grain},
        )
        return [
            Window(_utc(start), touched, _utc(last), seen, _utc(computed))
            for start, touched, last, seen, computed in found.result_rows
        ]

    async def _add_up(self, grain: str, windows: Sequence[Window], now: datetime) -> None:
        # The number is only a name, but of two that saw the same the later one counts.
        computation = int(now.timestamp() * 1e9) + min(window.touched for window in windows) % 1000
        starts = [int(window.start.timestamp()) for window in windows]
        for table, source, start in _TABLES[grain]:
            await self._client.command(
                f"INSERT INTO {self._database}.{table} SELECT *, {computation} FROM {self._database}.{source} "  # noqa: S608
                f"WHERE {start} IN {tuple(starts) if len(starts) > 1 else f'({starts[0]})'}",
                settings=_STATEMENT,
            )
        await self._client.insert(
            f"{self._database}.usage_rolled",
            [[grain, window.start, window.touched, computation] for window in windows],
            column_names=["grain", "window", "seen", "computation"],
            column_type_names=["LowCardinality(String)", "DateTime('UTC')", "UInt64", "UInt64"],
            settings=dict(INSERT_SETTINGS),
        )

    async def _forget(self, now: datetime) -> None:
        """Delete results that have not counted for a while."""
        before = int((now.timestamp() - KEPT_S) * 1e9)
        for grain, tables in _TABLES.items():
            superseded = (
                f"SELECT window, computation FROM {self._database}.usage_rolled WHERE grain = '{grain}' "  # noqa: S608
                f"AND (window, seen, computation) NOT IN (SELECT window, seen, computation "
                f"FROM {self._database}.usage_windows WHERE grain = '{grain}') AND window IN (SELECT window "
                f"FROM {self._database}.usage_windows WHERE grain = '{grain}' AND clean AND computation < {before})"
            )
            found = await self._client.query(f"SELECT count() FROM ({superseded})")  # noqa: S608
            if not found.result_rows[0][0]:
                continue
            for table, _, start in tables:
                await self._client.command(
                    f"DELETE FROM {self._database}.{table} WHERE ({start}, computation) IN ({superseded})",  # noqa: S608
                    settings={"max_execution_time": 0},
                )
            await self._client.command(
                f"DELETE FROM {self._database}.usage_rolled WHERE grain = '{grain}' "  # noqa: S608
                f"AND (window, computation) IN ({superseded})",
                settings={"max_execution_time": 0},
            )


def _utc(at: datetime) -> datetime:
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)
