"""ClickHouse's HTTP protocol before its engine: `python -m deploy.embedded.clickhouse_server --data D --port P`."""

from __future__ import annotations

import argparse
import base64
import hmac
import itertools
import json
import os
import secrets
import signal
import socket
import socketserver
import threading
import uuid
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from deploy.embedded.clickhouse_body import BodyError, Compressor, compressor, decoded, raw_body
from deploy.embedded.clickhouse_engine import Engine, EngineError, Progress, Statement
from deploy.embedded.clickhouse_errors import http_status
from deploy.embedded.clickhouse_form import fields, is_form
from deploy.embedded.clickhouse_sql import MAX_STATEMENT, content_type, first_word, parse_insert
from headrace.parent import watch_parent

CONNECTIONS = 128
"""Connections served at once; further ones wait in the listener's queue."""
KEEP_ALIVE = 30
"""Seconds an idle connection is kept, and the longest silence inside a request."""
HELD_BACK = 1 << 20
"""Bytes of a result kept before the status is sent, so that early errors get a right one."""

UNREAD_LIMIT = 64 << 20
"""Bytes of a refused request that are read all the same, so that its caller gets to see the error."""

_NOT_SETTINGS = frozenset(
    (
        *("query", "database", "default_format", "query_id", "user", "password", "quota_key", "role"),
        *("session_id", "session_timeout", "session_check", "session_timezone", "close_session"),
        *("compress", "decompress", "enable_http_compression", "buffer_size", "wait_end_of_query"),
        *("send_progress_in_http_headers", "http_headers_progress_interval_ms", "client_protocol_version"),
        *("stacktrace", "http_write_exception_in_output_format"),
    )
)


_Request: TypeAlias = socket.socket | tuple[bytes, socket.socket]


class Handler(BaseHTTPRequestHandler):
    """One connection. Its thread runs the statement itself, so that a slow reader slows only its own result."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = KEEP_ALIVE
    disable_nagle_algorithm = True
    server_version = "ClickHouse"
    sys_version = ""
    _query_id = ""
    _format = ""
    _error_tag = ""
    _started = False
    _packer: Compressor | None = None
    _body: Iterator[bytes] = iter(())

    def do_GET(self) -> None:
        """A read-only statement, or `/ping`."""
        self._answer(read_only=True)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Any statement; the body continues the text of the `query` parameter."""
        self._answer(read_only=False)

    def log_message(self, format: str, *args: object) -> None:
        """Statements are not logged: they may carry what must not be in a log."""

    def _answer(self, *, read_only: bool) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._query_id = query.get("query_id") or str(uuid.uuid4())
        self._format, self._started, self._body = "", False, raw_body(self.headers, self.rfile)
        try:
            if parts.path in ("/ping", "/replicas_status") or (parts.path == "/" and self._is_greeting(query)):
                self._send_plain(200, b"Ok.\n")
            elif parts.path != "/":
                self._send_plain(404, f"There is no handle {parts.path}\n".encode())
            else:
                self._check_password(query)
                self._execute(query, read_only=read_only)
        except (EngineError, BodyError) as error:
            self._send_error(error)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _is_greeting(self, query: dict[str, str]) -> bool:
        return self.command != "POST" and "query" not in query

    def _check_password(self, query: dict[str, str]) -> None:
        user = query.get("user") or self.headers.get("X-ClickHouse-User") or "default"
        password = query.get("password") or self.headers.get("X-ClickHouse-Key") or ""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "basic":
            user, _, password = base64.b64decode(token + "==", validate=False).decode("utf-8", "replace").partition(":")
        same = hmac.compare_digest(password.encode(), self.server.password.encode())
        if not same or user not in ("default", ""):
            raise EngineError(
                "Code: 516. DB::Exception: default: Authentication failed: password is incorrect, or there is no "
                "user with such name. (AUTHENTICATION_FAILED)"
            )

    def _execute(self, query: dict[str, str], *, read_only: bool) -> None:
        body = decoded(self._body, self.headers.get("Content-Encoding", ""))
        if is_form(kind := self.headers.get("Content-Type", "")):
            query = query | fields(kind, body)
            body = iter(())
        for name in ("compress", "decompress"):
            if query.get(name, "0") not in ("", "0"):
                raise EngineError(
                    f"Code: 48. DB::Exception: {name}=1 (ClickHouse's own block compression) is not supported here: "
                    "use Content-Encoding or Accept-Encoding. (NOT_IMPLEMENTED)"
                )
        prefix = query.get("query", "").encode()
        if prefix and self.command == "POST":
            prefix += b"\n"
        head, rest = _take(itertools.chain((prefix,), body), MAX_STATEMENT)
        statement = Statement(
            text="",
            database=query.get("database") or self.headers.get("X-ClickHouse-Database") or "",
            default_format=query.get("default_format") or self.headers.get("X-ClickHouse-Format") or "TabSeparated",
            settings={k: v for k, v in query.items() if k not in _NOT_SETTINGS and not k.startswith("param_")},
            params={k.removeprefix("param_"): v for k, v in query.items() if k.startswith("param_")},
            read_only=read_only,
        )
        progress = Progress()
        insert = parse_insert(head)
        if insert is not None:
            statement.text = insert.statement
            data = itertools.chain((head[insert.data_start :],), rest)
            self.server.engine.insert(statement, insert, (piece for piece in data if piece), progress)
            self._send_plain(200, b"", progress)
            return
        if next((piece for piece in rest if piece), None) is not None:
            raise EngineError(
                f"Code: 62. DB::Exception: Syntax error: the query is longer than max_query_size = {MAX_STATEMENT} "
                "bytes. (SYNTAX_ERROR)"
            )
        statement.text = head.decode("utf-8", "surrogateescape").rstrip().rstrip(";")
        if not first_word(statement.text):
            raise EngineError("Code: 62. DB::Exception: Syntax error: empty query. (SYNTAX_ERROR)")
        self._format = statement.format
        self._send_result(self.server.engine.run(statement, progress), progress, query)

    def _send_result(self, pieces: Iterator[bytes], progress: Progress, query: dict[str, str]) -> None:
        held, rest = _take(pieces, HELD_BACK)
        wanted = (
            self.headers.get("Accept-Encoding", "") if query.get("enable_http_compression") in ("1", "true") else ""
        )
        encoding, packer = compressor(wanted)
        self._send_head(200, content_type(self._format), progress)
        self._error_tag = secrets.token_hex(8)
        self.send_header("X-ClickHouse-Exception-Tag", self._error_tag)
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._started, self._packer = True, packer
        if self.command == "HEAD":
            return
        for piece in itertools.chain((held,), rest):
            self._write_chunk(packer.compress(piece) if packer else piece)
        self._write_chunk(packer.flush() if packer else b"")
        self.wfile.write(b"0\r\n\r\n")

    def _send_head(self, status: int, media_type: str, progress: Progress | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("X-ClickHouse-Server-Display-Name", "headrace")
        self.send_header("X-ClickHouse-Query-Id", self._query_id)
        self.send_header("X-ClickHouse-Timezone", self.server.engine.timezone)
        if self._format:
            self.send_header("X-ClickHouse-Format", self._format)
        if progress is not None:
            summary = {name: str(getattr(progress, name)) for name in Progress.__slots__}
            self.send_header("X-ClickHouse-Summary", json.dumps(summary | {"total_rows_to_read": "0"}))
        self.send_header("Keep-Alive", f"timeout={KEEP_ALIVE}")
        if self.close_connection:
            self.send_header("Connection", "close")

    def _send_plain(self, status: int, body: bytes, progress: Progress | None = None, code: int | None = None) -> None:
        self._send_head(status, "text/plain; charset=UTF-8", progress)
        if code is not None:
            self.send_header("X-ClickHouse-Exception-Code", str(code))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def _send_error(self, error: EngineError | BodyError) -> None:
        text = f"{error} (version {self.server.engine.version} (chdb))\n".encode("utf-8", "surrogateescape")
        if self._started:
            # The status is out: the error goes last, in the marks that servers use since 25.11, and that the chunks
            # have no end says to everyone that the result is not whole.
            self.close_connection = True
            tag = self._error_tag.encode()
            last = b"__exception__\r\n%b\r\n%b%d %b\r\n__exception__\r\n" % (tag, text, len(text), tag)
            self._write_chunk(self._packer.compress(last) + self._packer.flush() if self._packer else last)
            return
        self._read_rest()
        self._send_plain(http_status(error.name), text, code=error.code)

    def _read_rest(self) -> None:
        """Read what is left of the request, within reason: a caller that still writes would not see the answer."""
        read = 0
        try:
            for piece in self._body:
                read += len(piece)
                if read > UNREAD_LIMIT:
                    break
            else:
                return
        except (BodyError, ValueError):
            pass
        self.close_connection = True

    def _write_chunk(self, piece: bytes) -> None:
        if piece:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))


class Server(socketserver.ThreadingTCPServer):
    """The listener: a thread a connection, at most CONNECTIONS of them."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    _slots: ClassVar[threading.BoundedSemaphore] = threading.BoundedSemaphore(CONNECTIONS)

    def __init__(self, address: tuple[str, int], engine: Engine, password: str) -> None:
        self.engine = engine
        self.password = password
        super().__init__(address, Handler)

    def process_request(self, request: _Request, client_address: object) -> None:
        """Start the connection's thread once there is a place for it."""
        self._slots.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: _Request, client_address: object) -> None:
        """Serve the connection and free its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: _Request, client_address: object) -> None:
        """A caller that left is no error; anything else shows its trace in the log."""
        super().handle_error(request, client_address)


def _take(pieces: Iterable[bytes], size: int) -> tuple[bytes, Iterator[bytes]]:
    """The first pieces until there are `size` bytes, joined, and the iterator of what follows."""
    rest = iter(pieces)
    taken = bytearray()
    for piece in rest:
        taken += piece
        if len(taken) >= size:
            break
    return bytes(taken), rest


def main() -> None:
    """Serve one data directory on one loopback port until SIGTERM. The password is HEADRACE_CLICKHOUSE_PASSWORD."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    watch_parent()
    engine = Engine(options.data)
    server = Server((options.host, options.port), engine, os.environ.get("HEADRACE_CLICKHOUSE_PASSWORD", ""))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 60.0}, daemon=True).start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    server.server_close()
    engine.close()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
