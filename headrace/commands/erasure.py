"""Commands that erase content: `erase` asks for it, `erasures` shows how far it is."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from headrace import erasure
from headrace.commands.failures import plain_failures, stop
from headrace.commands.records import ACTOR
from headrace.control_client import command, control_client
from headrace.erasure import ErasureBook
from headrace.errors import HeadraceError
from headrace.local import resolve
from headrace.redis_client import connect
from headrace.settings import Settings
from headrace.sql import drawn
from schemas.control import APP, REQUEST, USER, Erasure

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(erase)
    app.command()(erasures)


def erase(
    user: Annotated[str | None, typer.Option("--user", help="All that this user's keys asked until now.")] = None,
    app: Annotated[str | None, typer.Option("--app", help="All that this app asked until now.")] = None,
    request: Annotated[str | None, typer.Option("--request", help="One request, by its id or completion id.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept in the audit trail.")] = "",
    data_dir: DataDir = None,
) -> None:
    """Erase prompts and answers for good; what was spent stays."""
    given = {USER: user, APP: app, REQUEST: request}
    with plain_failures(HeadraceError):
        asked = [Erasure(erasure.subject(kind, name)) for kind, name in given.items() if name]
        if len(asked) != 1:
            raise stop("name one of --user, --app and --request")
        asyncio.run(_ask(resolve(data_dir), asked[0], reason))
    typer.echo(f"{asked[0].subject} is erased: no part of Headrace gives it out any more.")
    typer.echo(
        f"Analytics forget it within seconds (`headrace erasures`); the last of Kafka's own copies expires within "
        f"{erasure.longest_days()} days."
    )


async def _ask(conf: Settings, asked: Erasure, reason: str) -> None:
    async with control_client(conf, timeout=10.0) as client:
        await client.submit([command(asked, actor=ACTOR, reason=reason)])


def erasures(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data_dir: DataDir = None,
) -> None:
    """List erasures, the newest first: since when, and where."""
    with plain_failures(HeadraceError):
        found = asyncio.run(_all(resolve(data_dir)))
    if as_json:
        shown = [msgspec.to_builtins(one) | {"gone_ms": erasure.gone_ms(one.asked_ms)} for one in found]
        typer.echo(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
        return
    table = Table("subject", "asked (UTC)", *erasure.PROJECTIONS, "gone from Kafka", header_style="bold")
    for one in found:
        applied = [_time(one.applied.get(name, 0)) for name in erasure.PROJECTIONS]
        table.add_row(one.subject, _time(one.asked_ms), *applied, _time(max(erasure.gone_ms(one.asked_ms).values())))
    typer.echo(drawn(table))


async def _all(conf: Settings) -> list[Erasure]:
    redis = connect(conf.redis_url)
    try:
        return await ErasureBook(redis).all()
    finally:
        await redis.aclose()


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M") if ms else "not yet"
