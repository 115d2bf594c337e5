"""`GET /admin/usage`: usage of all tenants, grouped by any dimension, in steps of time."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import Query, Request
from starlette.responses import Response

from clickhouse import usage_pages
from clickhouse.usage_query import DIMENSIONS, Bucket
from headrace.access import Permission
from headrace.errors import InvalidRequest
from ingress import guard
from ingress.services import Services
from ingress.usage import ANSWER, Accept, After, From, Limit, To, refusals, rendered

router = guard.router(prefix="/admin", tags=["admin: usage"])

_NAMES = ", ".join(DIMENSIONS)


@router.get("/usage", responses=ANSWER)
@guard.needs(Permission.USAGE_READ)
async def usage(
    request: Request,
    begin: From = None,
    end: To = None,
    by: Annotated[str, Query(description=f"Comma-separated, out of {_NAMES}.")] = "tenant",
    bucket: Annotated[Bucket, Query(description="Length of the steps of time.")] = Bucket.NONE,
    where: Annotated[
        list[str] | None, Query(description="A filter as `dimension:value`; of one dimension any value counts.")
    ] = None,
    limit: Limit = 1000,
    after: After = None,
    form: Annotated[Literal["json", "csv"] | None, Query(alias="format")] = None,
    accept: Accept = "",
) -> Response:
    """Requests, tokens, cost and mean durations; the dearest first. Money of different currencies is never added."""
    services: Services = request.app.state.services
    names = tuple(name.strip() for name in by.split(",") if name.strip())
    wanted = filters(where or [])
    with refusals():
        query = usage_pages.asked(
            begin, end, bucket, by=names, where=wanted, limit=limit, after=after, now=datetime.now(UTC)
        )
    return rendered(query, await services.analytics.usage(query), form, accept)


def filters(given: list[str]) -> dict[str, tuple[str, ...]]:
    """`dimension:value` pairs by dimension. Raises `InvalidRequest`."""
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, mark, value = text.partition(":")
        if not mark:
            raise InvalidRequest(f"A filter is written as dimension:value, out of {_NAMES}.", param="where")
        found[name] = (*found.get(name, ()), value)
    return found
