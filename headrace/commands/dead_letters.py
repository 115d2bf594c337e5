"""`headrace dead-letters`: see what could not be handled and why, and send it again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.table import Table

from headrace import audit, letters
from headrace.commands.failures import plain_failures, stop
from headrace.commands.records import ACTOR
from headrace.control_client import control_client
from headrace.erasure import ErasureBook
from headrace.errors import HeadraceError
from headrace.letters import CannotReplay, Letter
from headrace.local import resolve
from headrace.redis_client import connect
from headrace.settings import Settings
from headrace.sql import drawn
from topics.clients import Producer

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
]
OfTopic = Annotated[str | None, typer.Option("--topic", help="Only letters whose message came from this topic.")]

Number = Annotated[int, typer.Argument(help="The letter's number, from `list`.", min=0)]
Again = Annotated[bool, typer.Option("--again", help="Also what was replayed before.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept in the audit trail.")]


def commands() -> typer.Typer:
    """The group of commands."""
    group = typer.Typer(help="Messages that could not be handled.", no_args_is_help=True, rich_markup_mode=None)
    group.command("list")(show_all)
    group.command("show")(show_one)
    group.command("replay")(replay)
    group.command("edit")(edit)
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
    number: Number,
    body: Annotated[bool, typer.Option("--body", help="Print the message too; it may hold a prompt.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Show one letter with its headers; who looked is written down."""
    with plain_failures(HeadraceError):
        letter = asyncio.run(_look(resolve(data_dir), number, body=body))
    shown = summary(letter) | {
        "key": letter.key.decode(errors="replace") if letter.key is not None else None,
        "headers": {name: value.decode(errors="replace") for name, value in letter.headers},
        "bytes": len(letter.value or b""),
    }
    if body:
        shown["body"] = (letter.value or b"").decode(errors="backslashreplace")
    typer.echo(json.dumps(shown, indent=2, ensure_ascii=False))


async def _look(conf: Settings, number: int, *, body: bool) -> Letter:
    letter = await letters.find(conf, number)
    if letter is None:
        raise stop(f"there is no letter {number}; see `headrace dead-letters list`")
    await _readable(conf, [letter])
    said = audit.note("read", "dead-letters", str(number), actor=ACTOR, body=str(body).lower())
    await audit.record_alone(conf, said)
    return letter


async def _readable(conf: Settings, found: Sequence[Letter]) -> None:
    """Raises `Erased` when the content of one of them is."""
    redis = connect(conf.redis_url)
    try:
        for letter in found:
            await ErasureBook(redis).check(*letters.whose(letter))
    finally:
        await redis.aclose()


def replay(
    numbers: Annotated[list[int] | None, typer.Argument(help="Numbers of letters, from `list`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All letters, or all of --topic.")] = False,
    topic: OfTopic = None,
    again: Again = False,
    reason: Reason = "",
    data_dir: DataDir = None,
) -> None:
    """Send letters again, each once: a request under a new id, any other message as it was. The letters stay."""
    if bool(numbers) == everything:
        raise stop("name the letters to replay by their numbers, or give --all")
    with plain_failures(CannotReplay, HeadraceError):
        conf = resolve(data_dir)
        found = asyncio.run(_collect(conf, topic))
        if numbers:
            known = {letter.number: letter for letter in found}
            missing = [number for number in numbers if number not in known]
            if missing:
                raise stop(f"there is no letter {missing[0]}; see `headrace dead-letters list`")
            found = [known[number] for number in numbers]
        asyncio.run(_send(conf, found, reason=reason, again=again))


def edit(
    number: Number,
    body_file: Annotated[
        Path | None, typer.Option("--body-file", help="What to send in its place; without, it is opened in $EDITOR.")
    ] = None,
    again: Again = False,
    reason: Reason = "",
    data_dir: DataDir = None,
) -> None:
    """Send one letter again with another body."""
    with plain_failures(CannotReplay, HeadraceError):
        conf = resolve(data_dir)
        letter = asyncio.run(_look(conf, number, body=body_file is None))
        body = body_file.read_bytes() if body_file is not None else _edited(letter)
        asyncio.run(_send(conf, [letter], reason=reason, again=again, body=body))


def _edited(letter: Letter) -> bytes:
    """What an operator makes of the letter's message."""
    try:
        text = (letter.value or b"").decode()
    except UnicodeDecodeError:
        raise stop("the message is no text; give --body-file") from None
    changed = click.edit(text, extension=".json")
    if changed is None:
        raise stop("nothing was changed, and nothing is sent")
    return changed.removesuffix("\n").encode()


async def _send(
    conf: Settings, found: Sequence[Letter], *, reason: str, again: bool, body: bytes | None = None
) -> None:
    seals = conf.seals
    for letter in found:
        # Before anything is sent, all are seen to be fit.
        letters.resend(letter, new_id="", now_ms=0, seals=seals, body=body)
    await _readable(conf, found)
    async with control_client(conf, timeout=10.0) as client, Producer(conf.kafka, "dead-letters") as producer:
        for letter in found:
            sent = await letters.replay(
                client, producer, letter, seals=seals, actor=ACTOR, reason=reason, body=body, again=again
            )
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
