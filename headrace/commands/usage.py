"""`headrace usage`: what was used, by whom, in steps of time."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from clickhouse import usage_pages
from clickhouse.usage_query import DIMENSIONS, BadUsageQuery, Bucket, UsageQuery
from headrace import sql
from headrace.analytics import Analytics, UsageAnswer
from headrace.commands.failures import plain_failures
from headrace.local import resolve
from headrace.settings import Settings

_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]
_NAMES = ", ".join(DIMENSIONS)


def usage(
    by: Annotated[str, typer.Option("--by", help=f"Comma-separated dimensions: {_NAMES}.")] = "tenant",
    bucket: Annotated[Bucket, typer.Option("--bucket", help="Length of the steps of time.")] = Bucket.NONE,
    begin: Annotated[
        datetime | None, typer.Option("--from", formats=_FORMATS, help="UTC; default 30 days before --to.")
    ] = None,
    end: Annotated[datetime | None, typer.Option("--to", formats=_FORMATS, help="UTC; default now.")] = None,
    where: Annotated[
        list[str] | None, typer.Option("--where", help="A filter as dimension=value; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Most rows.")] = 1000,
    after: Annotated[
        str | None, typer.Option("--after", help="What the page before says that the next one begins after.")
    ] = None,
    form: Annotated[sql.Format, typer.Option("--format", help="How to print the answer.")] = sql.Format.TABLE,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
    ] = None,
) -> None:
    """Requests, tokens, cost and mean durations (ms) of all tenants."""
    with plain_failures(BadUsageQuery, sql.BadInput):
        until = end.replace(tzinfo=UTC) if end is not None else None
        since = begin.replace(tzinfo=UTC) if begin is not None else None
        filters: dict[str, tuple[str, ...]] = {}
        for text in where or []:
            name, mark, value = text.partition("=")
            if not mark:
                raise sql.BadInput(f"--where {text!r} is not of the form dimension=value")
            filters[name] = (*filters.get(name, ()), value)
        names = tuple(name.strip() for name in by.split(",") if name.strip())
        query = usage_pages.asked(
            since, until, bucket, by=names, where=filters, limit=limit, after=after, now=datetime.now(UTC)
        )
        answer = asyncio.run(_ask(resolve(data_dir), query))
    if answer.has_more:
        typer.echo(f"there are more rows; the same command shows the next ones with --after {answer.last_id}", err=True)
    if form is sql.Format.CSV:
        typer.echo(answer.csv(), nl=False)
    else:
        typer.echo(sql.render(sql.Answer(answer.columns, answer.rows), form))


async def _ask(conf: Settings, query: UsageQuery) -> UsageAnswer:
    analytics = Analytics(conf)
    try:
        return await analytics.usage(query)
    finally:
        await analytics.stop()
