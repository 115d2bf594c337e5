"""The machine room under every policy: devices, memory, loads, streams and faults, as discrete events.

A load takes its model's `load_s` on its device, one after another there; streams of other models go on meanwhile. A
request is prefilled, then decoded, at its model's rates. Nothing here decides: policies call `load`, `unload`, `start`,
`stop`, `requeue` and `end`, and are told what came of it by events of their own, never from inside a call. Times are
whole milliseconds from the beginning of the workload.

Training jobs hold memory from `train` until they are done or, told to `yield_training`, have written their checkpoint.
Policies that know nothing of training `reserve` memory for a job, as an operator does who starts it beside the server:
it begins where memory is free that nobody else takes, and keeps it until it is done.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from itertools import count
from typing import Protocol

from bench.scheduler.workload import Arrival, Fault, ModelSpec, TrainingSpec, Workload

UNLOAD_MS = 200
"""From the order to unload until the memory is free. Ollama waits 0.5-1.5 s for it on CUDA (its server/sched.go)."""
PATIENCE = 3
"""A caller whose request still waits after this many times its SLO leaves."""


class State(Enum):
    """Of a replica."""

    LOADING = auto()
    ACTIVE = auto()
    UNLOADING = auto()
    GONE = auto()


class Job:
    """A request on its way; times are None until they come."""

    __slots__ = (
        "arrived_ms",
        "finished_ms",
        "first_ms",
        "outcome",
        "replica",
        "run",
        "served_by",
        "spec",
        "started_ms",
    )

    def __init__(self, spec: Arrival) -> None:
        self.spec = spec
        self.arrived_ms = round(spec.t * 1000)
        self.started_ms: int | None = None
        self.first_ms: int | None = None
        self.finished_ms: int | None = None
        self.outcome = ""
        """Empty while it is open; then `finished`, `rejected`, `expired`, `abandoned` or `failed`."""
        self.replica: Replica | None = None
        """Where it runs now."""
        self.served_by = ""
        """The last device that it ran on."""
        self.run = 0
        """Counts its starts and stops, so that events of an earlier run are known as such."""

    @property
    def open(self) -> bool:
        """Whether it has no outcome yet."""
        return not self.outcome

    @property
    def leaves_ms(self) -> int:
        """When its caller leaves, if it still waits."""
        return self.arrived_ms + round(PATIENCE * self.spec.slo_s * 1000)


class Replica:
    """A model on a device, from the order to load it until its memory is free."""

    __slots__ = ("device", "model", "running", "state", "used_ms")

    def __init__(self, model: ModelSpec, device: Device, now_ms: int) -> None:
        self.model = model
        self.device = device
        self.state = State.LOADING
        self.running: dict[str, Job] = {}
        self.used_ms = now_ms
        """When a request was last started or done on it."""

    @property
    def has_slot(self) -> bool:
        """Whether a request could start now."""
        return self.state is State.ACTIVE and len(self.running) < self.model.max_concurrency


class Training:
    """A training job on its way."""

    __slots__ = ("began_ms", "begun", "device", "leaving", "reserves", "saved_ms", "spec")

    def __init__(self, spec: TrainingSpec) -> None:
        self.spec = spec
        self.device: Device | None = None
        """Where it holds memory."""
        self.leaving = False
        """Whether it writes its checkpoint."""
        self.reserves = False
        """Whether it begins by itself, where memory is free."""
        self.began_ms = 0
        self.saved_ms = 0
        """Work that is done and will not be lost."""
        self.begun = 0
        """How often it began; events of an earlier run are known by it."""

    @property
    def left_ms(self) -> int:
        """Work that is to be done; 0 when it is done."""
        return round(self.spec.seconds * 1000) - self.saved_ms

    def trained_ms(self, now_ms: int) -> int:
        """Work that is done, also what is not saved."""
        return self.saved_ms + (now_ms - self.began_ms if self.device is not None and not self.leaving else 0)


class Device:
    """Memory, and one load at a time."""

    __slots__ = ("bytes", "fail_next", "held", "id", "loads", "replicas", "up")

    def __init__(self, id: str, size: int) -> None:
        self.id = id
        self.bytes = size
        self.up = True
        self.replicas: dict[str, Replica] = {}
        self.loads: deque[Replica] = deque()
        """The load that goes on, then those ordered after it."""
        self.held = 0
        self.fail_next = False

    @property
    def free(self) -> int:
        """Bytes that nothing holds; none on a device that is lost."""
        return self.bytes - self.held if self.up else 0


class Policy(Protocol):
    """What decides. Each call is an event of its own; the engine's clock stands at it."""

    def on_arrival(self, job: Job) -> None:
        """A request came."""

    def on_finish(self, job: Job) -> None:
        """A request that ran is complete; its slot is free."""

    def on_abandoned(self, job: Job) -> None:
        """The caller of a request that waited has left."""

    def on_loaded(self, replica: Replica) -> None:
        """A model may be used."""

    def on_load_failed(self, replica: Replica) -> None:
        """A load failed; its memory is free."""

    def on_freed(self, replica: Replica) -> None:
        """An unloaded model's memory is free."""

    def on_training(self, job: Training) -> None:
        """A training job is there."""

    def on_training_left(self, job: Training) -> None:
        """A training job is done, or has left as it was told; its memory is free."""

    def on_lost(self, device: Device, lost: list[Job]) -> None:
        """A device is gone with all it held; `lost` ran there and is open."""

    def on_back(self, device: Device) -> None:
        """A device is there again, empty."""


class Engine:
    """The event loop and the state of everything that policies share."""

    def __init__(
        self, workload: Workload, policy: Callable[[Engine], Policy], *, seed: int = 0, load_jitter: float = 0.0
    ) -> None:
        """`load_jitter`: each load takes up to this share longer than expected, at random under `seed`."""
        self.now_ms = 0
        self.workload = workload
        self.devices = {spec.id: Device(spec.id, spec.bytes) for spec in workload.devices}
        self.models = {spec.id: spec for spec in workload.models}
        self.jobs = {spec.id: Job(spec) for spec in workload.arrivals}
        self.trainings = {spec.id: Training(spec) for spec in workload.training}
        self.loads = 0
        self.swaps = 0
        self.loading_ms = 0
        self._random = random.Random(seed)
        self._load_jitter = load_jitter
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._open = len(self.jobs)
        # The policy first: what it wants done at time 0 comes before the first arrival.
        self._policy = policy(self)
        for job in sorted(self.jobs.values(), key=lambda job: job.arrived_ms):
            self._at(job.arrived_ms, partial(self._arrive, job))
        for training in self.trainings.values():
            self._at(round(training.spec.t * 1000), partial(self._policy.on_training, training))
        for fault in workload.faults:
            self._at(round(fault.t * 1000), partial(self._strike, fault))

    def run(self) -> None:
        """Let time pass until every request has its outcome."""
        while self._open:
            self.now_ms, _, event = heapq.heappop(self._heap)
            event()
            self._begin_reserved()

    def after(self, delay_ms: int, event: Callable[[], None]) -> None:
        """Call `event` so much later."""
        self._at(self.now_ms + delay_ms, event)

    def _at(self, when_ms: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when_ms, next(self._order), event))

    # --- memory ---------------------------------------------------------------------------------------------------

    def fits_somewhere(self, model: ModelSpec) -> bool:
        """Whether a device could hold the model alone."""
        return any(model.bytes <= device.bytes for device in self.devices.values())

    def load(self, model: ModelSpec, device: Device) -> Replica:
        """Order a load; the bytes are held from now on. The device must be up, have them, and not hold the model."""
        assert device.up and model.id not in device.replicas, f"{model.id} cannot be loaded on {device.id}"
        assert model.bytes <= device.free, f"{device.id} is oversold: {model.bytes} bytes of {device.free}"
        replica = device.replicas[model.id] = Replica(model, device, self.now_ms)
        device.held += model.bytes
        device.loads.append(replica)
        self.loads += 1
        if len(device.loads) == 1:
            self._begin_load(replica)
        return replica

    def _begin_load(self, replica: Replica) -> None:
        took = round(replica.model.load_s * 1000 * (1 + self._random.uniform(0, self._load_jitter)))
        self.after(took, partial(self._end_load, replica, took))

    def _end_load(self, replica: Replica, took: int) -> None:
        device = replica.device
        if replica.state is State.GONE:
            return
        self.loading_ms += took
        device.loads.popleft()
        if device.loads:
            self._begin_load(device.loads[0])
        if device.fail_next:
            device.fail_next = False
            self._drop(replica)
            self._policy.on_load_failed(replica)
            return
        replica.state, replica.used_ms = State.ACTIVE, self.now_ms
        self._policy.on_loaded(replica)

    def unload(self, replica: Replica) -> None:
        """Order an unload of what is loaded and not used; `on_freed` comes when the bytes are free."""
        assert replica.state is State.ACTIVE and not replica.running, f"{replica.model.id} is in use"
        replica.state = State.UNLOADING
        self.swaps += 1
        self.after(UNLOAD_MS, partial(self._freed, replica))

    def _freed(self, replica: Replica) -> None:
        if replica.state is not State.GONE:
            self._drop(replica)
            self._policy.on_freed(replica)

    def _drop(self, replica: Replica) -> None:
        replica.state = State.GONE
        del replica.device.replicas[replica.model.id]
        replica.device.held -= replica.model.bytes

    # --- training -------------------------------------------------------------------------------------------------

    def train(self, job: Training, device: Device) -> None:
        """Begin a job, or go on with it; the bytes are held from now on. The device must be up and have them."""
        size = job.spec.bytes
        assert job.device is None and job.left_ms, f"{job.spec.id} trains already, or is done"
        assert device.up and size <= device.free, f"{device.id} is oversold: {size} bytes of {device.free}"
        device.held += size
        job.device, job.leaving, job.began_ms = device, False, self.now_ms
        job.begun += 1
        self.after(job.left_ms, partial(self._trained, job, job.begun))

    def yield_training(self, job: Training) -> None:
        """Have a job that trains write its checkpoint and leave; `on_training_left` comes when it has."""
        assert job.device is not None and not job.leaving, f"{job.spec.id} does not train"
        job.saved_ms, job.leaving = job.trained_ms(self.now_ms), True
        self.after(round(job.spec.notice_s * 1000), partial(self._training_left, job, job.begun))

    def reserve(self, job: Training) -> None:
        """Begin a job as soon as memory is free, and let it keep that until it is done."""
        job.reserves = True

    def _begin_reserved(self) -> None:
        for job in self.trainings.values():
            roomy = max(self.devices.values(), key=lambda device: device.free)
            if job.reserves and job.device is None and job.left_ms and roomy.free >= job.spec.bytes:
                self.train(job, roomy)

    def _trained(self, job: Training, begun: int) -> None:
        if job.begun == begun and not job.leaving:
            job.saved_ms = job.trained_ms(self.now_ms)
            self._training_left(job, begun)

    def _training_left(self, job: Training, begun: int) -> None:
        if job.begun == begun and job.device is not None:
            self._stop_training(job)
            self._policy.on_training_left(job)

    def _stop_training(self, job: Training) -> None:
        assert job.device is not None
        job.device.held -= job.spec.bytes
        job.device, job.leaving = None, False

    # --- requests -------------------------------------------------------------------------------------------------

    def start(self, job: Job, replica: Replica) -> None:
        """Run a waiting request on a replica that has a slot for it."""
        assert job.open and job.replica is None and replica.has_slot, f"{job.spec.id} cannot start"
        job.replica, job.started_ms, job.served_by = replica, self.now_ms, replica.device.id
        job.run += 1
        replica.running[job.spec.id] = job
        replica.used_ms = self.now_ms
        prefill = math.ceil(1000 * job.spec.prompt_tokens / replica.model.prefill_tokens_s)
        self.after(prefill, partial(self._first_token, job, job.run))

    def _first_token(self, job: Job, run: int) -> None:
        if job.run != run or job.replica is None:
            return
        job.first_ms = self.now_ms
        decode = math.ceil(1000 * job.spec.output_tokens / job.replica.model.decode_tokens_s)
        self.after(decode, partial(self._finish, job, run))

    def _finish(self, job: Job, run: int) -> None:
        if job.run != run or job.replica is None:
            return
        self.stop(job, "finished")
        self._policy.on_finish(job)

    def tokens(self, job: Job) -> int:
        """Completion tokens so far."""
        if job.first_ms is None:
            return 0
        until = self.now_ms if job.finished_ms is None else job.finished_ms
        rate = self.models[job.spec.model].decode_tokens_s
        return min(job.spec.output_tokens, math.floor((until - job.first_ms) * rate / 1000))

    def stop(self, job: Job, outcome: str) -> None:
        """End a request that runs; its slot is free."""
        self._detach(job)
        self.end(job, outcome)

    def _detach(self, job: Job) -> None:
        if job.replica is not None:
            del job.replica.running[job.spec.id]
            job.replica.used_ms = self.now_ms
            job.replica = None
        job.run += 1

    def end(self, job: Job, outcome: str) -> None:
        """Give a request that does not run its outcome."""
        assert job.open and job.replica is None, f"{job.spec.id} has ended or runs"
        job.outcome = outcome
        job.finished_ms = self.now_ms
        self._open -= 1

    def requeue(self, job: Job) -> None:
        """Let a request that was lost before its first token wait again; its caller's patience is not longer for it."""
        job.started_ms = None
        self._at(max(self.now_ms, job.leaves_ms), partial(self._lose_patience, job))

    # --- what comes from outside ------------------------------------------------------------------------------------

    def _arrive(self, job: Job) -> None:
        self._at(job.leaves_ms, partial(self._lose_patience, job))
        self._policy.on_arrival(job)

    def _lose_patience(self, job: Job) -> None:
        if job.open and job.replica is None and job.first_ms is None:
            self.end(job, "abandoned")
            self._policy.on_abandoned(job)

    def _strike(self, fault: Fault) -> None:
        device = self.devices[fault.device]
        if fault.kind == "load_fails":
            device.fail_next = True
        elif fault.kind == "worker_back" and not device.up:
            device.up = True
            self._policy.on_back(device)
        elif fault.kind == "worker_lost" and device.up:
            lost = [job for replica in device.replicas.values() for job in replica.running.values()]
            for job in lost:
                self._detach(job)
            for replica in list(device.replicas.values()):
                self._drop(replica)
            device.loads.clear()
            for training in self.trainings.values():
                if training.device is device:
                    self._stop_training(training)
            device.up = device.fail_next = False
            self._policy.on_lost(device, lost)
