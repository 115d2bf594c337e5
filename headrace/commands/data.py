"""Commands on data: `migrate`, `sql`, `rebuild`, `ledger`; `usage`, `reprice`, `dead-letters` have own modules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from clickhouse import rebuild as clickhouse_rebuild
from clickhouse.client import database_name
from clickhouse.migrate import migrate as run_migrations
from clickhouse.queries import BadParameter
from clickhouse.readonly import NotReadOnly
from clickhouse.retention import analyst
from headrace import ledger_snapshot, sql
from headrace import rebuild as redis_rebuild
from headrace.commands import dead_letters
from headrace.commands.failures import plain_failures, stop
from headrace.commands.reprice import reprice
from headrace.commands.usage import usage
from headrace.ledger import Ledger
from headrace.local import resolve
from headrace.settings import Settings

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
]

T = TypeVar("T")


class Part(StrEnum):
    """What can be rebuilt from Kafka."""

    REDIS = "redis"
    CLICKHOUSE = "clickhouse"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(migrate)
    app.command("sql")(run_sql)
    app.command()(rebuild)
    app.command()(ledger)
    app.command()(usage)
    app.command()(reprice)
    app.add_typer(dead_letters.commands(), name="dead-letters")


def migrate(
    to: Annotated[
        int | None, typer.Option("--to", help="Go to this migration, up or down; 0 drops all tables.")
    ] = None,
    readonly_user: Annotated[
        str | None, typer.Option("--readonly-user", help="Only print how to make a user who reads the views.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Bring ClickHouse's tables to this version, and their retention to the settings."""
    with plain_failures(ValueError):
        if readonly_user is not None:
            typer.echo(analyst(database_name(resolve(data_dir)), readonly_user))
            return
        plan = run_migrations(resolve(data_dir), to)
    for step in plan.revert:
        typer.echo(f"reverted {step.number:04} {step.name}")
    for step in plan.apply:
        typer.echo(f"applied {step.number:04} {step.name}: {step.reason}")
    if not plan.revert and not plan.apply:
        typer.echo("nothing to do")


def run_sql(
    query: Annotated[
        str | None, typer.Argument(metavar="NAME|SQL", help="A named query, or a statement in quotes.")
    ] = None,
    form: Annotated[sql.Format, typer.Option("--format", help="How to print the answer.")] = sql.Format.TABLE,
    param: Annotated[
        list[str] | None, typer.Option("--param", help="A parameter as name=value; may be repeated.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the named queries.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Ask ClickHouse: usage, requests, request_events and leases hold each fact once."""
    if show:
        typer.echo(sql.catalogue())
        return
    with plain_failures(sql.BadInput, BadParameter, NotReadOnly, ValueError):
        text, given = sql.statement(query or "", sql.parameters(param or []))
        typer.echo(sql.render(sql.run(resolve(data_dir), text, given), form))


def rebuild(
    part: Annotated[Part, typer.Argument(help="What to rebuild from Kafka.")],
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="ClickHouse: forget the rows whose records Kafka no longer holds.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Rebuild Redis or ClickHouse from Kafka, while the stack runs."""
    with plain_failures(ValueError):
        conf = resolve(data_dir)
        if part is Part.REDIS:
            if from_scratch:
                raise stop("--from-scratch is for clickhouse: Redis is always rebuilt from scratch")
            restored = _with_progress(lambda show: redis_rebuild.rebuild(conf, progress=show))
            typer.echo("rebuilt redis: " + ", ".join(f"{count} {kind}" for kind, count in restored.items()))
        else:
            _rebuild_clickhouse(conf, from_scratch)


def _rebuild_clickhouse(conf: Settings, from_scratch: bool) -> None:
    report = _with_progress(lambda show: clickhouse_rebuild.rebuild(conf, from_scratch=from_scratch, progress=show))
    typer.echo(f"rebuilt clickhouse from {report.records} records")
    for view in sorted({*report.rows, *report.carried}):
        carried = f", {report.carried[view]} older than Kafka's retention kept" if report.carried[view] else ""
        typer.echo(f"  {view}: {report.rows[view]} rows{carried}")
    if report.refused:
        typer.echo(f"  {report.refused} records can be no row; see `headrace dead-letters list`")


def _with_progress(rebuilding: Callable[[Callable[[int, int], None]], Coroutine[None, None, T]]) -> T:
    """Run a rebuild behind a bar that shows how much of Kafka it has read."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("reading Kafka", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return asyncio.run(rebuilding(show))


def ledger(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    by_tenant: Annotated[bool, typer.Option("--by-tenant", help="Print each tenant's balance too.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for metering to catch up.", min=0)] = 15.0,
    data_dir: DataDir = None,
) -> None:
    """Check that every accepted request has its one terminal and its one usage; exit 1 when they do not add up."""
    with plain_failures():
        balance = asyncio.run(ledger_snapshot.take(resolve(data_dir), wait_s=wait))
    problems = balance.problems()
    if as_json:
        fields = msgspec.to_builtins(balance) | {"adds_up": not problems, "problems": problems}
        typer.echo(msgspec.json.format(msgspec.json.encode(fields), indent=2).decode())
    else:
        typer.echo(describe(balance))
        if by_tenant:
            typer.echo(describe_tenants(balance))
        for problem in problems:
            typer.echo(f"does not add up: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def describe(balance: Ledger) -> str:
    """The ledger as lines of text."""
    ended = sum(balance.terminal.values())
    lines = [
        ("records in inference.requests", balance.records),
        ("  duplicates", balance.duplicates),
        ("  unreadable", balance.unreadable),
        ("  accepted", balance.accepted),
        ("    terminal", ended),
        *((f"      {status}", count) for status, count in balance.terminal.items()),
        ("    in flight", balance.in_flight),
        ("usage rows", balance.usage_rows),
        ("void terminals", balance.void_terminals),
    ]
    text = [f"{name:<32}{count:>10}" for name, count in lines]
    if not balance.problems():
        text.append("adds up")
    return "\n".join(text)


def describe_tenants(balance: Ledger) -> str:
    """A line for each tenant."""
    table = Table("tenant", "accepted", "terminal", "in flight", "usage rows", "cost", header_style="bold")
    for name, one in balance.tenants.items():
        cost = ", ".join(f"{money:f} {currency}" for currency, money in one.cost.items())
        table.add_row(name, *map(str, (one.accepted, one.terminal, one.in_flight, one.usage_rows)), cost)
    return sql.drawn(table)
