"""Analysts only read, and only the database: on the real engine, by `headrace sql` and over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest
from clickhouse_connect.driver.exceptions import DatabaseError, Error

from clickhouse.client import connect_sync
from clickhouse.readonly import NotReadOnly
from headrace import sql
from headrace.settings import Settings
from tests.support.tables import answer

OUT = "/tmp/headrace-not-written"
REFUSED = [
    "INSERT INTO usage_lines_raw (usage_id) VALUES ('x')",
    "INSERT INTO usage_lines_raw SELECT * FROM usage_lines_raw",
    "ALTER TABLE usage_lines_raw DELETE WHERE 1",
    "DELETE FROM usage_lines_raw WHERE 1",
    "DROP TABLE usage_lines_raw",
    "TRUNCATE TABLE usage_lines_raw",
    "RENAME TABLE usage_lines_raw TO other",
    "CREATE TABLE t (a Int8) ENGINE = Memory",
    "CREATE TEMPORARY TABLE t (a Int8)",
    "OPTIMIZE TABLE usage_lines_raw",
    "KILL QUERY WHERE 1",
    "SYSTEM FLUSH LOGS",
    "SET readonly = 0",
    "SELECT 1 SETTINGS readonly = 0",
    f"SELECT 1 INTO OUTFILE '{OUT}'",
    f"INSERT INTO FUNCTION file('{OUT}', 'TSV', 'a Int8') SELECT 1",
    "SELECT file('/etc/passwd')",
    r"SELECT `f\x69le`('/etc/passwd')",
    "SELECT file /* ; */ -- ' \n ('/etc/passwd')",
    "SELECT 1; SELECT file('/etc/passwd')",
    "SELECT * FROM file('/etc/passwd', 'LineAsString')",
    "WITH x AS (SELECT * FROM file('/etc/passwd', 'LineAsString')) SELECT * FROM x",
    "SELECT 1 UNION ALL (SELECT line = '' FROM file('/etc/passwd', 'LineAsString'))",
    "DESCRIBE TABLE file('/etc/passwd', 'LineAsString')",
    "EXPLAIN SELECT * FROM file('/etc/passwd', 'LineAsString')",
    "SELECT * FROM url('http://127.0.0.1:1/x', 'LineAsString')",
    "SELECT * FROM s3('http://127.0.0.1:1/bucket/x', 'LineAsString')",
    "SELECT * FROM remote('127.0.0.1', system.one)",
    "SELECT * FROM executable('x', 'TSV', 'a Int8')",
    "SELECT * FROM python('x')",
    "SELECT * FROM sqlite('/tmp/x.db', 't')",
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_writes_or_reaches_outside_is_refused(migrated: Settings, text: str) -> None:
    with pytest.raises((NotReadOnly, Error)):
        sql.run(migrated, text, {})
    database = migrated.clickhouse_database
    with connect_sync(migrated, database=database) as client, pytest.raises(DatabaseError, match=r"READONLY|62"):
        client.raw_query(text, settings={"readonly": 1})
    assert not Path(OUT).exists()


def test_what_reads_the_database_is_answered(migrated: Settings) -> None:
    assert answer(migrated, "SELECT count() FROM numbers(3) WHERE toString(number) != 'file('") == [(3,)]
    assert answer(migrated, "WITH (SELECT 1) AS one SELECT one") == [(1,)]
    assert answer(migrated, "EXISTS TABLE usage") == [(1,)]
    assert answer(migrated, "DESCRIBE TABLE usage") and answer(migrated, "SHOW TABLES")
    assert sql.run(migrated, "SELECT {a:UInt8} + 1", {"a": "2"}).rows == [(3,)]
