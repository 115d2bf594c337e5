"""`GET /v1/usage`: what a key has used, by model and day; and what both usage endpoints share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import Header, Query, Request
from starlette.responses import JSONResponse, Response

from clickhouse import usage_pages
from clickhouse.usage_query import BadUsageQuery, Bucket, UsageQuery
from headrace.access import Permission
from headrace.analytics import UsageAnswer
from headrace.errors import InvalidRequest
from ingress import guard
from ingress.auth import asking_key
from ingress.guard import Who
from ingress.services import Services
from schemas.usage import UsageRows

router = guard.router(tags=["usage"])
HAS_MORE, LAST_ID = "x-hr-has-more", "x-hr-last-id"
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "model": UsageRows,
        "description": "What was used; as CSV with a line of names.",
        "content": {"text/csv": {"schema": {"type": "string"}}},
        "headers": {
            HAS_MORE: {
                "description": "Of CSV: whether there are rows beyond the limit.",
                "schema": {"type": "string", "enum": ["true", "false"]},
            },
            LAST_ID: {
                "description": "Of CSV with rows: `after` of the next page.",
                "schema": {"type": "string"},
            },
        },
    }
}
"""The answer of both endpoints, for OpenAPI: rows are sent as ClickHouse gave them, without being checked again."""

MAX_AFTER = 8192
From = Annotated[datetime | None, Query(alias="from", description="Begin, ISO 8601; default 30 days before `to`.")]
To = Annotated[datetime | None, Query(alias="to", description="End, which does not belong to it; default now.")]
After = Annotated[
    str | None,
    Query(
        max_length=MAX_AFTER,
        description="`last_id` of the page before; all else as it was, where `from` and `to` may be left out.",
    ),
]
Accept = Annotated[str, Header(include_in_schema=False)]
Limit = Annotated[int, Query(ge=1, le=10_000, description="Most rows.")]


@router.get("/v1/usage", responses=ANSWER)
@guard.needs(Permission.USAGE_OWN)
async def own_usage(
    request: Request,
    who: Who,
    begin: From = None,
    end: To = None,
    bucket: Annotated[Bucket, Query(description="Length of the steps of time.")] = Bucket.DAY,
    after: After = None,
    form: Annotated[Literal["json", "csv"] | None, Query(alias="format")] = None,
    accept: Accept = "",
) -> Response:
    """Requests, tokens and cost of the calling key, by model and day; nobody else's."""
    services: Services = request.app.state.services
    key = asking_key(request, who)
    where = {"tenant": (key.app,), "key": (key.id,)}
    with refusals():
        query = usage_pages.asked(
            begin, end, bucket, by=("model",), where=where, limit=10_000, after=after, now=datetime.now(UTC)
        )
    return rendered(query, await services.analytics.usage(query), form, accept)


@contextmanager
def refusals() -> Iterator[None]:
    """Raises `InvalidRequest` for a question that cannot be answered."""
    try:
        yield
    except BadUsageQuery as error:
        raise InvalidRequest(f"{error}.") from None


def rendered(query: UsageQuery, answer: UsageAnswer, form: str | None, accept: str) -> Response:
    """The answer as JSON, or as CSV where the caller asks for it."""
    if form == "csv" or (form is None and "text/csv" in accept):
        headers = {HAS_MORE: str(answer.has_more).lower()}
        if answer.last_id is not None:
            headers[LAST_ID] = answer.last_id
        return Response(answer.csv(), media_type="text/csv", headers=headers)
    return JSONResponse(
        {
            "object": "list",
            "from": query.begin.isoformat(),
            "to": query.end.isoformat(),
            "bucket": query.bucket.value,
            "has_more": answer.has_more,
            "last_id": answer.last_id,
            "data": answer.dicts(),
        }
    )
