"""One worker with one device, for tests of the scheduling policy that follow it over time."""

from __future__ import annotations

from typing import Any

import msgspec

from processors.scheduler import messages
from processors.scheduler.policy import step
from processors.scheduler.state import Limits, Pool, Request
from schemas.control import Model
from schemas.events import Device, Priority, Resident, RunningAttempt, WorkerStatus

TERM = 7


class Machine:
    """One worker with one device that obeys at once; what it loads takes `load_ms`."""

    def __init__(self, size: int, models: list[Model], limits: Limits | None = None) -> None:
        self.pool = Pool(term=TERM, limits=limits or Limits())
        self.size = size
        self.now = 0
        self.epoch = 0
        self.resident: dict[str, tuple[int, str, int]] = {}
        self.assigned: list[tuple[int, str]] = []
        self.ended: list[messages.End] = []
        self.loads: list[tuple[int, str]] = []
        self.goes_on: set[str] = set()
        """Requests that it shows as running, and as such that another attempt could go on from them."""
        self.shown_bytes = 0
        """What it measures of each model; 0 when it cannot."""
        self.tell(messages.ModelsChanged({model.id: model for model in models}))
        self.beat()

    def tell(self, event: messages.Event) -> None:
        for action in step(self.pool, event, self.now):
            match action:
                case messages.Grant(worker, boot, model):
                    self.epoch += 1
                    self.tell(messages.LeaseGranted(worker, boot, model, self.epoch))
                case messages.Load(_, _, model, epoch):
                    self.loads.append((self.now, model))
                    self.resident[model] = (epoch, "loading", self.now + self.pool.models[model].load_ms)
                case messages.Unload(_, _, model, _):
                    self.resident.pop(model)
                case messages.Assign(request):
                    self.assigned.append((self.now, request.id))
                case messages.Recover(running):
                    self.goes_on.discard(running.request.id)
                    self.tell(messages.AttemptReady(running.request.id, running.request.attempt + 1))
                case messages.End():
                    self.ended.append(action)

    def beat(self) -> None:
        for model, (epoch, state, until) in self.resident.items():
            if state == "loading" and self.now >= until:
                self.resident[model] = (epoch, "active", until)
        shown = [
            Resident(model, epoch, state, self.shown_bytes, device="d")
            for model, (epoch, state, _) in self.resident.items()
        ]
        running = [RunningAttempt(id, self.pool.running[id].request.attempt, 1, 1, True) for id in self.goes_on]
        self.tell(
            messages.WorkerSeen(
                WorkerStatus(
                    "w1", "b1", "default", TERM, self.now, providers=["p"], resident=shown, running=running,
                    devices=[Device("d", self.size, ["p"])],
                )
            )
        )  # fmt: skip

    def run(self, ms: int) -> None:
        for _ in range(ms // 250):
            self.now += 250
            self.beat()
            self.tell(messages.Tick())

    def ask(self, name: str, model: str, priority: Priority = Priority.STANDARD) -> None:
        self.tell(messages.Arrived(Request(name, "t", model, self.now, self.now + 10**9, priority=priority)))

    def done(self, name: str) -> None:
        self.tell(messages.Finished(name, 1, 1))

    @property
    def held(self) -> set[str]:
        return set(self.resident)


def sized(name: str, size: int, load_ms: int = 1_000, **fields: Any) -> Model:
    """A model of that many bytes which nobody has preloaded."""
    return Model(name, "p", "t", bytes=size, load_ms=load_ms, preload=False, **fields)


def ready(models: dict[str, Model]) -> Pool:
    """A pool with one worker that holds each model."""
    pool = Pool(term=TERM, models=dict(models))
    status = WorkerStatus("w1", "b1", "default", TERM, 0, providers=["p"])
    for action in step(pool, messages.WorkerSeen(status), 0):
        assert isinstance(action, messages.Grant)
        step(pool, messages.LeaseGranted(action.worker, action.boot, action.model, 5), 0)
    status = msgspec.structs.replace(status, resident=[Resident(model, 5, "active") for model in models])
    step(pool, messages.WorkerSeen(status), 0)
    return pool
