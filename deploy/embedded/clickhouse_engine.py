"""ClickHouse's engine in this process (chdb): one short-lived connection a statement, so that nothing leaks between."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from clickhouse import readonly
from deploy.embedded.clickhouse_sql import CHUNK_SAFE_FORMATS, Insert, first_word, output_format

MEMORY_LIMIT = 1_500_000_000
"""Bytes that all statements together may use; one that would pass it fails with MEMORY_LIMIT_EXCEEDED."""
RESULT_LIMIT = 256 * 1024 * 1024
"""Bytes of a result that cannot be sent in chunks and so is held in memory."""
CONCURRENT_STATEMENTS = 8
"""Statements that run at once; more wait for their turn."""
CLOSE_SECONDS = 5.0

_SERVER_SETTINGS = {
    "max_server_memory_usage": MEMORY_LIMIT,
    "mark_cache_size": 32 * 1024 * 1024,
    "primary_index_cache_size": 32 * 1024 * 1024,
    "query_condition_cache_size": 8 * 1024 * 1024,
    "compiled_expression_cache_size": 8 * 1024 * 1024,
    "max_thread_pool_free_size": 8,
    "max_thread_pool_size": 256,
}
_SESSION_SETTINGS: dict[str, str | int] = {
    "async_insert": 0,
    "compile_expressions": 0,
    "max_block_size": 8192,
    "max_execution_time": 300,
}
"""An acknowledged insert is a part on disk (no asynchronous queue); nothing is compiled (LLVM costs 30 MB); a result
comes in small pieces (400 MB of wide rows: 350 MB resident at most instead of 780, in half the time)."""


class EngineError(Exception):
    """The engine refused a statement; the text is ClickHouse's own `Code: N. DB::Exception: … (NAME)`."""

    _SHAPE = re.compile(r"Code: (\d+)\. (.*)", re.DOTALL)
    _NAME = re.compile(r"\(([A-Z][A-Z0-9_]+)\)")

    def __init__(self, text: str) -> None:
        found = self._SHAPE.search(text)
        super().__init__(found.group(0) if found else f"Code: 1000. DB::Exception: {text} (POCO_EXCEPTION)")
        self.code = int(found.group(1)) if found else 1000
        names = self._NAME.findall(str(self))
        self.name: str = names[-1] if names else "POCO_EXCEPTION"


class _Result(Protocol):
    def bytes(self) -> bytes: ...
    def rows_read(self) -> int: ...
    def storage_rows_read(self) -> int: ...
    def storage_bytes_read(self) -> int: ...


class _Connection(Protocol):
    def query(self, query: str, format: str, params: Mapping[str, str] | None = None) -> _Result: ...
    def send_query(self, query: str, format: str, params: Mapping[str, str] | None = None) -> Iterable[_Result]: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Statement:
    """One statement with all that decides how it runs."""

    text: str
    database: str = ""
    default_format: str = "TabSeparated"
    settings: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    read_only: bool = False

    @property
    def format(self) -> str:
        """The format of its result."""
        return output_format(self.text, self.default_format)


@dataclass(slots=True)
class Progress:
    """What a statement has read and written so far."""

    read_rows: int = 0
    read_bytes: int = 0
    written_rows: int = 0
    written_bytes: int = 0
    result_rows: int = 0


class Engine:
    """The data directory, opened once by this process; its methods may be called from many threads."""

    def __init__(self, data: Path) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self._spool = data.parent.resolve() / f"{data.name}-spool"
        shutil.rmtree(self._spool, ignore_errors=True)  # what an earlier process left; its inserts were never answered
        self._spool.mkdir()
        for heavy in ("pyarrow", "pandas", "numpy"):
            # chdb imports them only for results as Python objects, which are never asked for here: 40 MB saved.
            sys.modules.setdefault(heavy, cast("ModuleType", None))
        from chdb.state.sqlitelike import Connection

        self._connect = Connection
        options = "&".join(f"{name}={value}" for name, value in _SERVER_SETTINGS.items())
        self._target = f"{data}?{options}"
        self._turns = threading.BoundedSemaphore(CONCURRENT_STATEMENTS)
        self._keeper = self._open()
        self.version = self._keeper.query("SELECT version()", "TSVRaw").bytes().decode().strip()
        self.timezone = self._keeper.query("SELECT timezone()", "TSVRaw").bytes().decode().strip()
        forget_unused_code()

    def close(self) -> None:
        """Wait up to CLOSE_SECONDS for what runs, then close the directory; no other call may follow."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for _ in range(CONCURRENT_STATEMENTS):
            self._turns.acquire(timeout=max(0.0, deadline - time.monotonic()))
        self._keeper.close()

    def run(self, statement: Statement, progress: Progress) -> Iterator[bytes]:
        """Run a statement and yield its result in pieces.

        Pieces come as the engine makes them where the format allows it; else one piece, at most RESULT_LIMIT bytes.
        Raises EngineError, also between pieces.
        """
        with self._session(statement) as connection:
            if statement.format.lower() in CHUNK_SAFE_FORMATS and first_word(statement.text) in ("SELECT", "WITH"):
                try:
                    yield from _chunks(connection, statement, progress)
                    return
                except EngineError as error:
                    if "Streaming query is not supported" not in str(error):
                        raise
            _set(connection, "max_result_bytes", str(RESULT_LIMIT))
            result = connection.query(statement.text, statement.default_format, statement.params)
            _count(result, progress)
            yield result.bytes()

    def insert(self, statement: Statement, insert: Insert, data: Iterable[bytes], progress: Progress) -> None:
        """Write rows. Raises `EngineError`, with nothing written of a block that the table refuses.

        The rows are spooled to a file that one statement then reads: chdb's own streaming insert reports errors of
        the format alone, and acknowledges rows that the table refused (too many partitions, a violated constraint).
        """
        with tempfile.NamedTemporaryFile(dir=self._spool, prefix="insert-") as spool:
            for piece in data:
                spool.write(piece)
            spool.flush()
            text = f"{insert.statement} FROM INFILE {quote_text(spool.name)} COMPRESSION 'none' FORMAT {insert.format}"
            with self._session(statement) as connection:
                for name, value in statement.params.items():
                    _set(connection, f"param_{name}", value)
                written = connection.query(text, "Null")
                progress.written_rows, progress.written_bytes = written.rows_read(), Path(spool.name).stat().st_size

    def _open(self) -> _Connection:
        connection = cast("_Connection", self._connect(self._target))
        for name, value in _SESSION_SETTINGS.items():
            _set(connection, name, str(value))
        return connection

    @contextmanager
    def _session(self, statement: Statement) -> Iterator[_Connection]:
        with self._turns:
            connection = self._open()
            try:
                if statement.database:
                    connection.query(f"USE {quote_name(statement.database)}", "Null")
                settings = dict(statement.settings)
                wanted = settings.pop("readonly", "0")
                for name, value in settings.items():
                    _set(connection, name, value)
                if statement.read_only or wanted not in ("", "0"):
                    _set(connection, "readonly", "2")  # 1 would keep us from bounding the result
                    _check_reads(connection, statement)
                yield connection
            except RuntimeError as error:
                raise EngineError(str(error)) from error
            finally:
                connection.close()


def _check_reads(connection: _Connection, statement: Statement) -> None:
    """Refuse what `readonly` lets through in an engine without users. Raises `EngineError`."""
    text = statement.text
    if text.lstrip()[:6].lower() == "insert":  # Its data is nothing that EXPLAIN could parse.
        raise EngineError("Code: 164. DB::Exception: INSERT is not allowed: only statements that read are. (READONLY)")
    connection.query(f"SELECT formatQuerySingleLine({quote_text(text)})", "Null")  # one statement, or an error
    ast = connection.query(f"EXPLAIN AST {text}", "TSVRaw", statement.params).bytes()
    try:
        readonly.check(ast.decode("utf-8", "surrogateescape"))
    except readonly.NotReadOnly as error:
        raise EngineError(f"Code: 164. DB::Exception: {error}. (READONLY)") from None


def _chunks(connection: _Connection, statement: Statement, progress: Progress) -> Iterator[bytes]:
    try:
        for result in connection.send_query(statement.text, statement.default_format, statement.params):
            _count(result, progress)
            yield result.bytes()
    except RuntimeError as error:
        raise EngineError(str(error)) from error


def _count(result: _Result, progress: Progress) -> None:
    progress.result_rows += result.rows_read()
    progress.read_rows = max(progress.read_rows, result.storage_rows_read())
    progress.read_bytes = max(progress.read_bytes, result.storage_bytes_read())


def _set(connection: _Connection, name: str, value: str) -> None:
    connection.query(f"SET {quote_name(name)} = {quote_text(value)}", "Null")


def quote_name(name: str) -> str:
    """An identifier in backticks."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def quote_text(text: str) -> str:
    """A string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def forget_unused_code() -> None:
    """Let go of the pages of the engine's code that loading it touched; those that run come back by themselves.

    The library has 390 MB of code, of which loading maps about 120 MB that is never run. The pages are clean copies
    of the file, so that dropping them is safe. Linux only; elsewhere nothing happens.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    dont_need = 4
    libc = ctypes.CDLL(None, use_errno=True)
    for line in maps.read_text().splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "r-xp" and "_chdb" in fields[5]:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need)
