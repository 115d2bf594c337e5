"""llama-swap with its default group: `swap: true`, so one model of the group runs at a time.

Follows mostlygeek/llama-swap, internal/router/scheduler/fifo.go:
- A request for the model that runs is served at once; one for the model that is being swapped in joins that swap.
- Any other waits until nothing is in flight on the group, then its model is swapped in: stop, start. Waiting requests
  are looked at in the order of their arrival, and all for the same model come along (A B A B -> A A B B).
- llama-server has `max_concurrency` slots (`--parallel`) and lets more wait. The limit of 10 requests in flight, above
  which llama-swap answers 429, is taken to be configured away.
With several devices there is one group for each, as CUDA_VISIBLE_DEVICES in the models' commands makes it, and the
models are dealt out to them by size. Pinned models are in a group of their own with `persistent: true`: never stopped.
llama-swap knows nothing of memory: a model that does not fit beside those fails to start.
"""

from __future__ import annotations

from bench.scheduler.engine import Device, Engine, Job, Replica, Training
from bench.scheduler.runner import Runner
from bench.scheduler.workload import ModelSpec


class LlamaSwap:
    """One group for each device, and one for each pinned model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._groups: dict[str, _Group] = {}
        """By model."""
        shared = {device.id: _Group(engine, device) for device in engine.devices.values()}
        load = dict.fromkeys(shared, 0)
        for model in sorted(engine.models.values(), key=lambda model: (-model.bytes, model.id)):
            fitting = [device for device in engine.devices.values() if device.bytes >= model.bytes]
            if not fitting:
                continue
            device = min(fitting, key=lambda device: load[device.id] / device.bytes)
            load[device.id] += model.bytes
            self._groups[model.id] = _Group(engine, device) if model.pinned else shared[device.id]

    def on_arrival(self, job: Job) -> None:
        if (group := self._groups.get(job.spec.model)) is None:
            self._engine.end(job, "rejected")
        else:
            group.ask(job)

    def on_finish(self, job: Job) -> None:
        self._groups[job.spec.model].served()

    def on_abandoned(self, job: Job) -> None:
        self._groups[job.spec.model].forget(job)

    def on_loaded(self, replica: Replica) -> None:
        self._groups[replica.model.id].served()

    def on_load_failed(self, replica: Replica) -> None:
        self._groups[replica.model.id].stopped()

    def on_freed(self, replica: Replica) -> None:
        self._groups[replica.model.id].stopped()

    def on_training(self, job: Training) -> None:
        self._engine.reserve(job)

    def on_training_left(self, job: Training) -> None:
        """Nobody waits for memory: what does not fit has failed."""

    def on_lost(self, device: Device, lost: list[Job]) -> None:
        """What ran is not tried again."""
        for job in lost:
            self._engine.end(job, "failed")
        for group in dict.fromkeys(self._groups.values()):
            if group.device is device:
                group.stopped()

    def on_back(self, device: Device) -> None:
        for group in dict.fromkeys(self._groups.values()):
            group.drain()


class _Group:
    """Models of which one runs at a time, on one device."""

    def __init__(self, engine: Engine, device: Device) -> None:
        self.device = device
        self._engine = engine
        self._runner: Runner | None = None
        """What runs or starts."""
        self._next: ModelSpec | None = None
        """What is to start when the runner has stopped."""
        self._joined: list[Job] = []
        """Requests for that."""
        self._queued: list[Job] = []

    def ask(self, job: Job) -> None:
        """Decide on a request; it may have waited."""
        model = self._engine.models[job.spec.model]
        if self._next is not None:
            (self._joined if self._next is model else self._queued).append(job)
        elif self._runner is not None and self._runner.replica.model is model:
            self._runner.give(job)
        elif not self.device.up or (self._runner is not None and not (self._runner.idle and self._runner.active)):
            self._queued.append(job)
        else:
            self._joined.append(job)
            self._next = model
            if self._runner is None:
                self._start()
            else:
                self._engine.unload(self._runner.replica)

    def _start(self) -> None:
        """Start the process that the swap is for; those that joined it go with it."""
        joined, self._joined = self._joined, []
        model, self._next = self._next, None
        if model is None or not joined:
            return
        if model.bytes > self.device.free:
            for job in joined:
                self._engine.end(job, "failed")
            return
        self._runner = Runner(self._engine, self._engine.load(model, self.device))
        for job in joined:
            self._runner.give(job)

    def served(self) -> None:
        """The runner has a free slot."""
        if self._runner is not None:
            self._runner.advance()
        self.drain()

    def stopped(self) -> None:
        """The runner is gone, as it was told or by a fault."""
        if self._runner is not None:
            self._runner.fail()
        self._runner = None
        if self.device.up:
            self._start()
        else:
            self._queued = self._joined + self._queued
            self._joined, self._next = [], None
        self.drain()

    def drain(self) -> None:
        """Decide again on all that wait, in order."""
        waiting, self._queued = self._queued, []
        for job in waiting:
            self.ask(job)

    def forget(self, job: Job) -> None:
        """The caller of a request that waits has left."""
        for waiting in (self._queued, self._joined):
            if job in waiting:
                waiting.remove(job)
        if self._runner is not None:
            self._runner.forget(job)
            if self._runner.idle:
                self.drain()
