"""What the commands on keys, users, apps, models and prices share: reading, changing, and showing records."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from headrace.commands.failures import plain_failures, stop
from headrace.control_client import ControlClient, ControlPlane, command, control_client
from headrace.errors import HeadraceError
from headrace.local import resolve
from schemas.control import ABSENT, Record, digest

ACTOR = "headrace command line"
NONE = "none"
"""What takes a value away, as a limit, or all of a list."""

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the admin API gives it.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept with the change.")]
Rpm = Annotated[str | None, typer.Option("--rpm", metavar="N", help="Requests in any 60 s; none for no limit.")]
Tpm = Annotated[str | None, typer.Option("--tpm", metavar="N", help="Tokens in any 60 s; none for no limit.")]
Concurrency = Annotated[
    str | None, typer.Option("--concurrency", metavar="N", help="Requests at once; none for no limit.")
]
Budget = Annotated[
    str | None, typer.Option("--monthly-budget", metavar="MONEY", help="For a calendar month (UTC); none for none.")
]
Cached = Annotated[
    str | None, typer.Option("--cached", metavar="MONEY", help="A million cached prompt tokens; as --input.")
]
Currency = Annotated[str | None, typer.Option("--currency", help="Default: USD.")]
OnlyApp = Annotated[str | None, typer.Option("--app", help="Only those of this app.")]
OnlyEnabled = Annotated[
    bool | None, typer.Option("--enabled/--disabled", help="Only those that are enabled, or that are not.")
]
Search = Annotated[
    str | None, typer.Option("--search", "-q", metavar="TEXT", help="Only those in whose names this text is.")
]
T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)
Kept = TypeVar("Kept", bound=Record)


def with_client(data_dir: Path | None, work: Callable[[ControlClient], Awaitable[T]]) -> T:
    """Do something with the control plane; what goes wrong is a sentence and exit code 1."""

    async def run() -> T:
        async with control_client(resolve(data_dir), timeout=10.0) as client:
            return await work(client)

    with plain_failures(HeadraceError):
        return asyncio.run(run())


def read(data_dir: Path | None) -> ControlPlane:
    """All records in force."""
    return with_client(data_dir, lambda client: client.read())


def body(model: type[Body], fields: Mapping[str, Any]) -> Body:
    """The body that the admin API would be sent; fields that are None are left out, `none` is null.

    In an option that may be repeated, `none` alone is the empty list.
    """
    given = {name: _given(value) for name, value in fields.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        said = (f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors(include_input=False))
        raise stop("; ".join(said)) from None


def _given(value: object) -> object:
    if value == [NONE]:
        return []
    return None if value == NONE else value


def limits(rpm: str | None, tpm: str | None, concurrency: str | None, budget: str | None = None) -> dict[str, Any]:
    """The limits among the fields of a body."""
    return {
        "rate_limit_rpm": rpm, "rate_limit_tpm": tpm, "concurrency_limit": concurrency, "monthly_budget": budget,
    }  # fmt: skip


def pair(text: str, form: str = "NAME=VALUE") -> tuple[str, str]:
    """The two sides of the first equals sign; `form` is how they are to be written."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise stop(f"{text!r}: write {form}")
    return name, value


def merged(held: Mapping[str, str], added: Iterable[tuple[str, str]], without: Sequence[str] | None) -> dict[str, str]:
    """What is held without some of its names, and with what is added."""
    return {name: value for name, value in held.items() if name not in (without or ())} | dict(added)


async def create(client: ControlClient, record: Record, *, reason: str = "") -> None:
    """Put a new record into force. Raises `CommandsRefused`."""
    await client.submit([command(record, actor=ACTOR, reason=reason, if_match=ABSENT)])


def change(
    data_dir: Path | None,
    find: Callable[[ControlPlane], Kept | None],
    make: Callable[[Kept, ControlPlane], Kept],
    *,
    missing: str,
    reason: str = "",
) -> tuple[Kept, Kept]:
    """Change the record that is found: what it was, and what it is. Refused if somebody else changes it meanwhile."""

    async def work(client: ControlClient) -> tuple[Kept, Kept] | None:
        plane = await client.read()
        before = find(plane)
        if before is None:
            return None
        after = make(before, plane)
        if after != before:
            await client.submit([command(after, actor=ACTOR, reason=reason, if_match=digest(before))])
        return before, after

    done = with_client(data_dir, work)
    if done is None:
        raise stop(missing)
    return done


def print_json(shown: BaseModel | Sequence[BaseModel]) -> None:
    """Print what the admin API gives."""
    if isinstance(shown, BaseModel):
        typer.echo(shown.model_dump_json(indent=2))
        return
    typer.echo(TypeAdapter(list[BaseModel]).dump_json(list(shown), indent=2, serialize_as_any=True).decode())


def print_one(shown: BaseModel, as_json: bool) -> None:
    """Print one record: JSON, or a line for each field that says something."""
    if as_json:
        print_json(shown)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in shown.model_dump(mode="json").items():
        if value not in (None, "", [], {}):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(name.replace("_", " "), text)
    Console().print(table)


def table_of(*columns: str) -> Table:
    """A table of records; the first column is never broken."""
    table = Table(*columns, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    return table


def yes(value: bool) -> str:
    """As tables say it."""
    return "yes" if value else "no"


def day(moment: datetime | None, never: str = "never") -> str:
    """As tables say it."""
    return moment.strftime("%Y-%m-%d") if moment is not None else never


def limit(value: object) -> str:
    """As tables say it."""
    return "" if value is None else str(value)


def ask_password(prompt: str) -> str:
    """A password from the terminal, twice, or the first line of stdin; never from an argument, which others see."""
    if sys.stdin.isatty():
        asked: str = typer.prompt(prompt, hide_input=True, confirmation_prompt=True)
        return asked
    return sys.stdin.readline().rstrip("\r\n")
