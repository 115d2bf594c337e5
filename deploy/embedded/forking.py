"""The nursery: imports what the roles need, and forks them (`python -m deploy.embedded.forking FD SUPERVISOR_PID`)."""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
import time

import setproctitle

from deploy.embedded.child import give_way
from deploy.embedded.nursery import READY, Wish
from headrace.parent import die_with_parent
from headrace.process import ROLES

_MESSAGE = 1 << 20
"""Bytes of the longest wish: it holds an environment."""
_ADOPTION_SECONDS = 10.0


def _serve(connection: socket.socket, supervisor: int) -> Wish | None:
    """Fork whatever is asked for. Returns the wish in a child, None in the nursery once nobody asks any more."""
    connection.send(READY)
    while message := connection.recv(_MESSAGE):
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            _fork_and_leave(writing)
            os.close(reading)
            os.close(writing)
            connection.close()
            _wait_for_adoption(supervisor)
            return Wish(**json.loads(message))
        os.close(writing)
        os.waitpid(between, 0)
        connection.send(os.read(reading, 16) or b"none")
        os.close(reading)
    return None


def _fork_and_leave(tell: int) -> None:
    """Fork once more and end, so that the child is an orphan: only the child returns."""
    try:
        child = os.fork()
    except OSError:
        os._exit(1)
    if child:
        os.write(tell, b"%d" % child)
        os._exit(0)


def _wait_for_adoption(supervisor: int) -> None:
    """Return when this process is the supervisor's child; end it if that never comes. No event tells of it."""
    deadline = time.monotonic() + _ADOPTION_SECONDS
    while os.getppid() != supervisor and time.monotonic() < deadline:
        time.sleep(0.001)
    die_with_parent(supervisor)


def _become(wish: Wish) -> None:
    """Be as a process that was started by `exec`: a session, a log, an environment and a title of its own."""
    os.setsid()
    output = os.open(wish.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.environ.clear()
    os.environ.update(wish.env)
    give_way(wish.nice)
    setproctitle.setproctitle(wish.title)


def main() -> int:
    """Be the nursery, and in its children what they are to be; returns the exit code."""
    setproctitle.getproctitle()  # It finds the place of the title now, and not once the environment has moved.
    connection, supervisor = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for module in ("deploy.embedded.prepare", *ROLES.values()):
        importlib.import_module(module)
    # What is there stays in pages that are shared: no collection may write into them.
    gc.collect()
    gc.freeze()
    if (wish := _serve(connection, supervisor)) is None:
        return 0
    _become(wish)
    called, *arguments = wish.call
    module, _, function = called.partition(":")
    return int(getattr(importlib.import_module(module), function)(*arguments))


if __name__ == "__main__":
    sys.exit(main())
