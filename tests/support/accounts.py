"""What is left of requests when they have ended: one usage row each, and a ledger with nothing in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from clickhouse_connect.driver.exceptions import OperationalError

from tests.support.stacks import Stack
from tests.support.waiting import until


async def usage_rows(stack: Stack, request_ids: Iterable[str]) -> dict[str, dict[str, object]]:
    """The usage row of each request, by id, once all are there. Fails when one has more."""
    ids = set(request_ids)
    wanted = ", ".join(f"'{one}'" for one in sorted(ids))
    query = f"SELECT * FROM usage WHERE request_id IN ({wanted})"  # noqa: S608

    async def stored() -> list[dict[str, object]] | None:
        try:
            rows = await asyncio.to_thread(stack.rows, query)
        except OperationalError:
            return None  # ClickHouse is on its way back
        return rows if len(rows) >= len(ids) else None

    rows = await until(stored, "a usage row for each request", 40)
    found = {str(row["request_id"]): row for row in rows}
    assert len(rows) == len(found) == len(ids)
    return found


async def settled(stack: Stack, within_s: float = 40) -> dict[str, object]:
    """The ledger, once it shows nothing in flight."""

    async def empty() -> dict[str, object] | None:
        found = await asyncio.to_thread(stack.ledger)
        return found if found["in_flight"] == 0 else None

    return await until(empty, "nothing is in flight", within_s)
