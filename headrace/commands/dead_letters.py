"""`headrace dead-letters`: see what could not be handled and why, and send it again."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from headrace import letters
from headrace.commands.failures import plain_failures, stop
from headrace.letters import CannotReplay, Letter
from headrace.local import resolve
from headrace.settings import Settings
from headrace.sql import drawn

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
]
OfTopic = Annotated[str | None, typer.Option("--topic", help="Only letters whose message came from this topic.")]


def commands() -> typer.Typer:
    """The group of commands."""
    group = typer.Typer(help="Messages that could not be handled.", no_args_is_help=True, rich_markup_mode=None)
    group.command("list")(show_all)
    group.command("show")(show_one)
    group.command("replay")(replay)
    return group


def show_all(
    topic: OfTopic = None,
    limit: Annotated[int, typer.Option(help="Show at most this many, the newest.", min=1)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data_dir: DataDir = None,
) -> None:
    """List letters: their number, source, reason and how often they came."""
    with plain_failures():
        found = asyncio.run(_collect(resolve(data_dir), topic))
    shown = found[-limit:]
    if as_json:
        typer.echo(json.dumps([summary(letter) for letter in shown], indent=2))
        return
    table = Table("number", "when (UTC)", "source", "role", "seen", "reason", header_style="bold")
    for letter in shown:
        about = letter.about
        where = f"{about.source_topic}/{about.partition}/{about.offset}"
        table.add_row(str(letter.number), _time(about.at_ms), where, about.role, str(about.times_seen), about.reason)
    typer.echo(drawn(table))
    typer.echo(f"{len(shown)} of {len(found)}")


def show_one(
    number: Annotated[int, typer.Argument(help="The letter's number, from `list`.", min=0)],
    body: Annotated[bool, typer.Option("--body", help="Print the message too; it may hold a prompt.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Show one letter with its headers."""
    with plain_failures():
        letter = asyncio.run(letters.find(resolve(data_dir), number))
    if letter is None:
        raise stop(f"there is no letter {number}; see `headrace dead-letters list`")
    shown = summary(letter) | {
        "key": letter.key.decode(errors="replace") if letter.key is not None else None,
        "headers": {name: value.decode(errors="replace") for name, value in letter.headers},
        "bytes": len(letter.value or b""),
    }
    if body:
        shown["body"] = (letter.value or b"").decode(errors="backslashreplace")
    typer.echo(json.dumps(shown, indent=2, ensure_ascii=False))


def replay(
    numbers: Annotated[list[int] | None, typer.Argument(help="Numbers of letters, from `list`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All letters, or all of --topic.")] = False,
    topic: OfTopic = None,
    data_dir: DataDir = None,
) -> None:
    """Send letters again: a request under a new id, any other message as it was. The letters stay where they are."""
    if bool(numbers) == everything:
        raise stop("name the letters to replay by their numbers, or give --all")
    with plain_failures(CannotReplay):
        conf = resolve(data_dir)
        found = asyncio.run(_collect(conf, topic))
        if numbers:
            known = {letter.number: letter for letter in found}
            missing = [number for number in numbers if number not in known]
            if missing:
                raise stop(f"there is no letter {missing[0]}; see `headrace dead-letters list`")
            found = [known[number] for number in numbers]
        for letter, sent in asyncio.run(letters.replay(conf, found)):
            renamed = f" as {sent.key}" if sent.partition is None else ""
            typer.echo(f"{letter.number} sent to {sent.topic}{renamed}")


async def _collect(conf: Settings, topic: str | None) -> list[Letter]:
    return [letter async for letter in letters.read(conf, topic=topic)]


def summary(letter: Letter) -> dict[str, object]:
    """What a letter is about, without its content."""
    about = letter.about
    return {
        "number": letter.number,
        "at": _time(about.at_ms),
        "topic": about.source_topic,
        "partition": about.partition,
        "offset": about.offset,
        "role": about.role,
        "times_seen": about.times_seen,
        "reason": about.reason,
    }


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
