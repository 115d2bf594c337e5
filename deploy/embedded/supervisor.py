"""Keeps the children of a stack alive, and ends them in order. Everything runs in the main thread's event loop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from deploy.embedded.child import Child, ChildSpec
from deploy.embedded.nursery import Nursery, bury_orphans
from deploy.embedded.stack import ChildRecord
from headrace.cancellation import end

_LOG_CHECK_SECONDS = 5.0
_HURRIED_SECONDS = 2.0


class OneShotFailed(Exception):
    """A command that prepares the stack ended with an error; the text has its last lines."""


class Supervisor:
    """Starts children, restarts those that die, and stops them; `changed` is called when any of that happened."""

    def __init__(self, logs: Path, changed: Callable[[], None], report: Callable[[str], None]) -> None:
        self._logs = logs
        self._changed = changed
        self._report = report
        self._children: dict[str, Child] = {}
        self._stopping: set[str] = set()
        self._gone: dict[str, asyncio.Event] = {}
        self._exit_codes: dict[str, int] = {}
        self._one_shots: set[str] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._hurry = asyncio.Event()
        self._log_task: asyncio.Task[None] | None = None
        self._nursery = Nursery(logs / "nursery.log")
        self._reopening: asyncio.Task[bool] | None = None

    def open(self) -> None:
        """Begin to listen for the deaths of children. Call in the event loop of the main thread."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)
        self._log_task = asyncio.create_task(self._trim_logs())

    async def open_nursery(self) -> None:
        """From now on children in Python are forked, where that is possible; see `nursery`."""
        if not await self._nursery.open():
            self._report("roles are started one by one: there is no nursery here, see nursery.log")

    def start(self, spec: ChildSpec) -> None:
        """Start a child that is to live until `stop`."""
        child = Child(spec, self._logs, self._nursery)
        self._children[spec.name] = child
        self._gone[spec.name] = asyncio.Event()
        self._stopping.discard(spec.name)
        self._spawn(child)

    async def run_once(self, spec: ChildSpec) -> None:
        """Run a command to its end. Raises OneShotFailed when its exit code is not 0."""
        self._one_shots.add(spec.name)
        log = self._logs / f"{spec.name}.log"
        log.unlink(missing_ok=True)
        self.start(spec)
        await self._gone[spec.name].wait()
        code = self._exit_codes[spec.name]
        del self._children[spec.name]
        if code != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise OneShotFailed(f"{spec.name} ended with {code}, see {log}:\n{tail}")

    def records(self) -> dict[str, ChildRecord]:
        """All children as the stack's record shows them."""
        return {
            name: ChildRecord(child.pid, child.started_at, child.restarts, str(child.log))
            for name, child in self._children.items()
            if name not in self._one_shots
        }

    def restarts(self, name: str) -> int:
        """How often a child was started again."""
        return self._children[name].restarts if name in self._children else 0

    async def stop(self, names: Iterable[str]) -> None:
        """Ask these children to end, all at once, and wait; kill the ones that take too long."""
        await asyncio.gather(*(self._stop_one(name) for name in names if name in self._children))

    async def close(self) -> None:
        """Kill whatever is left and stop listening."""
        if self._reopening is not None:
            await end(self._reopening)
        self._nursery.close()
        for name, child in self._children.items():
            self._stopping.add(name)
            self._cancel_restart(name)
            child.kill()
        await asyncio.gather(*(gone.wait() for name, gone in self._gone.items() if self._runs(name)))
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        bury_orphans(())
        if self._log_task is not None:
            await end(self._log_task)

    def hurry(self) -> None:
        """From now on nobody waits for work to finish."""
        self._hurry.set()

    def _runs(self, name: str) -> bool:
        return name in self._children and self._children[name].pid is not None

    async def _stop_one(self, name: str) -> None:
        child = self._children[name]
        self._stopping.add(name)
        self._cancel_restart(name)
        if child.pid is None:
            return
        child.terminate()
        gone = asyncio.create_task(self._gone[name].wait())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((gone, hurry), timeout=child.spec.stop_seconds, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not gone.done() and self._hurry.is_set():
            await asyncio.wait((gone,), timeout=_HURRIED_SECONDS)
        if not gone.done():
            self._report(f"{name} did not stop in time and was killed")
            child.kill()
        await gone

    def _spawn(self, child: Child) -> None:
        name = child.spec.name
        self._timers.pop(name, None)
        try:
            child.start()
        except OSError as error:
            if name in self._one_shots:
                raise OneShotFailed(f"{child.spec.argv[0]} cannot be run: {error}") from error
            self._report(f"{name} cannot be started: {error}")
            self._plan_restart(child)
        self._changed()

    def _reap(self) -> None:
        for name, child in list(self._children.items()):
            code = child.reap()
            if code is None:
                continue
            self._exit_codes[name] = code
            if name in self._stopping or name in self._one_shots:
                self._gone[name].set()
            else:
                self._plan_restart(child, code)
            self._changed()
        if self._nursery.ended():
            self._report("the nursery ended; another one is started")
            self._reopening = asyncio.create_task(self._nursery.open())
        bury_orphans({self._nursery.pid, *(child.pid for child in self._children.values())})

    def _plan_restart(self, child: Child, code: int | None = None) -> None:
        name = child.spec.name
        delay = child.backoff.delay(child.lived())
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with {code}"
        self._report(f"{name} {how} after {child.lived():.1f} s; restart in {delay:.1f} s, see {child.log}")
        child.restarts += 1
        self._timers[name] = asyncio.get_running_loop().call_later(delay, self._spawn, child)

    def _cancel_restart(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOG_CHECK_SECONDS)
            for child in self._children.values():
                child.trim_log()
