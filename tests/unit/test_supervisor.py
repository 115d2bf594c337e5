"""The embedded stack's pure parts: back-off, the stack's record, ports, settings files, SQL splitting."""

from __future__ import annotations

import json
import random
import socket
import stat
from pathlib import Path

import pytest

from deploy.embedded import keys, roles, stack
from deploy.embedded.child import Backoff, Child, ChildSpec
from deploy.embedded.clickhouse_errors import http_status
from deploy.embedded.clickhouse_sql import content_type, first_word, output_format, parse_insert
from deploy.embedded.kafka import broker_properties, render_properties
from deploy.embedded.nursery import Nursery
from deploy.embedded.ports import PortBook, is_free
from deploy.embedded.valkey import render_config
from headrace.doctor import Finding


def test_backoff_starts_at_once_then_doubles_to_its_longest() -> None:
    backoff = Backoff()
    assert [backoff.delay(1.0) for _ in range(9)] == [0.0, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_backoff_begins_anew_after_a_settled_life() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.delay(1.0)
    assert backoff.delay(30.0) == 0.0
    assert backoff.delay(29.9) == 0.2


def test_backoff_stands_any_number_of_failures() -> None:
    backoff = Backoff()
    assert [backoff.delay(0.0) for _ in range(5000)][-1] == 10.0


def _endpoints(data_dir: Path) -> stack.Endpoints:
    return stack.Endpoints(
        pid=1,
        version="0",
        started_at=1.0,
        data_dir=str(data_dir),
        url="http://127.0.0.1:8000",
        host="127.0.0.1",
        port=8000,
        ingress_urls=["http://127.0.0.1:8000"],
        kafka_bootstrap="127.0.0.1:9",
        redis_url="redis://:p@127.0.0.1:8/0",
        clickhouse_url="http://default:p@127.0.0.1:7",
        ready=True,
        children={"kafka": stack.ChildRecord(pid=5, started_at=1.0, restarts=2, log="kafka.log")},
    )


def test_a_running_stack_is_discovered_with_all_it_says(tmp_path: Path) -> None:
    record = _endpoints(tmp_path)
    with stack.StackLock(tmp_path):
        stack.write(record)
        assert stack.discover(tmp_path) == record
    assert record.environment()["HEADRACE_REDIS_URL"] == "redis://:p@127.0.0.1:8/0"


def test_the_record_of_a_dead_stack_is_not_believed(tmp_path: Path) -> None:
    with stack.StackLock(tmp_path):
        stack.write(_endpoints(tmp_path))
    assert stack.discover(tmp_path) is None
    assert stack.left_behind(tmp_path) == _endpoints(tmp_path)


def test_no_stack_is_discovered_in_an_empty_or_absent_directory(tmp_path: Path) -> None:
    assert stack.discover(tmp_path) is None
    assert stack.discover(tmp_path / "absent") is None


def test_a_broken_record_is_no_stack(tmp_path: Path) -> None:
    with stack.StackLock(tmp_path):
        for text in ("", "{", "[]", "null", '{"pid": 1}', '{"children": {"a": {"pid": 1}}}'):
            (tmp_path / stack.STACK_FILE).write_text(text)
            assert stack.discover(tmp_path) is None


def test_a_second_stack_on_the_same_data_is_refused_by_name(tmp_path: Path) -> None:
    with stack.StackLock(tmp_path):
        stack.write(_endpoints(tmp_path))
        with pytest.raises(stack.StackRunning, match=r"process 1, http://127\.0\.0\.1:8000.*--data-dir"):
            stack.StackLock(tmp_path).__enter__()
    with stack.StackLock(tmp_path):
        pass


def test_the_record_with_its_passwords_is_private(tmp_path: Path) -> None:
    stack.write(_endpoints(tmp_path))
    assert stat.S_IMODE((tmp_path / stack.STACK_FILE).stat().st_mode) == 0o600


def test_the_admin_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    key, made = keys.admin_key(tmp_path, None)
    assert key.startswith("hr-")
    assert len(key) > 40
    assert made
    assert keys.admin_key(tmp_path, None) == (key, False)
    assert stat.S_IMODE((tmp_path / keys.ADMIN_KEY_FILE).stat().st_mode) == 0o600


def test_a_given_admin_key_wins_and_is_kept(tmp_path: Path) -> None:
    keys.admin_key(tmp_path, None)
    assert keys.admin_key(tmp_path, "hr-mine") == ("hr-mine", False)
    assert keys.admin_key(tmp_path, None) == ("hr-mine", False)


def test_ports_are_remembered_and_replaced_when_taken(tmp_path: Path) -> None:
    book = PortBook(tmp_path / "ports.json", random.Random(1))
    first, second = book.port("kafka"), book.port("valkey")
    assert first != second
    book.save()
    assert PortBook(tmp_path / "ports.json").port("kafka") == first
    with socket.create_server(("127.0.0.1", first)):
        assert not is_free("127.0.0.1", first)
        assert PortBook(tmp_path / "ports.json").port("kafka") != first


def test_a_broken_port_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_text("[1]")
    assert PortBook(tmp_path / "ports.json").port("kafka") >= 20_000


def test_broker_listens_on_loopback_only_and_replicates_to_nobody() -> None:
    properties = broker_properties("log", 20001, 20002)
    listeners = f"{properties['listeners']},{properties['advertised.listeners']}"
    assert all("//127.0.0.1:" in listener for listener in listeners.split(","))
    factors = [value for name, value in properties.items() if name.endswith("replication.factor")]
    assert factors == ["1"] * 4
    assert int(properties["message.max.bytes"]) > 16 * 1024 * 1024
    assert int(properties["socket.request.max.bytes"]) > int(properties["message.max.bytes"])


def test_properties_are_one_a_line() -> None:
    text = render_properties(broker_properties("log", 20001, 20002))
    assert "log.dir=log\n" in text
    assert "controller.quorum.voters=1@127.0.0.1:20002\n" in text


def test_valkey_listens_on_loopback_with_a_password_and_an_append_only_file() -> None:
    lines = render_config(Path("/a b"), 20003, "secret").splitlines()
    assert {"bind 127.0.0.1", "requirepass secret", "appendonly yes", "port 20003", 'dir "/a b"'} <= set(lines)


def test_replicas_are_one_unless_asked_for() -> None:
    assert roles.parse_replicas(["ingress=2", "worker=3"]) == dict.fromkeys(roles.START_ORDER, 1) | {
        "ingress": 2,
        "worker": 3,
    }


@pytest.mark.parametrize(
    "wish", ["ingress", "ingress=", "ingress=0", "ingress=x", "broker=1", "ingress=-1", "router=99"]
)
def test_a_wrong_wish_for_replicas_is_refused_by_name(wish: str) -> None:
    with pytest.raises(roles.BadReplicas, match=wish):
        roles.parse_replicas([wish])


def test_a_role_has_a_stable_instance_and_time_to_drain() -> None:
    spec = roles.role_spec("worker", 2, {"HEADRACE_DATA_DIR": "/d"}, drain_seconds=30.0)
    assert spec.argv[-2:] == ("run", "worker")
    assert spec.env["HEADRACE_INSTANCE"] == "worker-2"
    assert spec.env["HEADRACE_WORKER_ID"] == "w2"
    assert spec.stop_seconds > 30.0
    assert set(roles.STOP_ORDER) == set(roles.START_ORDER)


def test_a_long_log_is_moved_aside_and_goes_on(tmp_path: Path) -> None:
    child = Child(ChildSpec("router", ("true",)), tmp_path, Nursery(tmp_path / "nursery.log"))
    with child.log.open("ab", buffering=0) as output:
        output.write(b"a" * 100 + b"b" * 100)
        child.trim_log(limit=150)
        output.write(b"c")
    assert child.log.read_bytes() == b"c"
    assert (tmp_path / "router.log.1").read_bytes() == b"a" * 50 + b"b" * 100


def test_a_missing_or_short_log_is_left_alone(tmp_path: Path) -> None:
    child = Child(ChildSpec("router", ("true",)), tmp_path, Nursery(tmp_path / "nursery.log"))
    child.trim_log()
    child.log.write_text("short")
    child.trim_log()
    assert child.log.read_text() == "short"


@pytest.mark.parametrize(
    ("text", "statement", "format", "data"),
    [
        (b"INSERT INTO t FORMAT Native\n\x01\x02", "INSERT INTO t ", "Native", b"\x01\x02"),
        (b"INSERT INTO t FORMAT Native\n\n\x02", "INSERT INTO t ", "Native", b"\n\x02"),
        (b"insert into `a b`.t (a,`format`) format TSV\n1\t2\n", "insert into `a b`.t (a,`format`) ", "TSV", b"1\t2\n"),
        (b'INSERT INTO t FORMAT JSONEachRow {"a":1}', "INSERT INTO t ", "JSONEachRow", b'{"a":1}'),
        (b"INSERT INTO t VALUES (1),(2)", "INSERT INTO t ", "Values", b" (1),(2)"),
        (b"INSERT INTO t (values) VALUES (1)", "INSERT INTO t (values) ", "Values", b" (1)"),
        (
            b"/* format */ INSERT INTO t SETTINGS a=1 FORMAT TSV\n",
            "/* format */ INSERT INTO t SETTINGS a=1 ",
            "TSV",
            b"",
        ),
        (b"INSERT INTO t FORMAT Native", "INSERT INTO t ", "Native", b""),
    ],
)
def test_an_insert_is_split_from_its_data(text: bytes, statement: str, format: str, data: bytes) -> None:
    insert = parse_insert(text)
    assert insert is not None
    assert (insert.statement, insert.format, text[insert.data_start :]) == (statement, format, data)


@pytest.mark.parametrize(
    "text",
    [
        b"SELECT 1 FORMAT Native",
        b"INSERT INTO t SELECT 1",
        b"INSERT INTO t (a) SELECT a FROM s FORMAT Null",
        b"-- INSERT INTO t VALUES (1)\nSELECT 1",
        b"",
        b"\xff\xfe",
    ],
)
def test_what_carries_no_data_is_no_insert(text: bytes) -> None:
    assert parse_insert(text) is None


def test_statements_are_told_apart_past_comments_and_brackets() -> None:
    assert first_word(" /* a */ -- b\n ( select 1)") == "SELECT"
    assert first_word("-- only a comment") == ""


@pytest.mark.parametrize(
    ("statement", "format"),
    [
        ("SELECT 1", "TSV"),
        ("SELECT 1 FORMAT JSON", "JSON"),
        ("SELECT 1\n FORMAT Native\n", "Native"),
        ("SELECT 1 format JSON settings max_threads=1 ;", "JSON"),
        ("SELECT 'FORMAT JSON'", "TSV"),
        ("SELECT format FROM t", "TSV"),
    ],
)
def test_a_query_names_its_format_or_takes_the_default(statement: str, format: str) -> None:
    assert output_format(statement, "TSV") == format


def test_formats_and_errors_map_as_the_server_maps_them() -> None:
    assert content_type("JSON") == "application/json; charset=UTF-8"
    assert content_type("Unheard") == "text/tab-separated-values; charset=UTF-8"
    assert (http_status("UNKNOWN_TABLE"), http_status("SYNTAX_ERROR"), http_status("READONLY")) == (404, 400, 500)


def test_a_finding_says_what_to_do_only_when_broken() -> None:
    assert Finding("Java", True, "21", "install it").line() == "ok      Java: 21"
    assert Finding("Java", False, "none", "install it").line() == "BROKEN  Java: none: install it"


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    stack.write(_endpoints(tmp_path))
    found = json.loads((tmp_path / stack.STACK_FILE).read_text())
    assert found["children"]["kafka"]["pid"] == 5
    assert found["ready"] is True
