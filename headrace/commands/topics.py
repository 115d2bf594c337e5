"""`headrace topics`: make a broker match the catalogue, list it, and write its documents."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from headrace.commands.failures import plain_failures, stop
from headrace.local import resolve
from headrace.settings import Settings
from topics import docs as topic_docs
from topics.apply import Actual, ApplyError, actual_topics, apply_all, catalogue_for
from topics.catalogue import DAY_MS, HOUR_MS, Topic
from topics.clients import admin_client

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
]
Workers = Annotated[list[str] | None, typer.Option("--worker", help="Id of a worker; may be repeated. Default: w1.")]


def register(app: typer.Typer) -> None:
    """Add `topics`."""
    group = typer.Typer(help="Kafka topics: the catalogue, the broker, and the documents.", no_args_is_help=True)
    group.command()(apply)
    group.command("list")(show)
    group.command()(docs)
    app.add_typer(group, name="topics")


def apply(
    worker: Workers = None,
    allow_shorter_retention: Annotated[
        bool, typer.Option("--allow-shorter-retention", help="Let records go that a shorter retention no longer keeps.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Create and amend topics; refuse what would lose records or order."""
    with plain_failures(ApplyError):
        conf = resolve(data_dir)
        done = asyncio.run(
            apply_all(conf, workers=worker or [conf.worker_id], allow_shorter_retention=allow_shorter_retention)
        )
    for line in done or ["nothing to do"]:
        typer.echo(line)


def show(worker: Workers = None, data_dir: DataDir = None) -> None:
    """List the catalogue beside what the broker has."""
    with plain_failures(ApplyError):
        conf = resolve(data_dir)
        topics = catalogue_for(worker or [conf.worker_id])
        actual = asyncio.run(_actual(conf, topics))
    table = Table("topic", "partitions", "key", "cleanup", "kept", "broker", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for topic in topics:
        found = actual.get(topic.name)
        state = "missing" if found is None else _state(topic, found)
        table.add_row(topic.name, str(topic.partitions), topic.key, topic.cleanup, _retention(topic), state)
    Console().print(table)


async def _actual(settings: Settings, topics: list[Topic]) -> dict[str, Actual]:
    async with admin_client(settings.kafka, "topics-list") as admin:
        return await actual_topics(admin, {topic.name for topic in topics})


def _state(topic: Topic, found: Actual) -> str:
    differs = [name for name, value in topic.config().items() if found.config.get(name) != value]
    if found.partitions != topic.partitions:
        differs.insert(0, f"{found.partitions} partitions")
    return "differs: " + ", ".join(differs) if differs else "ok"


def _retention(topic: Topic) -> str:
    if topic.retention_ms is None:
        return "for ever"
    days, rest = divmod(topic.retention_ms, DAY_MS)
    return f"{days} d" if rest == 0 else f"{topic.retention_ms // HOUR_MS} h"


def docs(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail when the files differ.")] = False,
) -> None:
    """Write AsyncAPI and JSON Schemas into schemas/generated."""
    if check:
        stale = topic_docs.differences()
        if stale:
            raise stop(f"not as the catalogue says: {', '.join(stale)}; run `headrace topics docs`")
        typer.echo("up to date")
        return
    for name in topic_docs.write() or ["nothing to do"]:
        typer.echo(name)
