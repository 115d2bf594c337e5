"""What every engine's child process does: read how to run, load, say that it is ready, and end with its worker.

The child reads its launch as one line of JSON from standard input, loads the model, prints `ready ADDRESS` and serves.
Standard input stays open as long as the parent lives: its end, however the parent died, ends the child. Logs go to
standard error.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

PR_SET_PDEATHSIG = 1


class ChildLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """What a child of any engine needs to know; each engine adds its own."""

    alias: str
    context_length: int
    """Tokens of one request."""
    slots: int
    """Requests at the same time."""
    threads: int
    batch_tokens: int
    """Prompt tokens that are computed before anything else gets a turn."""
    adapters: dict[str, str] = {}
    """LoRA adapters by name, each with its path."""
    api_key: str = ""
    directory: str = ""
    """A private directory; it holds the unix socket and is removed at the end."""
    parent: int = 0
    """Process id of the worker."""
    device: str = ""
    """The device that the model may use, as in `Provider.load`; it reaches the engine through the environment."""


Launch = TypeVar("Launch", bound=ChildLaunch)


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process with its parent's thread; elsewhere the end of standard input has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def leave(directory: str) -> NoReturn:
    """End at once: an engine's threads hold nothing that is worth an orderly end."""
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def socket_path(launch: ChildLaunch) -> str | None:
    """Where to listen; None where the path is longer than some systems take, so that a loopback port has to do."""
    path = str(Path(launch.directory) / "s.sock")
    return path if len(os.fsencode(path)) < 100 else None


def run(shape: type[Launch], serve: Callable[[Launch], tuple[str, object]]) -> None:
    """Be a child: `serve` loads the model, serves in threads of its own, and returns its address and its server.

    Exits with 1 and the reason on standard error when it cannot be loaded.
    """
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=shape)
    # Only `ready` goes to the worker: what libraries print is log.
    worker = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    die_with_parent(launch.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: leave(launch.directory))
    try:
        address, server = serve(launch)
    except Exception as problem:
        sys.exit(f"{type(problem).__name__}: {problem}")
    print(f"ready {address}", file=worker, flush=True)
    while sys.stdin.buffer.read(4096):
        pass
    del server  # Until here: an engine's server lives as long as somebody holds it.
    leave(launch.directory)
