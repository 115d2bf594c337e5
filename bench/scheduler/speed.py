"""How fast the policy steps with a long queue and many models: wall time of `step` alone."""

from __future__ import annotations

import time
from itertools import count

import msgspec

from bench.scheduler.catalogue import CARD_BYTES, most_popular
from bench.scheduler.headrace import PROVIDER, as_model
from processors.scheduler.messages import (
    Arrived,
    Assign,
    Event,
    Finished,
    Grant,
    LeaseGranted,
    Load,
    Tick,
    Unload,
    WorkerSeen,
)
from processors.scheduler.policy import step
from processors.scheduler.state import Pool, Request
from schemas.events import Device, Resident, WorkerStatus

WORKERS = 4
MODELS = 30
QUEUED = 1_000
ROUNDS = 1_000
HEARTBEAT_EVERY = 10
"""Rounds of an arrival and an end between two heartbeats, and between two ticks."""
TERM = 1
HOUR_MS = 3_600_000


class Speed(msgspec.Struct):
    """Steps for one kind of event, and the wall time that they took."""

    event: str
    steps: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Steps per second."""
        return self.steps / self.seconds


class _Driver:
    """A pool whose workers load at once, and whose requests end when the driver says so."""

    def __init__(self) -> None:
        models = [as_model(spec) for spec in most_popular(MODELS)]
        self.pool = Pool(term=TERM, models={model.id: model for model in models})
        self.names = [model.id for model in models]
        self.now_ms = 0
        self.running: list[str] = []
        self.speeds: dict[str, Speed] = {}
        self._resident: dict[str, dict[str, Resident]] = {f"gpu{at}": {} for at in range(WORKERS)}
        self._ids = count()
        self._epochs = count(1)

    def tell(self, event: Event) -> None:
        """One timed step, and those that its actions lead to."""
        began = time.perf_counter()
        actions = step(self.pool, event, self.now_ms)
        took = time.perf_counter() - began
        name = type(event).__name__
        speed = self.speeds.setdefault(name, Speed(name))
        speed.steps += 1
        speed.seconds += took
        for action in actions:
            match action:
                case Grant(worker, boot, model):
                    self.tell(LeaseGranted(worker, boot, model, next(self._epochs)))
                case Load(worker, _, model, epoch, device):
                    self._resident[worker][model] = Resident(model, epoch, "active", device=device)
                case Unload(worker, _, model, _):
                    del self._resident[worker][model]
                case Assign(request):
                    self.running.append(request.id)
                case _:
                    pass

    def heartbeat(self, worker: str) -> None:
        """A worker reports what it holds; what it runs is not shown, as it costs the same for any policy."""
        resident = list(self._resident[worker].values())
        status = WorkerStatus(
            worker,
            "1",
            "speed",
            TERM,
            self.now_ms,
            [PROVIDER],
            resident,
            devices=[Device(worker, CARD_BYTES, [PROVIDER])],
        )
        self.tell(WorkerSeen(status))

    def arrive(self) -> None:
        """A request comes, for the models and tenants in turn."""
        number = next(self._ids)
        model = self.names[number % len(self.names)]
        deadline = self.now_ms + HOUR_MS
        tenant = f"tenant{number % 7}"
        self.tell(Arrived(Request(f"r{number}", tenant, model, self.now_ms, deadline, prompt_tokens=1000)))

    def finish(self) -> None:
        """The request that runs for longest ends."""
        if self.running:
            self.tell(Finished(self.running.pop(0), 1000, 100))


def measure() -> list[Speed]:
    """Fill a pool, then time its steps; the last entry is the whole mix."""
    driver = _Driver()
    for at in range(WORKERS):
        driver.heartbeat(f"gpu{at}")
    while driver.pool.queued < QUEUED:
        driver.arrive()
    driver.speeds.clear()
    for number in range(ROUNDS):
        driver.now_ms += 25
        driver.arrive()
        while driver.pool.queued > QUEUED and driver.running:
            driver.finish()
        if number % HEARTBEAT_EVERY == 0:
            driver.heartbeat(f"gpu{number // HEARTBEAT_EVERY % WORKERS}")
            driver.tell(Tick())
    speeds = sorted(driver.speeds.values(), key=lambda one: one.event)
    total = Speed("all", sum(one.steps for one in speeds), sum(one.seconds for one in speeds))
    return [*speeds, total]
