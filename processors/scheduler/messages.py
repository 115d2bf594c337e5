"""What the scheduling policy is told, and what it wants done: plain data between the policy and the agent around it."""

from __future__ import annotations

from dataclasses import dataclass

from processors.scheduler.state import Job, Request, Running
from schemas.control import Model
from schemas.events import Status, WorkerStatus

# --- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    request: Request


@dataclass(frozen=True, slots=True)
class Restored:
    """A request that was assigned before this scheduler took the pool."""

    running: Running


@dataclass(frozen=True, slots=True)
class CancelAsked:
    request_id: str
    reason: str
    tenant: str
    """Whose wish it is: it ends no request of another tenant."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The log holds the request's terminal; tokens as far as it tells."""

    request_id: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AttemptReady:
    """A lost attempt can be made good: attempt `attempt` is opened in the log and may be assigned."""

    request_id: str
    attempt: int
    begun: bool = False
    """Whether its answer has begun: it goes on, and cannot begin too late any more."""


@dataclass(frozen=True, slots=True)
class Superseded:
    """The log holds a later attempt of a request than the one that runs: whatever that one says is void."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    status: WorkerStatus


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """The grant of a lease to a process is durable."""

    worker: str
    boot: str
    model: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Heard:
    """The shell has read every heartbeat there was when the pool was taken: all workers that may live are known."""


@dataclass(frozen=True, slots=True)
class LogRead:
    """The log was read to its end as it was at `ReadLog`; what had ended by then was told."""


@dataclass(frozen=True, slots=True)
class ModelsChanged:
    models: dict[str, Model]


@dataclass(frozen=True, slots=True)
class WeightsChanged:
    """Shares of tenants; 1 for those that are not named."""

    weights: dict[str, float]


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """An operator wants the model in memory; given up after `until_ms` (Unix ms)."""

    model: str
    until_ms: int


@dataclass(frozen=True, slots=True)
class UnloadAsked:
    """An operator wants the model's memory back."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """An operator says that the quarantined bytes of a model on a worker are free."""

    worker: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class TrainingAsked:
    """A job wants memory until it is done."""

    job: Job


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """A job has ended, or nobody wants it any more."""

    job: str


@dataclass(frozen=True, slots=True)
class TrainingGranted:
    worker: str
    job: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Wish = LoadAsked | UnloadAsked | ReleaseAsked
Event = (
    Arrived
    | Restored
    | CancelAsked
    | Finished
    | AttemptReady
    | Superseded
    | WorkerSeen
    | LeaseGranted
    | Heard
    | LogRead
    | ModelsChanged
    | WeightsChanged
    | Wish
    | TrainingAsked
    | TrainingDone
    | TrainingGranted
    | Tick
)


# --- actions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendTerm:
    """Ask a worker to show that it has read everything up to here."""

    worker: str
    fence: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """Append a granted lease; its offset comes back as `LeaseGranted`."""

    worker: str
    boot: str
    model: str
    device: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    worker: str
    boot: str
    model: str
    epoch: int
    device: str = ""


@dataclass(frozen=True, slots=True)
class Unload:
    worker: str
    boot: str
    model: str
    epoch: int


@dataclass(frozen=True, slots=True)
class LeaseMoved:
    """A lease changed its state; to be published."""

    worker: str
    boot: str
    model: str
    epoch: int
    state: str
    bytes: int = 0
    reason: str = ""
    device: str = ""


@dataclass(frozen=True, slots=True)
class Enqueued:
    request: Request


@dataclass(frozen=True, slots=True)
class Assign:
    request: Request
    worker: str
    boot: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """A request runs on a worker by the word of the scheduler before: to be remembered as if we had assigned it."""

    request: Request
    worker: str
    boot: str
    epoch: int


@dataclass(frozen=True, slots=True)
class ReadLog:
    """Read the log to its end as it is now, then say `LogRead`."""


@dataclass(frozen=True, slots=True)
class CancelRunning:
    request_id: str
    worker: str
    reason: str
    status: Status
    attempt: int = 0
    """Which attempt of it; 0 for any."""


@dataclass(frozen=True, slots=True)
class End:
    """End a request that waits: `status` with `code` of an error class (`cancelled` for a caller's wish)."""

    request: Request
    status: Status
    code: str
    message: str
    retry_after_s: int = 2
    """When trying again makes sense, where the code means that it may."""


@dataclass(frozen=True, slots=True)
class Recover:
    """A running request ends on its worker: open the next attempt, then see what it had sent."""

    running: Running
    may_retry: bool
    reason: str = ""
    """Why, where its worker was not lost."""


@dataclass(frozen=True, slots=True)
class GrantTraining:
    """Append a granted lease of a job; its offset comes back as `TrainingGranted`."""

    worker: str
    boot: str
    job: str
    device: str
    bytes: int


@dataclass(frozen=True, slots=True)
class BeginTraining:
    """Let a job train from its last checkpoint, within the bytes that it was granted."""

    worker: str
    boot: str
    job: str
    epoch: int
    device: str
    bytes: int
    notice_ms: int


@dataclass(frozen=True, slots=True)
class NoticeTraining:
    """Have a job write its checkpoint and leave; who is still there at `by_ms` (Unix ms) is to be ended."""

    worker: str
    boot: str
    job: str
    epoch: int
    by_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class TrainingMoved:
    """A job's lease changed its state; to be published."""

    worker: str
    boot: str
    job: str
    epoch: int
    state: str
    bytes: int
    device: str
    reason: str = ""


TrainingAction = GrantTraining | BeginTraining | NoticeTraining | TrainingMoved
Action = (
    SendTerm
    | Grant
    | Load
    | Unload
    | LeaseMoved
    | Enqueued
    | Assign
    | Adopt
    | ReadLog
    | CancelRunning
    | End
    | Recover
    | TrainingAction
)
