"""`headrace audit`: who did what, and whether the trail of it is whole."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from headrace import audit, audit_trail
from headrace.audit_chain import Verdict
from headrace.audit_trail import Filter
from headrace.commands.failures import plain_failures, stop
from headrace.commands.records import ACTOR
from headrace.errors import HeadraceError
from headrace.local import resolve
from headrace.settings import Settings
from headrace.sql import drawn
from schemas.audit import AuditEvent

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
]
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Who did what, and whether the trail of it is whole.", no_args_is_help=True)
    group.command("list")(show)
    group.command("verify")(verify)
    app.add_typer(group, name="audit")


def show(
    since: Annotated[str | None, typer.Option(help="Only from then on: 90m, 12h, 7d, or a time of ISO 8601.")] = None,
    actor: Annotated[str, typer.Option(help="Only by this actor (all of it), such as 'headrace command line'.")] = "",
    kind: Annotated[str, typer.Option(help="Only about this kind: keys, apps, models, requests, …")] = "",
    key: Annotated[str, typer.Option(help="Only about the one with this name or id.")] = "",
    limit: Annotated[int, typer.Option(help="Show at most this many, the newest.", min=1)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data_dir: DataDir = None,
) -> None:
    """List events, the newest first."""
    with plain_failures(HeadraceError):
        wanted = Filter(actor=actor, kind=kind, key=key, since_ms=_since_ms(since, datetime.now(UTC)))
        events = asyncio.run(_read(resolve(data_dir), wanted, limit))
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(events), indent=2).decode())
        return
    table = Table("seq", "when (UTC)", "actor", "action", "what", "outcome", "changes", header_style="bold")
    for event in events:
        when = datetime.fromtimestamp(event.at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        what = f"{event.kind}/{event.key}"
        table.add_row(str(event.seq), when, event.actor, event.action, what, event.outcome, _said(event))
    typer.echo(drawn(table))


def _since_ms(text: str | None, now: datetime) -> int:
    if text is None:
        return 0
    if text[:-1].isdecimal() and text[-1] in _UNITS:
        return int((now - timedelta(**{_UNITS[text[-1]]: int(text[:-1])})).timestamp() * 1000)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise stop(f"--since is {text!r}; write 90m, 12h, 7d, or a time such as 2026-11-28T12:00") from None
    return int((found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp() * 1000)


async def _read(conf: Settings, wanted: Filter, limit: int) -> list[AuditEvent]:
    await audit.record_alone(conf, audit.note("read", "audit", "events", actor=ACTOR, **wanted.said()))
    found: list[AuditEvent] = []
    before: int | None = None
    while True:
        page = await audit_trail.page(conf, wanted, limit=limit - len(found), before=before)
        found += page.events
        before = page.next
        if before is None or len(found) == limit:
            return found


def _said(event: AuditEvent) -> str:
    """What changed, or why it was refused, in one line."""
    if event.refusal:
        return event.refusal
    changed = [f"{name}: {change.before or '-'} → {change.after or '-'}" for name, change in event.changes.items()]
    return ", ".join([*changed, *(f"{name}={value}" for name, value in event.detail.items())]) or event.reason


def verify(
    notes: Annotated[
        Path | None,
        typer.Option(
            "--notes",
            help="File of heads noted by earlier runs, best on another machine: each must still be in the trail; "
            "the newest is added.",
        ),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Check that no kept event was changed, removed, inserted or moved; exit 1 and the first broken one if so."""
    with plain_failures(ValueError):
        known = audit_trail.noted(notes.read_text().splitlines()) if notes is not None and notes.exists() else []
        verdict = asyncio.run(audit_trail.verify(resolve(data_dir), known))
    if verdict.broken is not None:
        typer.echo(f"broken at event {verdict.broken.seq}: {verdict.broken.why}", err=True)
        raise typer.Exit(1)
    head = f"{verdict.head.seq} {verdict.head.hash}"
    if notes is not None and verdict.head.seq:
        with notes.open("a") as file:
            file.write(head + "\n")
    typer.echo(described(verdict, len(known)))
    typer.echo(f"head: {head}")


def described(verdict: Verdict, known: int) -> str:
    """What was checked, in one line."""
    if not verdict.events:
        return "whole: no event is kept"
    told = f" and {known} noted" if known else ""
    return f"whole: events {verdict.first} to {verdict.head.seq}, {verdict.anchors} of them anchored{told}"
