"""Writes batches of Kafka records into ClickHouse, so that `requests` holds deciding terminals only.

A terminal is void when a higher attempt was opened before it (`topics.request_log`). Openings are rows of
`request_attempts_raw`, durable before any terminal of the same batch is judged, and asked for by every batch. So no
state lives in a process: after a restart, a rebalance or a replay from any earlier offset, a batch is judged alike,
provided that each partition is written in the order of its offsets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from clickhouse_connect.driver.asyncclient import AsyncClient

from clickhouse.erasures import scrub
from clickhouse.inserts import insert
from clickhouse.rollups import Rollups, touches
from clickhouse.rows import Item
from clickhouse.tables import ATTEMPTS, REQUESTS, TABLES, USAGE, Table
from headrace.erasure import Erasures

IDS_PER_QUERY = 2000
"""2000 ids of at most 64 characters stay below `max_query_size`, 256 KiB by default."""

Identity = tuple[str, str]
"""(tenant, request_id)."""
Openings = Mapping[Identity, Sequence[tuple[int, int]]]
"""Of each request: (attempt, offset) of its openings."""

_TENANT = REQUESTS.index("tenant")
_ID = REQUESTS.index("request_id")
_ATTEMPT = REQUESTS.index("attempts")
_OFFSET = REQUESTS.index("kafka_offset")


@dataclass(slots=True)
class Outcome:
    """What became of a batch: rows inserted by table name, and items that ClickHouse refused, with the reason."""

    written: dict[str, int] = field(default_factory=dict)
    void: int = 0
    """Terminals of fenced attempts, which are no rows."""
    refused: list[tuple[Item, str]] = field(default_factory=list)


def is_void(attempt: int, offset: int, openings: Iterable[tuple[int, int]]) -> bool:
    """Whether a terminal does not count: some opening of a higher attempt stands before it."""
    return any(opened > attempt and at < offset for opened, at in openings)


def without_void(terminals: Sequence[Item], openings: Openings) -> list[Item]:
    """The terminals (items of `requests_raw`) that no higher attempt precedes."""
    return [item for item in terminals if not _is_void(item, openings)]


def _is_void(item: Item, openings: Openings) -> bool:
    row = item.row
    found = openings.get((str(row[_TENANT]), str(row[_ID])), ())
    return is_void(int(str(row[_ATTEMPT])), int(str(row[_OFFSET])), found)


class Projection:
    """The tables of one database, or a copy of them under construction."""

    def __init__(
        self, client: AsyncClient, database: str, *, suffix: str = "", erasures: Erasures | None = None
    ) -> None:
        """What `erasures` mean is not written."""
        self._erasures = erasures or {}
        self._client = client
        self._database = database
        self._suffix = suffix

    def where(self, table: Table) -> str:
        """Full name of a table. Openings are facts that only ever grow, so a copy shares them."""
        return f"{self._database}.{table.name}{'' if table is ATTEMPTS else self._suffix}"

    async def write(self, items: Iterable[Item]) -> Outcome:
        """Insert a batch, durable when this returns. After an error of `clickhouse.errors.Away`, write it again."""
        by_table: dict[Table, list[Item]] = defaultdict(list)
        for item in scrub(items, self._erasures):
            by_table[item.table].append(item)
        outcome = Outcome()
        for table in TABLES:
            rows = by_table[table]
            if table is REQUESTS and rows:
                kept = without_void(rows, await self.openings({str(item.row[_ID]) for item in rows}))
                outcome.void = len(rows) - len(kept)
                rows = kept
            refused = await insert(self._client, self.where(table), table, rows)
            outcome.refused += refused
            if table is USAGE and rows:
                # After the rows: who adds an hour up must not take it for touched before they can be read.
                await Rollups(self._client, self._database).touch(touches(rows), datetime.now(UTC))
            if rows:
                outcome.written[table.view] = len(rows) - len(refused)
        return outcome

    async def openings(self, request_ids: Iterable[str]) -> Openings:
        """What `request_attempts_raw` knows of these requests."""
        found: dict[Identity, list[tuple[int, int]]] = defaultdict(list)
        ids = list(request_ids)
        for start in range(0, len(ids), IDS_PER_QUERY):
            result = await self._client.query(
                f"SELECT tenant, request_id, attempt, min(kafka_offset) FROM {self.where(ATTEMPTS)} "  # noqa: S608
                "WHERE request_id IN %(ids)s GROUP BY tenant, request_id, attempt",
                parameters={"ids": tuple(ids[start : start + IDS_PER_QUERY])},
            )
            for tenant, request_id, attempt, offset in result.result_rows:
                found[tenant, request_id].append((attempt, offset))
        return found
