"""`headrace topics`: make a broker match the catalogue, list it, and write its documents."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from headrace import audit
from headrace.commands.failures import plain_failures, stop
from headrace.commands.records import ACTOR
from headrace.control_client import control_client
from headrace.errors import HeadraceError
from headrace.local import resolve
from headrace.settings import Settings
from topics import docs as topic_docs
from topics.access import MECHANISM, Access, access_of, commands
from topics.access_apply import apply_access, new_password
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
    group.command()(acls)
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


def acls(
    app: Annotated[list[str] | None, typer.Argument(metavar="APP", help="Default: all apps with publishers.")] = None,
    apply_: Annotated[bool, typer.Option("--apply", help="Set them on the brokers, in place of showing how.")] = False,
    new_passwords: Annotated[
        bool,
        typer.Option("--new-passwords", help="With --apply: give each user a new password, shown this once."),
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Users, access control lists and quotas of apps' publishers: by commands of Kafka's own tools, or set at once."""
    if new_passwords and not apply_:
        raise stop("--new-passwords goes with --apply")
    with plain_failures(ApplyError, HeadraceError):
        conf = resolve(data_dir)
        wanted = asyncio.run(_accesses(conf, app))
        if not apply_:
            for access in wanted:
                typer.echo(f"# {access.app}: {access.user}")
                for line in commands(access, conf.kafka_bootstrap):
                    typer.echo(line)
            return
        for line in asyncio.run(_set(conf, wanted, new_passwords)):
            typer.echo(line)


async def _accesses(conf: Settings, named: list[str] | None) -> list[Access]:
    async with control_client(conf, timeout=10.0) as client:
        apps = (await client.read()).apps
    unknown = [name for name in named or () if name not in apps]
    if unknown:
        raise stop(f"there is no app {unknown[0]!r}; `headrace apps list` shows them")
    return [access_of(apps[name]) for name in named or [name for name, app in apps.items() if app.publishers]]


async def _set(conf: Settings, wanted: list[Access], new_passwords: bool) -> list[str]:
    done = []
    await audit.record_alone(
        conf,
        *(
            audit.note(
                "apply", "access", access.app, actor=ACTOR, outcome="asked", user=access.user,
                may="publish" if access.given else "nothing",
                password="new" if new_passwords and access.given else "kept",
            )
            for access in wanted
        ),
    )  # fmt: skip
    async with admin_client(conf.kafka, "topics-acls") as admin:
        for access in wanted:
            await apply_access(admin, access)
            done.append(f"{access.app}: {access.user} " + ("may publish" if access.given else "may do nothing"))
            if new_passwords and access.given:
                done.append(f"password of {access.user} ({MECHANISM}): {await new_password(admin, access)}")
    return done


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
