"""Answers questions about usage from ClickHouse, for the API and the command line."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from clickhouse_connect.driver.asyncclient import AsyncClient

from clickhouse.client import connect, database_name
from clickhouse.errors import Away, code, sentence
from clickhouse.usage_pages import last_id
from clickhouse.usage_query import UsageQuery, Windows, build, plain, windows_sql
from headrace.errors import Unavailable
from headrace.settings import Settings

log = structlog.get_logger(__name__)

TIMEOUT_S = 30
READ_ONLY = {"readonly": 2, "max_execution_time": TIMEOUT_S}


@dataclass(frozen=True, slots=True)
class UsageAnswer:
    """Columns and rows; money is a decimal string, durations are means in milliseconds."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[object, ...]]
    has_more: bool = False
    """Whether there are rows beyond the limit."""
    last_id: str | None = None
    """After which the next page begins; None where there are no rows."""

    @classmethod
    def of(cls, query: UsageQuery, found: Sequence[Sequence[Any]]) -> UsageAnswer:
        """From what `answered` gives."""
        rows = [tuple(plain(value) for value in row) for row in found[: query.limit]]
        last = last_id(query, found[len(rows) - 1]) if rows else None
        return cls(query.columns, rows, len(found) > query.limit, last)

    def dicts(self) -> list[dict[str, object]]:
        """A row a dict."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def csv(self) -> str:
        """With a line of names."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_cell(value) for value in row] for row in self.rows)
        return out.getvalue()


def _cell(value: object) -> object:
    """A label that a spreadsheet would take for a formula is told from one by a quote before it."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r") else value


async def answered(client: AsyncClient, query: UsageQuery) -> Sequence[Sequence[Any]]:
    """Rows of a question as the client gives them; one beyond its limit where there are more.

    Raises as ClickHouse does.
    """
    windows = Windows()
    if (asked := windows_sql(query)) is not None:
        found = await client.query(asked[0], parameters=asked[1], settings=dict(READ_ONLY))
        windows = Windows.of(found.result_rows)
    sql, values = build(query, windows)
    return (await client.query(sql, parameters=values, settings=dict(READ_ONLY))).result_rows


class Analytics:
    """A connection that is made when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: AsyncClient | None = None

    async def usage(self, query: UsageQuery) -> UsageAnswer:
        """The answer. Raises `Unavailable` while ClickHouse is away."""
        try:
            return await self._answered(query)
        except Away as error:
            if code(error) is None:  # A connection that lay idle may have been closed under the question.
                with contextlib.suppress(*Away):
                    return await self._answered(query)
            log.warning("usage_unanswered", error=sentence(error), code=code(error))
            raise Unavailable("Usage cannot be read now (ClickHouse does not answer); try again.") from error

    async def _answered(self, query: UsageQuery) -> UsageAnswer:
        if self._client is None:
            database = database_name(self._settings)
            self._client = await connect(self._settings, database=database, timeout_s=TIMEOUT_S + 5.0)
        return UsageAnswer.of(query, await answered(self._client, query))

    async def stop(self) -> None:
        """Close the connection, if there is one."""
        if self._client is not None:
            await self._client.close()
