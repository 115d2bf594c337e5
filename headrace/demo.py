"""The demo: a stack of its own (or the one that runs already), and a tour of what one request does in it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.status import Status

from deploy.embedded import infra, kafka, launch, ports, roles, stack
from headrace.config import find_config
from headrace.demo_tour import Tour, TourFailed
from headrace.settings import settings

_HOST = "127.0.0.1"


def run(data_dir: Path, port: int, *, keep: bool) -> int:
    """Show the demo and return the exit code of the command."""
    console = Console(highlight=False, soft_wrap=True)
    running = stack.discover(data_dir)
    if running is not None and running.ready:
        console.print(f"A stack is running in {data_dir} already: the demo uses it, and leaves it running.")
        return _tour(console, running, stays=True)
    return _Demo(console, data_dir, port, keep=keep).run()


def _tour(console: Console, running: stack.Endpoints, *, stays: bool) -> int:
    try:
        Tour(console, running).run(stays=stays)
    except TourFailed as error:
        console.print(f"[red]failed:[/] {error}")
        console.print(f"The logs of all processes are in {Path(running.data_dir) / 'logs'}.")
        return 1
    return 0


class _Demo:
    """The stack runs in this thread, which is the main one; the tour in another, begun when the stack is ready."""

    def __init__(self, console: Console, data_dir: Path, port: int, *, keep: bool) -> None:
        self._console = console
        self._data = data_dir
        self._port = port
        self._keep = keep
        self._code = 1
        self._began = time.monotonic()
        self._status: Status | None = None

    def run(self) -> int:
        """Start, show, stop; the exit code is 0 when all of it went well."""
        if not self._keep:
            kafka.live_shortly()
        port = self._port
        if port and not ports.is_free(_HOST, port):
            self._console.print(f"Port {port} is in use; a free one is taken.")
            port = 0
        known = settings()
        options = launch.StackOptions(
            data_dir=self._data,
            host=_HOST,
            port=port,
            config=find_config(None, known.config),
            replicas=roles.parse_replicas([]),
            admin_key=known.admin_key.get_secret_value() if known.admin_key else None,
            drain_seconds=2.0,
        )
        self._console.print(
            f"[bold]Starting[/] Apache Kafka, Valkey, ClickHouse's engine, eight roles and a model in {self._data} …"
        )
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()
        try:
            launch.serve(options, ready=self._ready, report=self._report)
        except (infra.StartFailed, stack.StackRunning, ports.NoFreePort) as error:
            self._end_status()
            self._console.print(f"[red]failed:[/] {error}", markup=True)
            self._console.print(f"The logs of all processes are in {self._data / 'logs'}; `headrace doctor` may know.")
            return 1
        finally:
            self._end_status()
        return self._code

    def _report(self, line: str) -> None:
        if "admin key" in line:
            return  # its place is in the commands that the tour ends with
        if self._status is not None:
            self._console.print(f"  [dim]{line}[/]")
            self._status.update("starting" if self._code else "stopping")
        else:
            self._console.print(f"  {line}", markup=False)

    def _ready(self, url: str) -> None:
        self._end_status()
        self._console.print(f"[bold]Ready[/] at {url} after {time.monotonic() - self._began:.1f} s.")
        threading.Thread(target=self._show, name="demo", daemon=True).start()

    def _show(self) -> None:
        try:
            running = stack.discover(self._data)
            if running is None:
                return
            self._code = _tour(self._console, running, stays=self._keep)
            if self._keep and self._code == 0:
                self._console.print("The stack stays up until Ctrl-C.")
                return
            self._console.print(f"Stopping, {time.monotonic() - self._began:.1f} s after the start …")
        finally:
            sys.stdout.flush()
            if not (self._keep and self._code == 0):
                os.kill(os.getpid(), signal.SIGTERM)

    def _end_status(self) -> None:
        status, self._status = self._status, None
        if status is not None:
            with suppress(Exception):
                status.stop()
