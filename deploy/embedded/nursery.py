"""A process that has imported what the roles need, and forks them: a start then takes milliseconds and not seconds.

Importing is most of what a role does before it is of use, and a stack has eight of them. The children of the nursery
are the supervisor's, not its own: it forks twice, and the kernel gives orphans to the supervisor, which has asked for
them (`PR_SET_CHILD_SUBREAPER`, see prctl(2)). So they are waited for, killed and tied to the supervisor's life like
those that it starts itself. Without a nursery (no Linux, or it has died) everything is started by `exec`.

This is the supervisor's side; what the nursery itself does is in `forking`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from headrace.parent import die_with_parent

READY = b"ready"
"""What the nursery says when it has imported everything."""

_PR_SET_CHILD_SUBREAPER = 36
_REPLY_SECONDS = 10.0
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "SPT_NOENV": "1"}
"""Read by the C library before any fork; and the title of a process leaves its environment readable."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a child is to be."""

    call: tuple[str, ...]
    """`module:function`, and its arguments; the function returns the exit code."""
    title: str
    """As `ps` shows it."""
    env: Mapping[str, str]
    """The whole environment."""
    log: str
    nice: int


class Forked:
    """A child of this process that the nursery forked, with the part of `subprocess.Popen` that is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def terminate(self) -> None:
        """Ask it to stop."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


class Nursery:
    """The supervisor's side, for its main thread."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._ready = False

    @property
    def pid(self) -> int | None:
        """Its process id, None when there is none."""
        return self._process.pid if self._process else None

    async def open(self) -> bool:
        """Start it and wait for its imports; returns whether it is of use."""
        if sys.platform != "linux":
            return False
        ours = self._start()
        ours.setblocking(False)
        with contextlib.suppress(OSError):
            self._ready = await asyncio.get_running_loop().sock_recv(ours, len(READY)) == READY
            ours.settimeout(_REPLY_SECONDS)
        if not self._ready:
            self.close()
        return self._ready

    def _start(self) -> socket.socket:
        self.close()
        _adopt_orphans(True)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self._log.open("ab") as output:
            self._process = subprocess.Popen(
                (sys.executable, "-m", "deploy.embedded.forking", str(theirs.fileno()), str(os.getpid())),
                env={**os.environ, **_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        self._socket = ours
        return ours

    def fork(self, wish: Wish) -> Forked | None:
        """A new child of this process; None when there is no nursery, or none any more."""
        if self._process is None or self._socket is None or not self._ready:
            return None
        try:
            self._socket.send(json.dumps(asdict(wish)).encode())
            return Forked(int(self._socket.recv(16)))
        except (OSError, ValueError):
            self._process.kill()  # If it has not ended, it hangs.
            return None

    def ended(self) -> bool:
        """Whether it has died since it was of use."""
        if not self._ready or self._process is None or self._process.poll() is None:
            return False
        self.close()
        return True

    def close(self) -> None:
        """End it; its children go on. What they leave behind from here on is not given to this process."""
        self._ready = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            _adopt_orphans(False)


def _adopt_orphans(wanted: bool) -> None:
    """Whether this process is given what its descendants leave behind; else that goes further up."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted))


def bury_orphans(known: Container[int | None]) -> None:
    """Wait for the dead that nobody knows: what dead roles had started was given to this process with them."""
    own = os.getsid(0)
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if dead.si_pid in known or os.getsid(dead.si_pid) == own:  # Of its session is what this process started.
                return
            os.waitpid(dead.si_pid, 0)
