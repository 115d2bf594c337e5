"""`headrace sql`: runs a named query or any statement, and renders its answer."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from rich.console import Console
from rich.table import Table

from clickhouse import readonly
from clickhouse.client import connect_sync, database_name
from clickhouse.queries import QUERIES, UnknownQuery, named
from headrace.settings import Settings

READ_ONLY = {"readonly": 1}
UNBOUNDED = 10_000
"""Columns of a table that goes into a pipe."""
_NAME = re.compile(r"^[a-z0-9][a-z0-9-]*$")


class Format(StrEnum):
    """How an answer is printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class BadInput(ValueError):
    """What the operator typed cannot be run; the message says what would be right."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Columns and rows of an answer; a statement without an answer has neither."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]


def parameters(given: Sequence[str]) -> dict[str, str]:
    """`k=v` pairs as a dict. Raises `BadInput`."""
    pairs = {}
    for text in given:
        name, mark, value = text.partition("=")
        if not mark or not name.isidentifier():
            raise BadInput(f"--param {text!r} is not of the form name=value")
        pairs[name] = value
    return pairs


def statement(text: str, given: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The SQL and the parameters of a query's name, or of SQL itself. Raises `BadInput` or `BadParameter`."""
    sql = text.strip().rstrip(";").strip()
    if not sql:
        raise BadInput("give the name of a query or SQL, for example: headrace sql usage-by-model")
    if not _NAME.match(sql):
        return sql, given
    try:
        query = named(sql)
    except UnknownQuery:
        names = ", ".join(query.name for query in QUERIES)
        raise BadInput(f"there is no query named {sql!r}; there are: {names}; or give SQL") from None
    return query.sql.strip(), query.bind(given)


def run(conf: Settings, sql: str, given: dict[str, str]) -> Answer:
    """The answer of ClickHouse to a statement that only reads. Raises `ClickHouseError` and `NotReadOnly`."""
    values = dict(given) or None
    with connect_sync(conf, database=database_name(conf)) as client:
        # One statement, by the server's own parser: what is judged must be all there is.
        client.query("SELECT formatQuerySingleLine({text:String})", parameters={"text": sql}, settings=READ_ONLY)
        # As text: a FORMAT behind it would belong to the statement that is explained.
        readonly.check(client.raw_query(f"EXPLAIN AST {sql}", parameters=values, settings=READ_ONLY).decode())
        result = client.query(sql, parameters=values, settings=READ_ONLY)
        return Answer(tuple(result.column_names), list(result.result_rows))


def render(answer: Answer, form: Format) -> str:
    """The answer as text. Decimals stay exact: in JSON they are strings."""
    if form is Format.JSON:
        rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        return json.dumps(rows, default=_plain, ensure_ascii=False, indent=2)
    if form is Format.CSV:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows([_cell(value) for value in row] for row in answer.rows)
        return out.getvalue().rstrip("\n")
    return _table(answer)


def _table(answer: Answer) -> str:
    if not answer.columns:
        return "no rows"
    table = Table(header_style="bold")
    for index, name in enumerate(answer.columns):
        numeric = any(isinstance(row[index], int | float | Decimal) for row in answer.rows[:20])
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in answer.rows:
        table.add_row(*(_cell(value) for value in row))
    return f"{drawn(table)}\n{len(answer.rows)} row{'' if len(answer.rows) == 1 else 's'}"


def drawn(table: Table) -> str:
    """A table as wide as the terminal, or as it needs where there is none."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = UNBOUNDED
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal | datetime):
        return str(_plain(value))
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, default=_plain, ensure_ascii=False)
    return str(value)


def _plain(value: object) -> object:
    if isinstance(value, Decimal):
        text = format(value, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="milliseconds" if value.microsecond else "seconds")
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def catalogue() -> str:
    """The named queries, what each tells, and its parameters."""
    table = Table("name", "what it tells", "parameters", header_style="bold")
    for query in QUERIES:
        filled = (f"{name}={query.defaults.get(name, '…')}" for name in sorted(query.parameters))
        table.add_row(query.name, query.about, " ".join(filled))
    return drawn(table)
