"""What the scheduling policy knows of a pool: plain data, no I/O, no clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from schemas.control import Model
from schemas.events import WorkerStatus


@dataclass(slots=True)
class Request:
    """A request that waits or runs. Times are Unix ms."""

    id: str
    tenant: str
    model: str
    arrived_ms: int
    deadline_ms: int
    attempt: int = 1
    """The attempt that runs, or that the next assignment makes."""


@dataclass(slots=True)
class Lease:
    """The right of a worker to hold a model."""

    worker: str
    boot: str
    model: str
    epoch: int | None = None
    """None until the grant is durable."""
    state: str = "requested"
    """`requested`, `granted` (load asked for), `active`, `failed`."""
    running: set[str] = field(default_factory=set)
    asked_ms: int = 0
    """When the lease was asked for."""
    error: str = ""


@dataclass(slots=True)
class Running:
    """A request on a worker."""

    request: Request
    worker: str
    boot: str
    epoch: int
    cancel_asked: bool = False


@dataclass(slots=True)
class Worker:
    """A worker as its last heartbeat showed it."""

    status: WorkerStatus
    seen_ms: int
    trusted: bool = False
    """Whether its heartbeat showed our term: every command of earlier terms has been handled there."""


@dataclass(slots=True)
class Pool:
    """The whole state of a pool's scheduler."""

    term: int
    taken_ms: int = 0
    """When this scheduler took the pool."""
    models: dict[str, Model] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    leases: dict[tuple[str, str], Lease] = field(default_factory=dict)
    """By (worker, model)."""
    queues: dict[str, OrderedDict[str, Request]] = field(default_factory=dict)
    """By model, oldest first."""
    running: dict[str, Running] = field(default_factory=dict)
    recovering: dict[str, Running] = field(default_factory=dict)
    """Requests whose worker was lost and whose fate is being read from their frames."""
    early_cancels: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Cancellations that overtook their request: id -> (when, reason)."""
    service_ms: dict[str, float] = field(default_factory=dict)
    """Moving mean of a request's time on a worker, by model; for estimates of waiting."""

    @property
    def queued(self) -> int:
        """Requests that wait, over all models."""
        return sum(len(queue) for queue in self.queues.values())

    def queue(self, model: str) -> OrderedDict[str, Request]:
        """The queue of a model."""
        return self.queues.setdefault(model, OrderedDict())

    def knows(self, request_id: str, model: str) -> bool:
        """Whether the request waits, runs or is being recovered."""
        return request_id in self.running or request_id in self.recovering or request_id in self.queues.get(model, ())
