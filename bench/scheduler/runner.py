"""An inference process with slots and a queue of its own, as llama-server and Ollama's runner have."""

from __future__ import annotations

from collections import deque

from bench.scheduler.engine import Engine, Job, Replica, State


class Runner:
    """A replica and the requests that were handed to it; those beyond its slots wait there, first come first served."""

    def __init__(self, engine: Engine, replica: Replica) -> None:
        self.replica = replica
        self._engine = engine
        self._waiting: deque[Job] = deque()

    @property
    def idle(self) -> bool:
        """Whether nothing was handed to it that is not done."""
        return not self.replica.running and not self._waiting

    @property
    def active(self) -> bool:
        """Whether it is loaded and not being unloaded."""
        return self.replica.state is State.ACTIVE

    @property
    def loading(self) -> bool:
        """Whether it is yet to be loaded."""
        return self.replica.state is State.LOADING

    def give(self, job: Job) -> None:
        """Hand it a request."""
        self._waiting.append(job)
        self.advance()

    def advance(self) -> None:
        """Start what waits, as far as there are slots."""
        while self._waiting and self.replica.has_slot:
            self._engine.start(self._waiting.popleft(), self.replica)

    def forget(self, job: Job) -> None:
        """The caller of a request that may wait here has left."""
        if job in self._waiting:
            self._waiting.remove(job)

    def fail(self) -> None:
        """The process is gone, and the connections of all that waited in it."""
        while self._waiting:
            self._engine.end(self._waiting.popleft(), "failed")
