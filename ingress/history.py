"""Lifecycles that Kafka's readers would scan too long for, from ClickHouse."""

from __future__ import annotations

from clickhouse.client import connect, database_name
from headrace.settings import Settings
from schemas.events import LifecycleEvent, Stage


async def events(settings: Settings, request_id: str) -> list[LifecycleEvent]:
    """A request's lifecycle events as the sink stored them. Raises `OSError` when ClickHouse does not answer."""
    client = await connect(settings, timeout_s=10)
    try:
        result = await client.query(
            "SELECT * REPLACE(toUnixTimestamp64Milli(at) AS at) FROM {db:Identifier}.request_events "
            "WHERE request_id = {id:String} LIMIT 1000",
            parameters={"db": database_name(settings), "id": request_id},
        )
    finally:
        await client.close()
    return [
        LifecycleEvent(
            request_id=row["request_id"],
            tenant=row["tenant"],
            stage=Stage(row["stage"]),
            at_ms=row["at"],
            role=row["role"],
            instance=row["instance"],
            attempt=row["attempt"],
            epoch=row["epoch"],
            detail=dict(row["detail"]),
        )
        for row in result.named_results()
    ]
