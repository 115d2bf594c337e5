"""The record of a running stack, `DATA_DIR/stack.json`, by which other commands find it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.embedded.files import write_private

STACK_FILE = "stack.json"
_LOCK_FILE = "stack.lock"


@dataclass(frozen=True, slots=True)
class ChildRecord:
    """One child as the record shows it."""

    pid: int | None
    started_at: float
    """Unix seconds of the last start."""
    restarts: int
    log: str


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the parts of a stack are, and what runs. URLs hold passwords: the file is its owner's only."""

    pid: int
    """Process id of the supervisor."""
    version: str
    started_at: float
    data_dir: str
    url: str
    """Base URL of the first ingress."""
    host: str
    port: int
    ingress_urls: list[str]
    kafka_bootstrap: str
    redis_url: str
    clickhouse_url: str
    ready: bool = False
    children: dict[str, ChildRecord] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """The HEADRACE_* variables that point a process at this stack."""
        return {
            "HEADRACE_KAFKA_BOOTSTRAP": self.kafka_bootstrap,
            "HEADRACE_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
            "HEADRACE_REDIS_URL": self.redis_url,
            "HEADRACE_CLICKHOUSE_URL": self.clickhouse_url,
            "HEADRACE_DATA_DIR": self.data_dir,
        }


class StackRunning(Exception):
    """Another stack holds the data directory; the text says which."""


class StackLock:
    """Held by the supervisor as long as its stack runs; the kernel lets go when the process ends, however it ends."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._file: int | None = None

    def __enter__(self) -> Self:
        self._file = os.open(self._data_dir / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        # `discover` holds the lock for a moment, so that one refusal says nothing yet.
        for _ in range(20):
            if _lock(self._file, fcntl.LOCK_EX):
                return self
            time.sleep(0.02)
        os.close(self._file)
        running = _read(self._data_dir)
        which = f"process {running.pid}, {running.url}" if running else "it has not written its record yet"
        raise StackRunning(
            f"a stack already runs in {self._data_dir} ({which}): stop it, or pass another --data-dir and --port"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)


def write(endpoints: Endpoints) -> None:
    """Replace the record in one step."""
    write_private(Path(endpoints.data_dir) / STACK_FILE, json.dumps(asdict(endpoints), indent=1))


def remove(data_dir: Path) -> None:
    """Take the record away, as the last act of a stack that stops in order."""
    (data_dir / STACK_FILE).unlink(missing_ok=True)


def discover(data_dir: Path) -> Endpoints | None:
    """The stack that runs in a data directory, None if none does. A record left by a dead stack is not believed."""
    try:
        file = os.open(data_dir / _LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        return None if _lock(file, fcntl.LOCK_SH) else _read(data_dir)
    finally:
        os.close(file)


def left_behind(data_dir: Path) -> Endpoints | None:
    """The record of a stack that ended without order, for its next start to clean up after. Call with the lock held."""
    return _read(data_dir)


def _lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(data_dir: Path) -> Endpoints | None:
    try:
        found = json.loads((data_dir / STACK_FILE).read_text())
        children = {name: ChildRecord(**child) for name, child in found.pop("children").items()}
        return Endpoints(**found, children=children)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
