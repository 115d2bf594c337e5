"""Named queries, their parameters, how answers are printed, migrations' plans, and the replay of dead letters."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from clickhouse.client import database_name, target
from clickhouse.migrate import Applied, MigrationError, plan
from clickhouse.migration import Migration, load
from clickhouse.queries import QUERIES, BadParameter, named
from headrace import sql
from headrace.letters import CannotReplay, Letter, resend
from headrace.senders import sender
from headrace.settings import Settings
from schemas.events import DeadLetter
from tests.support.publishing import SEALS, sealed
from topics.envelope import Envelope, parse


def test_names_are_unique_and_every_default_is_a_parameter() -> None:
    assert len({query.name for query in QUERIES}) == len(QUERIES)
    for query in QUERIES:
        assert set(query.defaults) <= query.parameters, query.name
        assert query.about.endswith("."), query.name


def test_queries_read_views_only() -> None:
    for query in QUERIES:
        assert "_raw" not in query.sql, query.name


def test_parameters_are_filled_and_checked() -> None:
    query = named("slowest-requests")
    assert query.bind({"limit": "3"}) == {"days": "1", "limit": "3"}
    with pytest.raises(BadParameter, match="no parameter 'lmit'; it has: days, limit"):
        query.bind({"lmit": "3"})
    with pytest.raises(BadParameter, match="lifecycle needs --param id="):
        named("lifecycle").bind({})


def test_a_statement_is_a_name_or_sql() -> None:
    assert sql.statement("SELECT 1;", {}) == ("SELECT 1", {})
    assert sql.statement("usage-by-model", {})[1] == {"days": "30"}
    with pytest.raises(sql.BadInput, match="no query named 'usage-by-modle'"):
        sql.statement("usage-by-modle", {})
    with pytest.raises(sql.BadInput, match="give the name of a query"):
        sql.statement("  ", {})


def test_parameters_of_the_command_line() -> None:
    assert sql.parameters(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(sql.BadInput, match="name=value"):
        sql.parameters(["a"])


ANSWER = sql.Answer(
    ("model", "cost", "at", "detail", "none"),
    [("m", Decimal("0.100000000000000000"), datetime(2026, 11, 22, 7, 0, 0, 5000, tzinfo=UTC), {"a": "b"}, None)],
)


def test_json_keeps_money_exact() -> None:
    row = json.loads(sql.render(ANSWER, sql.Format.JSON))[0]
    assert row == {
        "model": "m",
        "cost": "0.1",
        "at": "2026-11-22 07:00:00.005+00:00",
        "detail": {"a": "b"},
        "none": None,
    }


def test_csv_quotes_what_has_commas() -> None:
    lines = sql.render(ANSWER, sql.Format.CSV).splitlines()
    assert lines == [
        "model,cost,at,detail,none",
        'm,0.1,2026-11-22 07:00:00.005+00:00,"{""a"": ""b""}",',
    ]


def test_a_table_shows_every_column_and_the_count() -> None:
    text = sql.render(ANSWER, sql.Format.TABLE)
    assert "2026-11-22 07:00:00.005+00:00" in text
    assert text.endswith("1 row")
    assert sql.render(sql.Answer((), []), sql.Format.TABLE) == "no rows"


def step(number: int, statement: str = "SELECT 1") -> Migration:
    return Migration(number, f"m{number}", "because", (statement,), ())


def done(migration: Migration) -> Applied:
    return Applied(migration.number, migration.name, migration.checksum)


def test_a_plan_applies_what_is_missing_and_reverts_backwards() -> None:
    steps = [step(1), step(2), step(3)]
    assert [s.number for s in plan(steps, [done(steps[0])]).apply] == [2, 3]
    assert [s.number for s in plan(steps, [done(s) for s in steps], to=1).revert] == [3, 2]
    assert plan(steps, [done(s) for s in steps]).apply == ()


def test_a_changed_migration_is_refused_and_a_changed_layout_is_not() -> None:
    with pytest.raises(MigrationError, match="changed after it was applied"):
        plan([step(1, "SELECT 2")], [done(step(1))])
    assert plan([step(1, "SELECT\n  1")], [done(step(1))]).apply == ()


def test_a_newer_database_is_used_but_not_reverted() -> None:
    assert plan([step(1)], [done(step(1)), done(step(2))]).apply == ()
    with pytest.raises(MigrationError, match="newer version"):
        plan([step(1)], [done(step(1)), done(step(2))], to=0)
    with pytest.raises(MigrationError, match="there is no migration 5"):
        plan([step(1)], [], to=5)


def test_every_statement_can_be_run_again() -> None:
    """Copied rows replace themselves; a contract test runs all of it twice."""
    for migration in load():
        for statement in (*migration.up, *migration.down):
            again = statement.split()[0] in ("INSERT", "TRUNCATE")
            assert again or any(words in statement for words in ("IF NOT EXISTS", "IF EXISTS", "OR REPLACE")), statement
        assert migration.reason.endswith("."), migration.name


def test_addresses_of_clickhouse() -> None:
    where = target("https://me:p%40ss@ch.example/path")
    assert (where["host"], where["port"], where["username"], where["password"]) == ("ch.example", 8443, "me", "p@ss")
    with pytest.raises(ValueError, match="HEADRACE_CLICKHOUSE_URL"):
        target("ch.example:8123")
    with pytest.raises(ValueError, match="HEADRACE_CLICKHOUSE_DATABASE"):
        database_name(Settings(clickhouse_database="a; DROP"))


ENVELOPE = Envelope("a" * 32, "/test", 1_790_000_000_000, "t", "k", 3, "d", 60.0, idempotency_key="again")


def letter(topic: str, headers: list[tuple[str, bytes]], key: bytes | None = b"key") -> Letter:
    return Letter(5, DeadLetter(topic, 2, 77, "broken", "router", 0, times_seen=2), key, headers, b"body")


def test_a_replayed_request_has_a_new_id_and_names_the_old_one() -> None:
    sent = resend(
        letter("inference.requests", sealed(ENVELOPE, b"body")), new_id="b" * 32, now_ms=1_790_000_001_000, seals=SEALS
    )
    assert sender(letter("inference.requests", sent.headers), SEALS, {}).envelope.request_id == "b" * 32
    again = parse(sent.headers)
    assert (again.request_id, again.replay_of, again.idempotency_key) == ("b" * 32, "a" * 32, None)
    assert (again.time_ms, again.tenant) == (1_790_000_001_000, "t")
    assert again.digest == hashlib.sha256(b"body").hexdigest()
    assert (sent.key, sent.partition, sent.value) == ("b" * 32, None, b"body")
    assert [name for name, _ in sent.headers].count("ce_id") == 1
    assert ("hr-dl-times-seen", b"2") in sent.headers


def test_other_messages_are_sent_as_they_were() -> None:
    sent = resend(letter("usage.events", [("x", b"y")]), new_id="b" * 32, now_ms=0, seals=SEALS)
    assert (sent.topic, sent.key, sent.partition, sent.value) == ("usage.events", "key", 2, b"body")
    assert sent.headers == [("x", b"y"), ("hr-dl-times-seen", b"2")]


@pytest.mark.parametrize(
    ("topic", "headers", "key"),
    [
        ("inference.requests", [], b"k"),
        ("inference.requests", ENVELOPE.headers(), b"k"),
        ("usage.events", [], b"\xff"),
        ("dead.letters", [], b"k"),
    ],
)
def test_what_would_only_come_back_is_not_replayed(topic: str, headers: list[tuple[str, bytes]], key: bytes) -> None:
    with pytest.raises(CannotReplay, match="letter 5 cannot be replayed"):
        resend(letter(topic, headers, key), new_id="b" * 32, now_ms=0, seals=SEALS)
