"""Child processes of a benchmark: start, wait for readiness, end whole trees by process id."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

READY = "ready "
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class NotReady(RuntimeError):
    """A child ended, or said nothing in time, before its line `ready URL`; the text says where its log is."""


def raise_file_limit() -> None:
    """Lift the soft limit on open files to the hard one: thousands of streams are thousands of sockets."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _die_with_parent() -> None:
    """Linux: get SIGTERM when the thread that started this process ends, however it ends."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_tree(pid: int, grace: float = 10.0) -> None:
    """End the process `pid` and all its descendants: SIGTERM to the root, after `grace` seconds SIGKILL to the rest.

    Descendants are listed before the signal, since they lose their parent once the root has ended.
    """
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
        root.terminate()
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs(tree, timeout=grace)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5.0)


@contextmanager
def child(
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    grace: float = 10.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command`, output to `log`; its whole tree has ended when the block is left.

    A session of its own keeps Ctrl-C of the terminal from it, so that its parent ends it in order.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        yield process
    finally:
        end_tree(process.pid, grace)
        process.wait(timeout=10.0)


def wait_ready(process: subprocess.Popen[bytes], log: Path, ready: Callable[[str], str | None], timeout: float) -> str:
    """What `ready(log text)` finds in the log of a child, once it finds something. Raises NotReady."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while time.monotonic() < deadline:
        found = ready(log.read_text(errors="replace"))
        if found is not None:
            return found
        if process.poll() is not None:
            raise NotReady(f"ended with code {process.returncode} before it was ready; see {log}")
        pause.wait(0.05)
    raise NotReady(f"not ready after {timeout:.0f} s; see {log}")


def ready_line(text: str) -> str | None:
    """The URL of the line `ready http://HOST:PORT`, once it is there."""
    for line in text.splitlines():
        if line.startswith(READY):
            return line.removeprefix(READY).strip()
    return None
