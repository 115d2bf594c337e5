"""Work that may block for long, off the event loop and one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import structlog

log = structlog.get_logger(__name__)
T = TypeVar("T")


class Single(Generic[T]):
    """Runs one kind of work off the event loop, one at a time: while it hangs, no second thread is started.

    Its threads are daemons of its own and not `asyncio.to_thread`'s: a pool's threads are waited for when the process
    ends, and a driver that hangs would keep a worker from ever stopping.
    """

    def __init__(self, what: str) -> None:
        self.last: T | None = None
        """The last result that came."""
        self._what = what
        self._flight: asyncio.Future[T] | None = None
        self._late = False

    async def latest(self, work: Callable[[], T], patience_s: float) -> tuple[T, bool] | None:
        """The work's result, and whether it is fresh, that is whether the work began after this call.

        After `patience_s` seconds it is the last one that came, not fresh; None when none has come yet. Raises what the
        work raises.
        """
        deadline = asyncio.get_running_loop().time() + patience_s
        while True:
            joined = self._flight is not None
            flight = self._flight or self._start(work)
            try:
                async with asyncio.timeout_at(deadline):
                    result = await asyncio.shield(flight)
            except TimeoutError:
                self._note(late=True)
                return None if self.last is None else (self.last, False)
            if not joined:
                self._note(late=False)
                return result, True

    def _start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        flight = self._flight = loop.create_future()

        def run() -> None:
            try:
                land = partial(self._succeed, flight, work())
            except Exception as error:
                land = partial(self._fail, flight, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(land)

        threading.Thread(target=run, name=f"read-{self._what}", daemon=True).start()
        return flight

    def _succeed(self, flight: asyncio.Future[T], result: T) -> None:
        self._flight, self.last = None, result
        flight.set_result(result)

    def _fail(self, flight: asyncio.Future[T], error: Exception) -> None:
        self._flight = None
        flight.set_exception(error)

    def _note(self, *, late: bool) -> None:
        if late and not self._late:
            log.warning("device_reading_late", what=self._what)
        elif self._late and not late:
            log.info("device_reading_in_time", what=self._what)
        self._late = late
