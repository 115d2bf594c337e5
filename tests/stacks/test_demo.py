"""The newcomer's way: the demo in an empty directory, and Ctrl-C after it and in the middle of a start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from headrace.parent import die_with_parent
from tests.support.stacks import HEADRACE, START_SECONDS, STOP_SECONDS, clean_environment


class Terminal:
    """A command in a terminal of its own: Ctrl-C reaches it and all its children at once."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.said = ""
        self._popen = popen

    def read_until(self, text: str) -> None:
        """Read its output up to a line with `text` in it."""
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self.said += line
            if text in line:
                return
        raise AssertionError(f"it ended without {text!r}:\n{self.said[-4000:]}")

    def children(self) -> list[psutil.Process]:
        """All descendants."""
        return psutil.Process(self._popen.pid).children(recursive=True)

    def interrupt(self) -> int:
        """Ctrl-C; its exit code."""
        children = self.children()
        os.killpg(self._popen.pid, signal.SIGINT)
        said, _ = self._popen.communicate(timeout=STOP_SECONDS)
        self.said += said
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, f"left behind: {alive}"
        return self._popen.returncode


@contextmanager
def terminal(directory: Path, *command: str) -> Iterator[Terminal]:
    """Run a `headrace` command in a directory."""
    popen = subprocess.Popen(
        [HEADRACE, *command], cwd=directory, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=partial(die_with_parent, os.getpid()),
    )  # fmt: skip
    try:
        yield Terminal(popen)
    finally:
        popen.kill()
        popen.wait()


@pytest.mark.timeout(START_SECONDS + STOP_SECONDS)
def test_the_demo_shows_one_requests_way_and_stays_until_ctrl_c(tmp_path: Path) -> None:
    with terminal(tmp_path, "demo", "--keep", "--port", "0") as demo:
        demo.read_until("stays up until Ctrl-C")
        assert demo.interrupt() == 0, demo.said
    for part in (
        "Ready", "A chat request to smollm2", "[DONE]", "Its way through the stream", "first_token", "completed",
        "Its usage row", "USD", "What to try next",
    ):  # fmt: skip
        assert part in demo.said, (part, demo.said)
    assert "Traceback" not in demo.said
    assert (tmp_path / ".headrace/admin.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.timeout(START_SECONDS + STOP_SECONDS)
@pytest.mark.parametrize("after_s", [0.0, 4.0])
def test_ctrl_c_while_it_starts_leaves_nothing_behind(tmp_path: Path, after_s: float) -> None:
    with terminal(tmp_path, "up", "--port", "0") as up:
        up.read_until("")
        time.sleep(after_s)  # a moment in the middle of a start, whatever it is at: nothing is waited for
        assert up.interrupt() in (0, 130), up.said
    assert "Traceback" not in up.said
