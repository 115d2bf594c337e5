"""The plain good design: a queue for each model, load on demand, evict the least recently used.

Follows what model servers with a bounded cache do (llama.cpp's router with `--models-max`, llama.cpp#26572; Triton and
KServe ModelMesh by size in bytes): no request waits for one of another model; models are loaded at once on different
devices; a model that has waited longest goes first; the least recently used idle models of one device give way until
it fits; models in use or pinned never do, so it waits while all are. The tightest free place is taken. A request that
had no token when its device was lost waits again, which none of those do.
"""

from __future__ import annotations

from collections import deque

from bench.scheduler.engine import Device, Engine, Job, Replica, State, Training
from bench.scheduler.workload import ModelSpec


class Lru:
    """Queues by model over a least recently used cache of models."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queues: dict[str, deque[Job]] = {model: deque() for model in engine.models}
        self._held: dict[str, Replica] = {}
        """Models that are loaded or loading."""
        self._claims: dict[str, Device] = {}
        """Models that others are being unloaded for, and where."""

    def on_arrival(self, job: Job) -> None:
        if not self._engine.fits_somewhere(self._engine.models[job.spec.model]):
            self._engine.end(job, "rejected")
            return
        self._queues[job.spec.model].append(job)
        self._serve(job.spec.model)
        self._place()

    def _serve(self, model: str) -> None:
        replica, queue = self._held.get(model), self._queues[model]
        while replica is not None and queue and replica.has_slot:
            self._engine.start(queue.popleft(), replica)

    def _place(self) -> None:
        """Find memory for what waits and is not held, longest wait first."""
        wanted = [queue[0] for model, queue in self._queues.items() if queue and model not in self._held]
        for job in sorted(wanted, key=lambda job: job.arrived_ms):
            model = self._engine.models[job.spec.model]
            claimed = self._claims.pop(model.id, None)
            device = self._room(model)
            if device is not None:
                self._held[model.id] = self._engine.load(model, device)
            elif claimed is not None:
                self._claims[model.id] = claimed
            else:
                self._evict(model)

    def _unclaimed(self, device: Device) -> int:
        return device.free - sum(self._engine.models[model].bytes for model, at in self._claims.items() if at is device)

    def _room(self, model: ModelSpec) -> Device | None:
        fitting = [device for device in self._engine.devices.values() if self._unclaimed(device) >= model.bytes]
        return min(fitting, key=lambda device: (len(device.loads), self._unclaimed(device)), default=None)

    def _evict(self, model: ModelSpec) -> None:
        """Unload on the device whose victims were used longest ago; nothing where idle models do not suffice."""
        options = [
            (victims[-1].used_ms, device, victims)
            for device in self._engine.devices.values()
            if (victims := self._victims(model, device))
        ]
        if not options:
            return
        _, device, victims = min(options, key=lambda option: (option[0], option[1].id))
        self._claims[model.id] = device
        for replica in victims:
            del self._held[replica.model.id]
            self._engine.unload(replica)

    def _victims(self, model: ModelSpec, device: Device) -> list[Replica]:
        missing = model.bytes - self._unclaimed(device)
        idle = [one for one in device.replicas.values() if one.state is State.ACTIVE and not one.running]
        chosen: list[Replica] = []
        for replica in sorted((one for one in idle if not one.model.pinned), key=lambda one: one.used_ms):
            chosen.append(replica)
            missing -= replica.model.bytes
            if missing <= 0:
                return chosen
        return []

    def on_finish(self, job: Job) -> None:
        self._serve(job.spec.model)
        self._place()

    def on_abandoned(self, job: Job) -> None:
        queue = self._queues[job.spec.model]
        if job in queue:
            queue.remove(job)
        if not queue:
            self._claims.pop(job.spec.model, None)
        self._place()

    def on_loaded(self, replica: Replica) -> None:
        self._serve(replica.model.id)
        self._place()

    def on_load_failed(self, replica: Replica) -> None:
        """It is loaded again as long as somebody waits."""
        del self._held[replica.model.id]
        self._place()

    def on_freed(self, replica: Replica) -> None:
        self._place()

    def on_training(self, job: Training) -> None:
        self._engine.reserve(job)

    def on_training_left(self, job: Training) -> None:
        self._place()

    def on_lost(self, device: Device, lost: list[Job]) -> None:
        self._held = {model: one for model, one in self._held.items() if one.device is not device}
        self._claims = {model: at for model, at in self._claims.items() if at is not device}
        for job in reversed(lost):
            if job.first_ms is None:
                self._engine.requeue(job)
                self._queues[job.spec.model].appendleft(job)
            else:
                self._engine.end(job, "failed")
        self._place()

    def on_back(self, device: Device) -> None:
        self._place()
