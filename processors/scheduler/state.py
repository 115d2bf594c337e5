"""What the scheduling policy knows of a pool: plain data, no I/O, no clock. Times are Unix ms, sizes bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from processors.scheduler.queues import Queue
from schemas.control import Model
from schemas.events import Device, Priority, WorkerStatus


@dataclass(slots=True)
class Request:
    """A request that waits or runs."""

    id: str
    tenant: str
    model: str
    arrived_ms: int
    deadline_ms: int
    attempt: int = 1
    """The attempt that runs, or that the next assignment makes."""
    losses: int = 0
    """Workers that were lost under it, as far as this scheduler has seen."""
    priority: Priority = Priority.STANDARD
    prompt_tokens: int = 0
    """An estimate."""
    charged_prompt: int = 0
    charged_completion: int = 0
    """Tokens that its tenant was charged for, over all attempts."""
    waiting_ms: int = 0
    """Since when it waits: its arrival, or when its worker was lost."""
    start_by_ms: int = 0
    """After this nobody cares for a first token; 0 for the deadline."""
    opened_before: bool = False
    """Whether the scheduler before opened its attempt."""

    @property
    def late_ms(self) -> int:
        """When it has waited too long."""
        return min(self.start_by_ms or self.deadline_ms, self.deadline_ms)


class LeaseState(StrEnum):
    """A lease's life; it never goes back, but for an engine that died and is loaded again under the same lease."""

    REQUESTED = "requested"
    """Its grant is being written."""
    LOADING = "loading"
    ACTIVE = "active"
    DRAINING = "draining"
    """It takes no more requests, and is released when those it has are done."""
    RELEASING = "releasing"
    """The worker was told to unload; the bytes are held until it shows that they are free."""
    QUARANTINED = "quarantined"
    """The worker did not say in time that the bytes are free: they count as lost until it does."""
    FAILED = "failed"
    """The load failed, and nothing is held."""


@dataclass(slots=True)
class Lease:
    """The right of a worker to hold a model in the memory of a device."""

    worker: str
    boot: str
    model: str
    device: str = ""
    """Empty where the model takes none of our memory."""
    bytes: int = 0
    epoch: int | None = None
    """None until the grant is durable."""
    state: LeaseState = LeaseState.REQUESTED
    running: set[str] = field(default_factory=set)
    strays: set[str] = field(default_factory=set)
    """Requests that its worker shows on it and that we did not give to it."""
    moved_ms: int = 0
    """When it came into its state."""
    load_took_ms: int = 0
    """How long its last load took; 0 where that was not seen."""
    used_ms: int = 0
    """When a request was last given to it, or was done on it."""
    shown: bool = False
    """Whether its worker has shown it: before that the worker may have the load still to read."""
    error: str = ""

    @property
    def granted(self) -> int:
        """Its epoch. Raises `ValueError` before the grant is durable."""
        if self.epoch is None:
            raise ValueError(f"the lease of {self.model} on {self.worker} is not granted yet")
        return self.epoch

    @property
    def holds(self) -> int:
        """Bytes that nobody else may be granted."""
        return 0 if self.state is LeaseState.FAILED else self.bytes

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return len(self.running) + len(self.strays)

    @property
    def coming(self) -> bool:
        """Whether it serves, or will when it is loaded."""
        return self.state in (LeaseState.REQUESTED, LeaseState.LOADING, LeaseState.ACTIVE)


@dataclass(frozen=True, slots=True)
class Job:
    """A training job that wants memory."""

    id: str
    bytes: int
    """A fixed number: all that it will take."""
    notice_ms: int
    """How long it takes to write its checkpoint and leave; half of W_max at most is waited for."""
    device: str = ""
    """Id of the device that it must have; empty for any."""


@dataclass(slots=True)
class TrainingLease:
    """The right of a job to train in the memory of a device until somebody needs it."""

    worker: str
    boot: str
    job: str
    device: str
    bytes: int
    notice_ms: int
    epoch: int | None = None
    """None until the grant is durable."""
    state: LeaseState = LeaseState.REQUESTED
    moved_ms: int = 0
    """When it came into its state."""
    by_ms: int = 0
    """When its notice ends."""


@dataclass(slots=True)
class Running:
    """A request on a worker."""

    request: Request
    worker: str
    boot: str
    epoch: int
    began_ms: int = 0
    """When it was assigned, or taken over."""
    cancel_asked: bool = False
    goes_on: bool = False
    """Whether another attempt could go on from what this one has generated, as its worker last told."""
    yielding: bool = False
    """Whether it gives its slot to others: it keeps it until its next attempt may begin."""


@dataclass(frozen=True, slots=True)
class Stray:
    """An attempt that a worker runs, and that the scheduler knows nothing of: the one before gave it."""

    worker: str
    boot: str
    epoch: int


@dataclass(slots=True)
class Worker:
    """A worker as its last heartbeat showed it."""

    status: WorkerStatus
    seen_ms: int
    trusted: bool = False
    """Whether its heartbeat showed our term and fence: every command from before them has been handled there."""

    @property
    def usable(self) -> bool:
        """Whether it may be given work."""
        return self.trusted and not self.status.stopping

    def offers(self, provider: str) -> bool:
        """Whether it may be given work for a provider's models: it serves it, and no open breaker forbids it."""
        return self.usable and provider in self.status.providers and provider not in self.status.broken

    def devices_for(self, provider: str) -> list[Device]:
        """The devices that a provider's models take memory of; none where their memory is not ours to count."""
        return [device for device in self.status.devices if provider in device.providers]


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator may choose."""

    max_wait_ms: int = 60_000
    """W_max: how long a queue may wait for its model while others hold the memory."""
    residency_loads: float = 0.0
    """An idle model keeps its memory for at least this many of its load times; 0 bore the most load in simulation."""


@dataclass(frozen=True, slots=True)
class Strayed:
    """A model that lies in a server under no lease."""

    since_ms: int
    """When it was seen first, or when the server was last asked to unload it."""
    asked: bool = False
    spared: bool = False
    """Whether it was left there for somebody who wants it."""


@dataclass(frozen=True, slots=True)
class Unseen:
    """What a worker that is gone had in a server, or was loading there, and nobody else has seen there yet."""

    bytes: int
    until_ms: int
    """When somebody must have seen it, if it is there."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a worker had a server unload: it has looked, and others may not have."""

    worker: str
    until_ms: int
    """When all have looked."""


class Taking(StrEnum):
    """How far a scheduler is with taking a pool. Until it has, nothing is assigned, loaded or unloaded.

    The scheduler before may have given requests to workers that nothing says but the workers themselves, or the log
    when those have ended.
    """

    WAITING = "waiting"
    """What it owns is being read."""
    HEARING = "hearing"
    """Not every worker that lives has shown the term yet: there may be commands under way to it."""
    READING = "reading"
    """All have, and the log is being read to where it was then."""
    TAKEN = "taken"


@dataclass(slots=True)
class Pool:
    """The whole state of a pool's scheduler."""

    term: int
    taking: Taking = Taking.TAKEN
    taken_ms: int = 0
    """When this scheduler took the pool."""
    strays: dict[tuple[str, int], Stray] = field(default_factory=dict)
    """(request, attempt) -> where it runs, of requests that did not come again yet since the pool was taken."""
    given: dict[tuple[str, int], Stray] = field(default_factory=dict)
    """(request, attempt) -> to whom the scheduler before gave it of late, whether it came to write that down or not."""
    ticked_ms: int = 0
    """When it was last told the time."""
    models: dict[str, Model] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    """Tenant -> share; 1 for those without one."""
    limits: Limits = field(default_factory=Limits)
    workers: dict[str, Worker] = field(default_factory=dict)
    fences: dict[str, int] = field(default_factory=dict)
    """Worker -> the fence that it must show, when it was lost and its process may still be there."""
    leases: dict[tuple[str, str], Lease] = field(default_factory=dict)
    """By (worker, model)."""
    queues: dict[str, Queue] = field(default_factory=dict)
    """By model."""
    running: dict[str, Running] = field(default_factory=dict)
    recovering: dict[str, Running] = field(default_factory=dict)
    """Requests whose worker was lost and whose fate is being read from their frames."""
    deadlines: list[tuple[int, str, str]] = field(default_factory=list)
    """A heap of (deadline, request, model) of what waits or waited."""
    early_cancels: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    """Cancellations that overtook their request: (tenant, id) -> (when, reason)."""
    service_ms: dict[str, float] = field(default_factory=dict)
    """Moving mean of a request's time on a worker, by model; for estimates of waiting."""
    ready_ms: dict[str, int] = field(default_factory=dict)
    """Model -> when it was last seen to be loaded: since then its queue waits for it, however long its requests do."""
    demand: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Model -> (arrivals of late, halving every minute; when that was)."""
    wanted: dict[str, int] = field(default_factory=dict)
    """Models that an operator wants loaded -> when that is given up."""
    parked: set[str] = field(default_factory=set)
    """Models that an operator had unloaded, and that nobody has asked for since."""
    jobs: dict[str, Job] = field(default_factory=dict)
    """Training jobs that want memory, by id, in the order in which they asked."""
    trainers: dict[tuple[str, str], TrainingLease] = field(default_factory=dict)
    """By (worker, job)."""
    unseen: dict[tuple[str, str], Unseen] = field(default_factory=dict)
    """(device, model) -> what may lie in a server though no worker shows it."""
    dropped: dict[tuple[str, str], Dropped] = field(default_factory=dict)
    """(device, model) -> who saw that a server holds it no more."""
    strayed: dict[tuple[str, str], Strayed] = field(default_factory=dict)
    """(device, model) that a server holds and nobody has a lease on."""
    released: dict[tuple[str, str], int] = field(default_factory=dict)
    """(worker, model) -> epoch of a lease whose bytes are free by an operator's word."""

    @property
    def queued(self) -> int:
        """Requests that wait, over all models."""
        return sum(len(queue) for queue in self.queues.values())

    def queue(self, model: str) -> Queue:
        """The queue of a model."""
        found = self.queues.get(model)
        if found is None:
            found = self.queues[model] = Queue(self.weights)
        return found

    def of_model(self, model: str) -> list[Lease]:
        """All leases on a model."""
        return [lease for (_, held), lease in self.leases.items() if held == model]

    def at_hand(self, model: Model) -> bool:
        """Whether a model is to be held though nobody waits for it."""
        return model.pinned or model.id in self.wanted or (model.preload and model.id not in self.parked)

    def blocked(self, lease: Lease) -> bool:
        """Whether the breaker of its model's provider is open on its worker."""
        worker, model = self.workers.get(lease.worker), self.models.get(lease.model)
        return worker is not None and model is not None and model.provider in worker.status.broken
