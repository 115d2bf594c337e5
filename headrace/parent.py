"""Children never outlive the process that started them, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PARENT_PID = "HEADRACE_PARENT_PID"
"""Environment variable with the process id of the supervisor that started this process."""

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
"""Loaded at import: nothing may be loaded between fork and exec."""


def watch_parent() -> None:
    """End this process as soon as the parent named by HEADRACE_PARENT_PID is gone; without that name do nothing.

    On Linux the kernel does it, at no cost; elsewhere a thread looks every half second.
    """
    # Taken out, so that this process's own children do not look for a grandparent.
    named = os.environ.pop(PARENT_PID, None)
    if not named:
        return
    parent = int(named)
    if _libc is not None:
        die_with_parent(parent)
        return
    _exit_if_orphaned(parent)
    threading.Thread(target=_poll, args=(parent,), name="parent-watch", daemon=True).start()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends (Linux; elsewhere only the check).

    Fit for `preexec_fn` of a `subprocess.Popen` called in a main thread: `partial(die_with_parent, os.getpid())`.
    It survives `exec`, but not a further `fork`, so that each process must ask for itself.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _exit_if_orphaned(parent)


def _exit_if_orphaned(parent: int) -> None:
    """Close the race: the parent may have gone before the kernel was asked."""
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _poll(parent: int) -> None:
    never = threading.Event()
    while not never.wait(_POLL_SECONDS):
        _exit_if_orphaned(parent)
