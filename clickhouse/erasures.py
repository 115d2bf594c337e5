"""Erasures in ClickHouse: rows that are written lose what could quote or name somebody, and so do those that are there.

The tables hold no prompt and no answer. What may quote one is an error's message, and what is told of a step; these are
replaced. Rows stay, with their times, counts, tenants, keys and costs: they are what is billed and balanced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from clickhouse_connect.driver.asyncclient import AsyncClient

from clickhouse.rows import Item
from clickhouse.tables import EVENTS, REQUESTS, Table
from headrace.erasure import Erasures, erased_by, subjects
from schemas.control import APP, KEY, REQUEST, Erasure

PROJECTION = "clickhouse"
"""Its name in `Erasure.applied`."""
SETTINGS = {"mutations_sync": 2}
"""A change of rows that are there is done, on all replicas, when it is answered."""


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """What a table loses, and how it tells whose a row is."""

    table: Table
    empties: Mapping[str, tuple[object, str]]
    """Column -> what it holds then, as a row has it and as SQL does."""
    accepted: str
    """Column of the time by which it is told whether an erasure means the row."""
    key: str
    """SQL of the id of the key that asked; empty where no row tells."""


GONE = {"erased": "true"}
"""What a step tells instead; a request whose steps say so is not given out, though its key is not told any more."""
SCRUBBED = (
    Scrubbed(REQUESTS, {"error_message": ("", "''")}, "accepted_at", "key_id"),
    Scrubbed(EVENTS, {"detail": (GONE, "map('erased', 'true')")}, "at", "detail['key_id']"),
)
_BY_TABLE = {one.table: one for one in SCRUBBED}


def scrub(items: Iterable[Item], erasures: Erasures) -> list[Item]:
    """The rows without what is erased. Pure: a replay gives the same rows again, whenever it is."""
    if not erasures:
        return list(items)
    return [_scrubbed(item, erasures) for item in items]


def _scrubbed(item: Item, erasures: Erasures) -> Item:
    rule = _BY_TABLE.get(item.table)
    if rule is None:
        return item
    row = dict(zip(item.table.names, item.row, strict=True))
    detail = row.get("detail")
    key = detail.get("key_id", "") if isinstance(detail, dict) else row.get("key_id", "")
    names = subjects(str(row["tenant"]), str(row["request_id"]), str(key))
    found = (erasures[name] for name in names if name in erasures)
    at_ms = int(row[rule.accepted].timestamp() * 1000)  # type: ignore[attr-defined]
    if erased_by(found, at_ms) is None:
        return item
    return item._replace(row=tuple(rule.empties.get(name, (value,))[0] for name, value in row.items()))


async def apply(client: AsyncClient, database: str, erasures: Iterable[Erasure]) -> None:
    """Empty the columns of rows that are there. Done again it changes nothing. Raises `ClickHouseError`."""
    for erasure in erasures:
        for rule in SCRUBBED:
            where = _where(rule, erasure)
            if where is None:
                continue
            changes = ", ".join(f"{column} = {empty}" for column, (_, empty) in rule.empties.items())
            left = " OR ".join(f"{column} != {empty}" for column, (_, empty) in rule.empties.items())
            await client.command(
                f"ALTER TABLE {database}.{rule.table.name} UPDATE {changes} WHERE {where} AND ({left})",
                parameters={"id": erasure.id, "asked": erasure.asked_ms},
                settings=dict(SETTINGS),
            )


def _where(rule: Scrubbed, erasure: Erasure) -> str | None:
    column = {REQUEST: "request_id", APP: "tenant", KEY: rule.key}.get(erasure.kind)
    if not column:
        return None  # A user's is that of its keys.
    named = f"{column} = %(id)s"
    if erasure.kind == REQUEST:
        return named
    return f"{named} AND {rule.accepted} < fromUnixTimestamp64Milli(%(asked)s)"
