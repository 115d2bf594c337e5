"""Headrace's own policy, driven as production drives it.

`processors.scheduler.policy.step` is the code that runs in the scheduler; here its events come from the simulated
machine room and its actions go there. Workers report twice a second, and at once when a load has ended or memory is
free; the policy is woken every 250 ms while anything waits or changes. Nothing takes time on the way between them.
A request's SLO is told as the time by which it must begin, as callers may tell it (`x-hr-start-within`); or, as an
ablation, it is not told, and the policy knows as little of SLOs as the baselines do.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import count

from bench.scheduler.engine import Device, Engine, Job, Replica, State, Training
from bench.scheduler.workload import ModelSpec
from processors.scheduler import training
from processors.scheduler.messages import (
    Action,
    Arrived,
    Assign,
    AttemptReady,
    BeginTraining,
    CancelAsked,
    CancelRunning,
    End,
    Event,
    Finished,
    Grant,
    GrantTraining,
    LeaseGranted,
    Load,
    NoticeTraining,
    Recover,
    SendTerm,
    Tick,
    TrainingAsked,
    TrainingDone,
    TrainingGranted,
    Unload,
    WorkerSeen,
)
from processors.scheduler.policy import step
from processors.scheduler.state import Job as TrainingJob
from processors.scheduler.state import LeaseState, Pool, Request
from schemas import control, events

HEARTBEAT_MS = 500
TICK_MS = 250
TERM = 1
PROVIDER = "simulated"
DAY_MS = 86_400_000
"""Long enough for any request to run to its end: callers limit only how long they wait for a first token."""
OUTCOMES = {
    events.Status.REJECTED: "rejected",
    events.Status.EXPIRED: "expired",
    events.Status.CANCELLED: "abandoned",
    events.Status.FAILED: "failed",
}


def as_model(spec: ModelSpec) -> control.Model:
    """A model of a workload as the control plane knows it; none is loaded before somebody asks, but pinned ones."""
    return control.Model(
        id=spec.id,
        provider=PROVIDER,
        backend_tag=spec.id,
        max_concurrency=spec.max_concurrency,
        preload=False,
        pinned=spec.pinned,
        bytes=spec.bytes,
        load_ms=round(spec.load_s * 1000),
    )


def _notice_ms(job: Training) -> int:
    return round(job.spec.notice_s * 1000)


class _Worker:
    """The worker process on a device, as it reports itself."""

    def __init__(self, device: Device, life: int) -> None:
        self.device = device
        self.boot = f"{device.id}/{life}"
        self.alive = True
        self.term = 0
        self.fence = 0
        self.epochs: dict[str, int] = {}
        """Model -> epoch of the lease that it was last loaded under."""
        self.failed: dict[str, int] = {}
        """Model -> epoch of a lease whose load failed."""
        self.attempts: dict[str, int] = {}
        """Request -> the attempt that runs."""
        self.trainers: dict[str, tuple[Training, int]] = {}
        """Training job -> the job, and the epoch of the lease that it was last begun under."""

    def status(self, engine: Engine) -> events.WorkerStatus:
        """What it would report now."""
        replicas = self.device.replicas.values()
        resident = [self._resident(replica) for replica in replicas]
        resident += [
            events.Resident(model, epoch, "failed", error="the load failed", device=self.device.id)
            for model, epoch in self.failed.items()
        ]
        running = [
            events.RunningAttempt(id, self.attempts[id], self.epochs[replica.model.id], engine.tokens(job))
            for replica in replicas
            for id, job in replica.running.items()
        ]
        return events.WorkerStatus(
            worker=self.device.id,
            boot=self.boot,
            pool="simulated",
            term=self.term,
            at_ms=engine.now_ms,
            providers=[PROVIDER],
            resident=resident,
            running=running,
            devices=[events.Device(self.device.id, self.device.bytes, [PROVIDER])],
            fence=self.fence,
            trainers=[self._trainer(job, epoch) for job, epoch in self.trainers.values()],
        )

    def _trainer(self, job: Training, epoch: int) -> events.Trainer:
        left = job.device is not self.device
        return events.Trainer(job.spec.id, epoch, self.device.id, job.spec.bytes, _notice_ms(job), left=left)

    def _resident(self, replica: Replica) -> events.Resident:
        model = replica.model
        state = replica.state.name.lower()
        return events.Resident(model.id, self.epochs[model.id], state, model.bytes, device=self.device.id)


class Headrace:
    """What carries events to the policy and its actions out."""

    def __init__(self, engine: Engine, *, told: bool = True) -> None:
        """`told`: whether it is told each request's SLO."""
        self._engine = engine
        self._told = told
        models = {spec.id: as_model(spec) for spec in engine.models.values()}
        self._pool = Pool(term=TERM, models=models, weights=engine.workload.weights())
        self._events: deque[Event] = deque()
        self._stepping = False
        self._ticking = False
        self._epochs = count(1)
        self._lives = count(1)
        self._workers: dict[str, _Worker] = {}
        for device in engine.devices.values():
            self.on_back(device)

    # --- what happens -----------------------------------------------------------------------------------------------

    def on_arrival(self, job: Job) -> None:
        spec = job.spec
        request = Request(
            id=spec.id,
            tenant=spec.tenant,
            model=spec.model,
            arrived_ms=job.arrived_ms,
            deadline_ms=job.arrived_ms + DAY_MS,
            priority=spec.lane,
            prompt_tokens=spec.prompt_tokens,
            start_by_ms=job.arrived_ms + round(spec.slo_s * 1000) if self._told else 0,
        )
        self._tell(Arrived(request))

    def on_finish(self, job: Job) -> None:
        self._tell(Finished(job.spec.id, job.spec.prompt_tokens, job.spec.output_tokens))

    def on_abandoned(self, job: Job) -> None:
        self._tell(CancelAsked(job.spec.id, "The caller left.", job.spec.tenant))

    def on_loaded(self, replica: Replica) -> None:
        self._report(self._workers[replica.device.id])

    def on_load_failed(self, replica: Replica) -> None:
        worker = self._workers[replica.device.id]
        worker.failed[replica.model.id] = worker.epochs[replica.model.id]
        self._report(worker)

    def on_freed(self, replica: Replica) -> None:
        self._report(self._workers[replica.device.id])

    def on_training(self, job: Training) -> None:
        self._tell(TrainingAsked(TrainingJob(job.spec.id, job.spec.bytes, _notice_ms(job))))

    def on_training_left(self, job: Training) -> None:
        if not job.left_ms:
            self._tell(TrainingDone(job.spec.id))
        for worker in self._workers.values():
            if worker.alive and job.spec.id in worker.trainers:
                self._report(worker)

    def on_lost(self, device: Device, lost: list[Job]) -> None:
        """Nobody tells the policy: it has to miss the heartbeats."""
        self._workers[device.id].alive = False

    def on_back(self, device: Device) -> None:
        worker = self._workers[device.id] = _Worker(device, next(self._lives))
        self._engine.after(0, partial(self._beat, worker))

    def _beat(self, worker: _Worker) -> None:
        if worker.alive:
            self._report(worker)
            self._engine.after(HEARTBEAT_MS, partial(self._beat, worker))

    def _report(self, worker: _Worker) -> None:
        self._tell(WorkerSeen(worker.status(self._engine)))

    def _tick(self) -> None:
        self._ticking = False
        self._tell(Tick())

    # --- the policy -------------------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        """One step for this event, and for each that its actions lead to."""
        self._events.append(event)
        if self._stepping:
            return
        self._stepping = True
        while self._events:
            for action in step(self._pool, self._events.popleft(), self._engine.now_ms):
                self._act(action)
        self._stepping = False
        if not self._ticking and self._unsettled():
            self._ticking = True
            self._engine.after(TICK_MS, self._tick)

    def _unsettled(self) -> bool:
        pool = self._pool
        return (
            any(pool.queues.values())
            or bool(pool.recovering)
            or any(training.waiting(pool))
            or any(lease.state is not LeaseState.ACTIVE for lease in pool.leases.values())
            or any(lease.state is not LeaseState.ACTIVE for lease in pool.trainers.values())
            or not all(worker.alive for worker in self._workers.values())
        )

    def _act(self, action: Action) -> None:
        match action:
            case SendTerm(worker, fence):
                if (known := self._workers[worker]).alive:
                    known.term, known.fence = TERM, fence
                    self._report(known)
            case Grant(worker, boot, model):
                self._tell(LeaseGranted(worker, boot, model, next(self._epochs)))
            case Load():
                self._load(action)
            case Unload():
                self._unload(action)
            case Assign():
                self._assign(action)
            case GrantTraining(worker, _, job_id):
                self._tell(TrainingGranted(worker, job_id, next(self._epochs)))
            case BeginTraining():
                self._train(action)
            case NoticeTraining():
                self._yield_training(action)
            case CancelRunning(request_id, _, _, status):
                job = self._engine.jobs[request_id]
                if job.replica is not None:
                    tokens = self._engine.tokens(job)
                    self._engine.stop(job, OUTCOMES[status])
                    self._tell(Finished(request_id, job.spec.prompt_tokens, tokens))
            case End(request, status):
                if (job := self._engine.jobs[request.id]).open:
                    self._engine.end(job, OUTCOMES[status])
            case Recover():
                self._recover(action)
            case _:
                pass

    def _hears(self, name: str, boot: str) -> _Worker | None:
        """The worker that a command is meant for; what is sent to a process that is gone is lost."""
        worker = self._workers[name]
        return worker if worker.alive and worker.boot == boot else None

    def _load(self, load: Load) -> None:
        worker = self._hears(load.worker, load.boot)
        if worker is not None:
            worker.failed.pop(load.model, None)
            worker.epochs[load.model] = load.epoch
            self._engine.load(self._engine.models[load.model], worker.device)

    def _unload(self, unload: Unload) -> None:
        worker = self._hears(unload.worker, unload.boot)
        if worker is None or worker.epochs.get(unload.model) != unload.epoch:
            return
        replica = worker.device.replicas.get(unload.model)
        if replica is not None and replica.state is State.ACTIVE:
            self._engine.unload(replica)

    def _train(self, begin: BeginTraining) -> None:
        worker, job = self._hears(begin.worker, begin.boot), self._engine.trainings[begin.job]
        if worker is not None:
            worker.trainers[begin.job] = (job, begin.epoch)
            self._engine.train(job, worker.device)
            self._report(worker)

    def _yield_training(self, notice: NoticeTraining) -> None:
        worker, job = self._hears(notice.worker, notice.boot), self._engine.trainings[notice.job]
        if worker is not None and job.device is worker.device and not job.leaving:
            self._engine.yield_training(job)

    def _assign(self, assign: Assign) -> None:
        worker = self._hears(assign.worker, assign.boot)
        if worker is not None:
            worker.attempts[assign.request.id] = assign.request.attempt
            replica = worker.device.replicas[assign.request.model]
            self._engine.start(self._engine.jobs[assign.request.id], replica)

    def _recover(self, recover: Recover) -> None:
        """What had sent nothing is tried again."""
        request = recover.running.request
        job = self._engine.jobs[request.id]
        if job.open and job.first_ms is None and recover.may_retry:
            self._engine.requeue(job)
            self._tell(AttemptReady(request.id, request.attempt + 1))
            return
        if job.open:
            self._engine.end(job, "failed")
        self._tell(Finished(request.id, request.prompt_tokens, self._engine.tokens(job)))
