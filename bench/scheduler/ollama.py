"""Ollama's scheduler, as its server/sched.go and its FAQ describe it.

One queue, first in first out, of 512 requests (OLLAMA_MAX_QUEUE; more get a 503), handled by a single loop:
- A request whose model is loaded goes to its runner, which has as many slots as the model's `max_concurrency`
  (OLLAMA_NUM_PARALLEL) and lets more wait. The loop waits for a runner that is still loading: the load holds its lock.
- Otherwise the model is loaded on the device with the most free memory among those that load nothing, if its predicted
  size is not more than what is free there and fewer than 3 models per device are loaded (OLLAMA_MAX_LOADED_MODELS).
- If it fits nowhere while something is loading, the request goes to the back of the queue 250 ms later.
- Else one runner is evicted, and again until it fits: an idle one if there is any, by shortest keep-alive (5 min for
  all but pinned models, whose keep-alive is endless). If all are in use the loop waits for one to become idle; all that
  waits for the head waits for that too, also requests for models that are loaded (ollama#15126).
Among equals Ollama takes any runner; here it is the least recently used, which is better. The share of free memory that
newer versions want to stay free (20 %) is left out, which is better, too. An idle runner is unloaded after 5 minutes.

Versions since the end of 2025 hand a request for a loaded model to its runner at once, past the queue (`getRunner`),
also while it is to be evicted (ollama#17408): that is `fast_path`.
"""

from __future__ import annotations

from collections import deque
from functools import partial

from bench.scheduler.engine import Device, Engine, Job, Replica, Training
from bench.scheduler.runner import Runner
from bench.scheduler.workload import ModelSpec

MAX_QUEUE = 512
MODELS_PER_DEVICE = 3
KEEP_ALIVE_MS = 300_000
RESCHEDULE_MS = 250


class Ollama:
    """A single queue whose head holds up the rest."""

    def __init__(self, engine: Engine, *, fast_path: bool = False) -> None:
        self._engine = engine
        self._fast_path = fast_path
        self._pending: deque[Job] = deque()
        self._runners: dict[str, Runner] = {}
        """By model, from the order to load until the memory is free."""
        self._victim: Runner | None = None
        """The head of the queue waits for its end."""

    def on_arrival(self, job: Job) -> None:
        runner = self._runners.get(job.spec.model)
        if not self._engine.fits_somewhere(self._engine.models[job.spec.model]):
            self._engine.end(job, "rejected")
        elif self._fast_path and runner is not None and (runner.active or runner.loading):
            runner.give(job)
        elif len(self._pending) > MAX_QUEUE:
            # The head is in the hands of the loop.
            self._engine.end(job, "rejected")
        else:
            self._pending.append(job)
            self._pump()

    def _pump(self) -> None:
        """Handle the head of the queue, until one has to wait."""
        while self._pending and self._victim is None:
            job = self._pending[0]
            model = self._engine.models[job.spec.model]
            runner = self._runners.get(model.id)
            if runner is not None:
                if not runner.active:
                    return
                runner.give(self._pending.popleft())
            elif len(self._runners) >= MODELS_PER_DEVICE * len(self._engine.devices):
                if not self._evict():
                    return
            elif (device := self._place(model)) is not None:
                runner = self._runners[model.id] = Runner(self._engine, self._engine.load(model, device))
                runner.give(self._pending.popleft())
            elif any(device.loads for device in self._engine.devices.values()):
                self._engine.after(RESCHEDULE_MS, partial(self._again, self._pending.popleft()))
            elif not self._evict():
                return

    def _place(self, model: ModelSpec) -> Device | None:
        quiet = [one for one in self._engine.devices.values() if not one.loads and one.free >= model.bytes]
        return max(quiet, key=lambda device: device.free, default=None)

    def _again(self, job: Job) -> None:
        if job.open:
            self._pending.append(job)
            self._pump()

    def _evict(self) -> bool:
        """Choose who gives way to the head of the queue; False when nothing is loaded at all."""
        candidates = [runner for runner in self._runners.values() if runner.active]
        if not candidates:
            return False
        self._victim = min(candidates, key=lambda one: (not one.idle, one.replica.model.pinned, one.replica.used_ms))
        self._unload_victim()
        return True

    def _unload_victim(self) -> None:
        if self._victim is not None and self._victim.active and self._victim.idle:
            self._engine.unload(self._victim.replica)

    def on_finish(self, job: Job) -> None:
        runner = self._runners[job.spec.model]
        runner.advance()
        if runner.idle and not runner.replica.model.pinned:
            self._engine.after(KEEP_ALIVE_MS, partial(self._expire, runner, runner.replica.used_ms))
        self._unload_victim()
        self._pump()

    def _expire(self, runner: Runner, used_ms: int) -> None:
        if runner.active and runner.idle and runner.replica.used_ms == used_ms:
            self._engine.unload(runner.replica)

    def on_abandoned(self, job: Job) -> None:
        if job in self._pending:
            self._pending.remove(job)
        elif (runner := self._runners.get(job.spec.model)) is not None:
            runner.forget(job)
        self._unload_victim()
        self._pump()

    def on_loaded(self, replica: Replica) -> None:
        self._runners[replica.model.id].advance()
        self._pump()

    def on_load_failed(self, replica: Replica) -> None:
        self._remove(replica.model.id)
        self._pump()

    def on_freed(self, replica: Replica) -> None:
        self._remove(replica.model.id)
        self._pump()

    def _remove(self, model: str) -> None:
        runner = self._runners.pop(model)
        runner.fail()
        if runner is self._victim:
            self._victim = None

    def on_training(self, job: Training) -> None:
        self._engine.reserve(job)

    def on_training_left(self, job: Training) -> None:
        self._pump()

    def on_lost(self, device: Device, lost: list[Job]) -> None:
        """What a dead runner had is not tried again."""
        for job in lost:
            self._engine.end(job, "failed")
        for model in [model for model, runner in self._runners.items() if runner.replica.device is device]:
            self._remove(model)
        self._pump()

    def on_back(self, device: Device) -> None:
        self._pump()
