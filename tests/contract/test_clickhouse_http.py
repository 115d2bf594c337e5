# ruff: noqa: S608 - statements are built from names of this file
"""The embedded ClickHouse behaves over HTTP as a server does: for clickhouse-connect, and for plain HTTP."""

from __future__ import annotations

import datetime
import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import clickhouse_connect
import httpx
import psutil
import pytest
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError, StreamFailureError

from deploy.embedded.ports import PortBook

PASSWORD = "secret/+ :@"
_ROWS = [
    (
        number,
        f"it's \\ a\ttab\nnl {number} ünï",
        Decimal("12.345678901234"),
        "model",
        None if number % 2 else number % 100,
        {"k": "v"},
        datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        ["a'b", ""],
    )
    for number in range(1000)
]
_TABLE = """
CREATE TABLE {name} (
    a UInt64, s String, d Decimal(38, 12), l LowCardinality(String), n Nullable(UInt8),
    m Map(String, String), t DateTime64(3, 'UTC'), r Array(String)
) ENGINE = MergeTree ORDER BY a
"""


class Server:
    """The process under test, and how to reach it."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self.port = PortBook(data / "none.json").port("clickhouse")
        self.url = f"http://127.0.0.1:{self.port}/"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "deploy.embedded.clickhouse_server", "--port", str(self.port)]
        env = {**os.environ, "HEADRACE_CLICKHOUSE_PASSWORD": PASSWORD}
        process = subprocess.Popen([*argv, "--data", str(self._data / "clickhouse")], env=env)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert process.poll() is None, "the server ended while it started"
            try:
                if httpx.get(f"{self.url}ping").text == "Ok.\n":
                    return process
            except httpx.TransportError:
                continue
        raise AssertionError("the server does not answer")

    def kill_and_restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)

    def client(self, **options: object) -> Client:
        return clickhouse_connect.get_client(
            host="127.0.0.1", port=self.port, password=PASSWORD, tz_mode="aware", **options
        )

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"X-ClickHouse-Key": PASSWORD}, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("data"))
    yield running
    assert running.stop() == 0


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


@pytest.fixture
def table(http: httpx.Client, request: pytest.FixtureRequest) -> Iterator[str]:
    name = "t_" + "".join(char if char.isalnum() else "_" for char in request.node.name)
    assert http.post("", content=_TABLE.format(name=name)).status_code == 200
    yield name
    http.post("", content=f"DROP TABLE {name}")


@pytest.mark.parametrize("compress", [False, True, "lz4", "zstd", "gzip"])
def test_rows_come_back_as_they_were_inserted(server: Server, table: str, compress: bool | str) -> None:
    client = server.client(compress=compress)
    assert client.insert(table, _ROWS).written_rows == len(_ROWS)
    assert client.query(f"SELECT * FROM {table} ORDER BY a").result_rows == _ROWS
    client.close()


async def test_the_async_client_works(server: Server, table: str) -> None:
    client = await clickhouse_connect.get_async_client(host="127.0.0.1", port=server.port, password=PASSWORD)
    await client.insert(table, _ROWS[:10])
    found = await client.query(f"SELECT count(), sum(a) FROM {table} WHERE a < {{top:UInt64}}", parameters={"top": 5})
    assert found.result_rows == [(5, 10)]
    await client.close()


@pytest.mark.parametrize(
    "text", ["", "it's", 'a "b"', "a\\b", "tab\tnl\n", "{x}", "ünï ☃", "\\N", "'; DROP TABLE x --"]
)
def test_parameters_arrive_as_they_are(server: Server, text: str) -> None:
    client = server.client()
    assert client.query("SELECT {value:String}", parameters={"value": text}).result_rows == [(text,)]


def test_parameters_too_long_for_a_url_arrive_in_a_form(server: Server) -> None:
    text = "it's\r\n--a line that looks like an end--\tünï\n\n" * 1500
    client = server.client()
    assert client.query("SELECT {value:String}", parameters={"value": text}).result_rows == [(text,)]


def test_forms_over_plain_http(http: httpx.Client) -> None:
    def post(**fields: tuple[str | None, str]) -> str:
        return http.post("", files=fields).text

    assert post(query=(None, "SELECT {x:UInt8}, getSetting('max_threads')"), param_x=(None, "7"),
                max_threads=(None, "1")) == "7\t1\n"  # fmt: skip
    assert "external tables are not supported" in post(query=(None, "SELECT 1"), t=("t.csv", "1"))
    assert "longer than 131072 bytes" in post(query=(None, "SELECT 1" + " " * 131_072))
    broken = http.post("", content=b"SELECT 1", headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert (broken.status_code, "is not the multipart form" in broken.text) == (400, True)


def test_settings_hold_for_their_query_only(server: Server) -> None:
    client = server.client()
    shown = "SELECT getSetting('max_block_size')"
    usual = client.query(shown).result_rows
    assert client.query(shown, settings={"max_block_size": 77}).result_rows == [(77,)]
    client.command("SET max_block_size = 78")
    assert client.query(shown).result_rows == usual


def test_an_unknown_setting_is_refused_by_name(http: httpx.Client) -> None:
    answer = http.get("", params={"query": "SELECT 1", "no_such_setting": "1"})
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (404, "115")
    assert "no_such_setting" in answer.text


def test_arrow_queries_work(server: Server, table: str) -> None:
    client = server.client()
    client.insert(table, _ROWS)
    found = client.query_arrow(f"SELECT a, l FROM {table} ORDER BY a")
    assert found.column("a").to_pylist() == list(range(len(_ROWS)))


def test_an_empty_result_has_no_rows(server: Server, table: str) -> None:
    assert server.client().query(f"SELECT * FROM {table}").result_rows == []


def test_an_error_carries_its_code_to_the_client(server: Server) -> None:
    with pytest.raises(DatabaseError, match="UNKNOWN_TABLE"):
        server.client().query("SELECT * FROM nowhere")


@pytest.mark.parametrize(
    ("sql", "status", "code"),
    [
        ("SELEC 1", 400, "62"),
        ("SELECT nope", 404, "47"),
        ("SELECT * FROM nowhere", 404, "60"),
        ("SELECT * FROM nowhere.at_all", 404, "81"),
        ("SELECT throwIf(1)", 500, "395"),
        ("INSERT INTO nowhere VALUES (1)", 404, "60"),
        ("", 400, "62"),
    ],
)
def test_errors_have_the_servers_status_and_code(http: httpx.Client, sql: str, status: int, code: str) -> None:
    answer = http.post("", content=sql)
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (status, code)
    assert answer.text.startswith(f"Code: {code}. DB::Exception: ")
    assert http.post("", content="SELECT 1").text == "1\n", "the connection must go on to work"


def test_a_query_may_stand_in_the_url_or_the_body(http: httpx.Client) -> None:
    assert http.get("", params={"query": "SELECT 1"}).text == "1\n"
    assert http.post("", content="SELECT 1").text == "1\n"
    assert http.post("", params={"query": "SELECT"}, content="2").text == "2\n"


def test_formats_by_clause_parameter_and_header(http: httpx.Client) -> None:
    sql = "SELECT 1 AS x"
    by_clause = http.post("", content=f"{sql} FORMAT JSON")
    assert by_clause.json()["data"] == [{"x": 1}]
    assert by_clause.headers["Content-Type"].startswith("application/json")
    assert http.post("", params={"default_format": "JSONEachRow"}, content=sql).json() == {"x": 1}
    by_header = http.post("", headers={"X-ClickHouse-Format": "CSVWithNames"}, content=sql)
    assert (by_header.text, by_header.headers["X-ClickHouse-Format"]) == ('"x"\n1\n', "CSVWithNames")


def test_parameters_and_database_over_plain_http(http: httpx.Client) -> None:
    params = {"query": "SELECT {x:String}, currentDatabase()", "param_x": "a\\tb", "database": "system"}
    assert http.get("", params=params).text == "a\\tb\tsystem\n"
    assert (
        http.get("", params={"query": "SELECT 1", "database": "nowhere"}).headers["X-ClickHouse-Exception-Code"] == "81"
    )


@pytest.mark.parametrize("format", ["CSVWithNames", "JSON", "TSVWithNamesAndTypes", "Native", "JSONEachRow"])
def test_a_result_of_many_blocks_is_one_document(http: httpx.Client, format: str) -> None:
    answer = http.post("", content=f"SELECT number FROM numbers(300000) FORMAT {format}")
    body = answer.content
    assert answer.status_code == 200
    if format == "JSON":
        assert answer.json()["rows"] == 300_000
    elif format == "Native":
        assert body.count(b"number") > 1
    else:
        heads = {"CSVWithNames": 1, "TSVWithNamesAndTypes": 2, "JSONEachRow": 0}
        assert body.count(b"\n") == 300_000 + heads[format]


def test_an_error_after_the_first_rows_breaks_the_answer_off(http: httpx.Client) -> None:
    sql = "SELECT throwIf(number = 5000000), toString(number) FROM numbers(10000000) SETTINGS max_block_size = 10000"
    with pytest.raises(httpx.RemoteProtocolError), http.stream("POST", "", content=sql) as answer:
        assert answer.status_code == 200
        for _ in answer.iter_bytes():
            pass


@pytest.mark.parametrize("compress", [False, "gzip"])
def test_a_client_sees_an_error_after_the_first_rows(server: Server, compress: bool | str) -> None:
    sql = "SELECT throwIf(number = 5000000), toString(number) FROM numbers(10000000) SETTINGS max_block_size = 10000"
    with pytest.raises(StreamFailureError, match="FUNCTION_THROW_IF_VALUE_IS_NON_ZERO"):
        server.client(compress=compress).query(sql).result_rows  # noqa: B018 - rows are read here


def test_get_may_only_read(http: httpx.Client, table: str) -> None:
    for sql in (f"DROP TABLE {table}", f"INSERT INTO {table} (a) VALUES (1)"):
        answer = http.get("", params={"query": sql})
        assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (500, "164")
    assert http.post("", content=f"SELECT count() FROM {table}").text == "0\n"


def test_a_wrong_or_missing_password_is_refused(server: Server) -> None:
    for headers in ({}, {"X-ClickHouse-Key": "x"}, {"Authorization": "Basic !!"}, {"X-ClickHouse-User": "root"}):
        answer = httpx.get(server.url, params={"query": "SELECT 1"}, headers=headers)
        assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (401, "516")
    assert httpx.get(server.url, params={"query": "SELECT 1"}, auth=("default", PASSWORD)).text == "1\n"
    assert httpx.get(server.url, params={"query": "SELECT 1", "password": PASSWORD}).text == "1\n"


def test_ping_and_greeting_need_no_password(server: Server) -> None:
    assert httpx.get(f"{server.url}ping").text == "Ok.\n"
    assert httpx.get(server.url).text == "Ok.\n"
    assert httpx.get(f"{server.url}nothing").status_code == 404


@pytest.mark.parametrize("where", ["url", "body"])
def test_inserts_over_plain_http(http: httpx.Client, table: str, where: str) -> None:
    statement, rows = f"INSERT INTO {table} (a, s) FORMAT TSV", "1\tx\n2\ty\n"
    if where == "url":
        answer = http.post("", params={"query": statement}, content=rows)
    else:
        answer = http.post("", content=f"{statement}\n{rows}")
    assert '"written_rows": "2"' in answer.headers["X-ClickHouse-Summary"]
    assert http.post("", content=f"SELECT a, s FROM {table} ORDER BY a").text == rows


def test_an_insert_in_chunks_and_gzip(http: httpx.Client, table: str) -> None:
    rows = b"".join(b"%d\tx\n" % number for number in range(200_000))
    packed = gzip.compress(rows)
    pieces = (packed[start : start + 777] for start in range(0, len(packed), 777))
    params = {"query": f"INSERT INTO {table} (a, s) FORMAT TSV"}
    assert http.post("", params=params, headers={"Content-Encoding": "gzip"}, content=pieces).status_code == 200
    assert http.post("", content=f"SELECT count(), sum(a) FROM {table}").text == "200000\t19999900000\n"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "lz4", "zstd", "br"])
def test_a_body_that_is_not_as_its_encoding_says_is_refused(http: httpx.Client, table: str, encoding: str) -> None:
    params = {"query": f"INSERT INTO {table} (a, s) FORMAT TSV"}
    answer = http.post("", params=params, headers={"Content-Encoding": encoding}, content=b"1\tx\n" * 10)
    assert answer.status_code == 400
    assert encoding in answer.text
    assert http.post("", content=f"SELECT count() FROM {table}").text == "0\n"


def test_a_broken_row_inserts_nothing(http: httpx.Client, table: str) -> None:
    answer = http.post("", content=f'INSERT INTO {table} (a) FORMAT JSONEachRow\n{{"a":1}}\n{{"a":"x"}}\n')
    assert answer.status_code == 400
    assert http.post("", content=f"SELECT count() FROM {table}").text == "0\n"


def test_a_repeated_batch_with_its_token_is_stored_once(server: Server, http: httpx.Client, table: str) -> None:
    http.post("", content=f"ALTER TABLE {table} MODIFY SETTING non_replicated_deduplication_window = 100")
    for _ in range(3):
        server.client().insert(table, _ROWS[:5], settings={"insert_deduplication_token": "batch-1"})
    assert http.post("", content=f"SELECT count() FROM {table}").text == "5\n"


def test_compressed_answers_when_asked_for(http: httpx.Client) -> None:
    sql = "SELECT number FROM numbers(100000)"
    packed = http.post("", params={"enable_http_compression": "1"}, headers={"Accept-Encoding": "gzip"}, content=sql)
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.text.count("\n") == 100_000
    assert "Content-Encoding" not in http.post("", content=sql).headers


def test_own_block_compression_is_refused_by_name(http: httpx.Client) -> None:
    answer = http.get("", params={"query": "SELECT 1", "compress": "1"})
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (501, "48")


def test_statements_run_side_by_side(server: Server) -> None:
    def one(_: int) -> str:
        with server.http() as client:
            return client.post("", content="SELECT sleep(0.5)").text

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == ["0\n"] * 4
    assert time.monotonic() - began < 1.9


def test_a_large_result_does_not_fill_the_memory(server: Server, http: httpx.Client) -> None:
    def resident() -> int:
        return int(psutil.Process(server.process.pid).memory_info().rss)

    before, most, received = resident(), 0, 0
    sql = "SELECT number, repeat('x', 1000) FROM numbers(400000) FORMAT TSV"
    with http.stream("POST", "", content=sql) as answer:
        for piece in answer.iter_bytes():
            received += len(piece)
            most = max(most, resident())
    assert received > 400_000_000
    assert most - before < 150_000_000


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    server = Server(tmp_path)
    with server.http() as client:
        client.post("", content=_TABLE.format(name="kept"))
    for start in range(0, 500, 100):
        server.client().insert("kept", _ROWS[start : start + 100])
        server.kill_and_restart()
    with server.http() as client:
        assert client.post("", content="SELECT count(), uniqExact(a) FROM kept").text == "500\t500\n"
    assert server.stop() == 0
