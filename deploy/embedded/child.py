"""One child process of a stack: how it is started, where its output goes, and when it is started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from deploy.embedded.nursery import Forked, Nursery, Wish
from headrace.parent import PARENT_PID, die_with_parent

LOG_LIMIT = 10 * 1024 * 1024
"""Bytes of a log before it becomes `NAME.log.1`."""


GIVES_WAY = 5
"""Niceness of parts that no caller waits for."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run. `name` is unique in the stack and names the log."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables on top of this process's own."""
    stop_seconds: float = 10.0
    """How long it may take to stop before it is killed."""
    cwd: Path | None = None
    call: tuple[str, ...] = ()
    """The same for a nursery, where there is one: `module:function` of what runs in Python, and its arguments."""
    nice: int = 0
    """How far it gives way to the others where cores are short, as `nice` counts: 0 not at all, 19 wholly."""


def give_way(nice: int) -> None:
    """Have this process, the first of its session, give way to others."""
    if nice:
        os.nice(nice)
        # Linux may weigh whole sessions against each other (sched_autogroup); then niceness counts only within one.
        with contextlib.suppress(OSError):
            group = os.open("/proc/self/autogroup", os.O_WRONLY)
            os.write(group, b"%d" % nice)
            os.close(group)


def _begin(parent: int, nice: int) -> None:
    """What a child does between fork and exec."""
    die_with_parent(parent)
    give_way(nice)


@dataclass(slots=True)
class Backoff:
    """When to restart: at once the first time, then after 0.2 s, doubling to 10 s; anew once it lived 30 s."""

    first: float = 0.2
    longest: float = 10.0
    settled: float = 30.0
    _failures: int = 0

    def delay(self, lived: float) -> float:
        """Seconds to wait before the next start of a process that lived `lived` seconds."""
        if lived >= self.settled:
            self._failures = 0
        self._failures += 1
        if self._failures == 1:
            return 0.0
        # The exponent is capped: a power of a large count would not fit a float.
        return float(min(self.longest, self.first * 2 ** min(self._failures - 2, 16)))


class Child:
    """A running or stopped child; `start` must be called in the main thread (the kernel ties its life to it)."""

    def __init__(self, spec: ChildSpec, logs: Path, nursery: Nursery) -> None:
        self.spec = spec
        self._nursery = nursery
        self.log = logs / f"{spec.name}.log"
        self.backoff = Backoff()
        self.restarts = 0
        self.started_at = 0.0
        """Unix seconds."""
        self._started = 0.0
        self._process: subprocess.Popen[bytes] | Forked | None = None

    @property
    def pid(self) -> int | None:
        """Process id, None when it does not run."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start it in a session of its own, so that Ctrl-C of the terminal reaches only the supervisor."""
        self.started_at, self._started = time.time(), time.monotonic()
        env = {**os.environ, **self.spec.env, PARENT_PID: str(os.getpid())}
        self._process = self._fork(env) or self._exec(env)

    def _fork(self, env: Mapping[str, str]) -> Forked | None:
        if not self.spec.call:
            return None
        title = " ".join((Path(self.spec.argv[0]).name, *self.spec.argv[1:]))
        return self._nursery.fork(Wish(self.spec.call, title, env, str(self.log), self.spec.nice))

    def _exec(self, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                self.spec.argv,
                cwd=self.spec.cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(_begin, os.getpid(), self.spec.nice),
            )

    def reap(self) -> int | None:
        """The exit code if it has ended since; what it started itself is killed with it."""
        if self._process is None or (code := self._process.poll()) is None:
            return None
        group, self._process = self._process.pid, None
        _signal_group(group, signal.SIGKILL)
        return code

    def lived(self) -> float:
        """Seconds since its last start."""
        return time.monotonic() - self._started

    def terminate(self) -> None:
        """Ask it to stop."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill it and all that it started."""
        if self._process is not None:
            _signal_group(self._process.pid, signal.SIGKILL)

    def trim_log(self, limit: int = LOG_LIMIT) -> None:
        """Move a log over the limit to `.1`. It is copied and emptied, since the child keeps it open."""
        try:
            if self.log.stat().st_size <= limit:
                return
            with self.log.open("rb+") as log, Path(f"{self.log}.1").open("wb") as old:
                log.seek(-limit, os.SEEK_END)
                while piece := log.read(1 << 20):
                    old.write(piece)
                log.truncate(0)
        except FileNotFoundError:
            return


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return
