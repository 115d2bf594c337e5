"""Applies and reverts migrations, and records them in `schema_migrations`.

ClickHouse has neither transactions nor locks for DDL. So each statement can be run again, a step is recorded after
its last statement, and runners that meet or die half-way come to the same schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from clickhouse_connect.driver.client import Client

from clickhouse import retention
from clickhouse.client import INSERT_SETTINGS, connect_sync, database_name
from clickhouse.migration import Migration, load
from headrace.settings import Settings

log = structlog.get_logger(__name__)

_RECORDS = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number UInt32,
    name String,
    reason String,
    checksum String,
    applied Bool,
    at DateTime64(6, 'UTC') DEFAULT now64(6)
)
ENGINE = MergeTree ORDER BY (number, at)
"""


class MigrationError(Exception):
    """The database and this version of the code do not fit; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A migration as the database remembers it."""

    number: int
    name: str
    checksum: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do to reach a target: first `revert` (newest first), then `apply` (oldest first)."""

    revert: tuple[Migration, ...]
    apply: tuple[Migration, ...]


def plan(known: Sequence[Migration], applied: Sequence[Applied], to: int | None = None) -> Plan:
    """The steps from what is applied to migration `to` (all by default; 0 reverts everything).

    Raises `MigrationError` on an unknown target, on a step that changed after it was applied, and on a step to revert
    that only a newer version knows.
    """
    by_number = {step.number: step for step in known}
    goal = len(known) if to is None else to
    if not 0 <= goal <= len(known):
        raise MigrationError(f"there is no migration {goal}; this version knows 0 to {len(known)}")
    for done in applied:
        step = by_number.get(done.number)
        if step is not None and step.checksum != done.checksum:
            raise MigrationError(
                f"migration {done.number} ({done.name}) was changed after it was applied; add a new migration instead"
            )
    numbers = {done.number for done in applied}
    unknown = sorted(numbers - set(by_number))
    if unknown and to is not None:
        raise MigrationError(f"migrations {unknown} were applied by a newer version; revert them with that version")
    return Plan(
        revert=tuple(by_number[number] for number in sorted(numbers & set(by_number), reverse=True) if number > goal),
        apply=tuple(step for step in known if step.number <= goal and step.number not in numbers),
    )


def migrate(conf: Settings, to: int | None = None) -> Plan:
    """Bring the database to migration `to` (all by default) and return what was done.

    Raises `MigrationError`, `ValueError` on bad settings, and `ClickHouseError` when the server refuses or is away.
    """
    database = database_name(conf)
    retention.wanted(conf)  # before anything is done
    with connect_sync(conf) as client:
        client.command(f"CREATE DATABASE IF NOT EXISTS {database}")
    with connect_sync(conf, database=database) as client:
        client.command(_RECORDS)
        todo = plan(load(), applied_migrations(client), to)
        for step in todo.revert:
            _run(client, step, step.down, applied=False)
        for step in todo.apply:
            _run(client, step, step.up, applied=True)
        for table, days in retention.apply(client, conf).items():
            log.info("retention", table=table, days=days)
    return todo


def applied_migrations(client: Client) -> list[Applied]:
    """The migrations in force, by number: of each, the latest record says whether it was applied or reverted."""
    rows = client.query(
        "SELECT number, argMax(name, at), argMax(checksum, at) FROM schema_migrations "
        "GROUP BY number HAVING argMax(applied, at) ORDER BY number"
    ).result_rows
    return [Applied(int(number), str(name), str(checksum)) for number, name, checksum in rows]


def _run(client: Client, step: Migration, statements: Sequence[str], *, applied: bool) -> None:
    for statement in statements:
        client.command(statement)
    client.insert(
        "schema_migrations",
        [[step.number, step.name, step.reason, step.checksum, applied]],
        column_names=["number", "name", "reason", "checksum", "applied"],
        settings=dict(INSERT_SETTINGS),
    )
    log.info("migration", number=step.number, name=step.name, applied=applied)
