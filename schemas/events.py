"""Events of a request's life, as Kafka carries them: routed requests, worker commands, the request log, usage.

All are JSON, so that any system can read them. Times are Unix milliseconds, durations are milliseconds.
Unknown fields are ignored by readers; fields are only ever added, with a default.
"""

from __future__ import annotations

from decimal import Decimal
from enum import IntEnum, StrEnum

import msgspec

from schemas.control import Model, Price, Provider

NOTHING = msgspec.Raw()
"""An absent JSON value. (`Raw | None` decodes as null only, so absence is the empty `Raw`, which is falsy.)"""


class Status(StrEnum):
    """The five ends of a request."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    EXPIRED = "expired"


class BodyRef(msgspec.Struct, frozen=True):
    """Where in `inference.requests` a request's body stands."""

    partition: int
    offset: int


class Priority(IntEnum):
    """Who goes first; the lower number."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2
    """Takes only slots that nobody else wants."""


PRIORITIES = tuple(priority.name.lower() for priority in Priority)
"""Their names, as headers and records carry them."""


class Routed(msgspec.Struct, omit_defaults=True):
    """A request that the router admitted and gave to a pool (`inference.routed`, key: pool)."""

    request_id: str
    tenant: str
    key_id: str
    model: str
    alias: str
    """The model name as the caller wrote it."""
    pool: str
    reply_partition: int
    ref: BodyRef
    body: msgspec.Raw = NOTHING
    """The OpenAI body as sent; `NOTHING` when it is larger than `INLINE_BODY_BYTES` and must be read through `ref`."""
    stream: bool = False
    prompt_tokens_estimate: int = 0
    max_tokens: int | None = None
    priority: str = "standard"
    accepted_ms: int = 0
    """Append time of the request in `inference.requests`, the broker's clock."""
    routed_ms: int = 0
    deadline_ms: int = 0
    """Unix ms after which nobody waits for an answer."""
    resume_s: int = 0
    """Seconds that the request outlives its last caller."""
    digest: str = ""
    """SHA-256 of the body, to tell a duplicate from another request under the same id."""
    price: Price | None = None
    traceparent: str | None = None
    choices: int = 0
    """How many choices were asked for; 0 where that is not known."""
    continuable: bool = False
    """Whether an answer to this body may be continued from its text, if the model's provider can.

    False from a router of an earlier version: workers, which are upgraded before routers, know what to do by then.
    """
    adapter: str = ""
    """LoRA adapter of the model that is to answer; empty for the model itself."""
    start_by_ms: int = 0
    """Unix ms after which an answer need not begin; 0 for the deadline."""
    user_id: str = ""
    """Who owns the key; empty where nobody does."""
    publisher: str = ""
    """The direct publisher that asked, also where it named an API key; empty where an ingress has admitted it."""
    ingress: str = ""
    """`instance/boot` of the ingress process that its caller asked; empty for direct publishers."""


INLINE_BODY_BYTES = 64 * 1024
MAX_EMITTED_BYTES = 512 * 1024
"""Longest text, as JSON, that a command carries for an attempt to go on from: a command has at most 1 MiB."""


class TermCommand(msgspec.Struct, tag_field="type", tag="term"):
    """A scheduler took the pool; commands of lower terms are refused from here on."""

    term: int
    pool: str
    fence: int = 0
    """Grows within a term, each time that the scheduler must know what the worker has read."""


class LoadCommand(msgspec.Struct, tag_field="type", tag="load"):
    """Make a model resident under a lease."""

    term: int
    boot: str
    epoch: int
    model: Model
    provider: Provider
    device: str = ""
    """Where the memory was granted; empty where none is counted."""


NO_EPOCH = -1
"""The epoch of an unload of what a server holds and no lease is on."""


class UnloadCommand(msgspec.Struct, tag_field="type", tag="unload"):
    """Give a model's memory back."""

    term: int
    boot: str
    epoch: int
    model: str


class GenerateCommand(msgspec.Struct, tag_field="type", tag="generate"):
    """Answer a request as a given attempt, under a lease's epoch."""

    term: int
    boot: str
    attempt: int
    epoch: int
    assigned_ms: int
    request: Routed
    after_seq: int = 0
    """`seq` of the last frame of earlier attempts; this one's go on from it."""
    emitted: str = ""
    """What earlier attempts generated: this one goes on from there, and never says it again."""
    tokens: int = 0
    """Completion tokens of `emitted`."""
    first_token_ms: int = 0
    """When its first token was there; 0 where nothing was emitted."""


class CancelCommand(msgspec.Struct, tag_field="type", tag="cancel"):
    """End a running request."""

    term: int
    request_id: str
    reason: str
    status: Status = Status.CANCELLED
    attempt: int = 0
    """Which attempt of it; 0 for any."""


Command = TermCommand | LoadCommand | UnloadCommand | GenerateCommand | CancelCommand


class Usage(msgspec.Struct, omit_defaults=True):
    """Token counts of a request, over all its choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False
    """True where we counted because the provider did not say."""
    images: int = 0
    """In the prompt, each as often as it was sent."""
    audio_seconds: Decimal = Decimal(0)
    """Of sound that was heard or spoken."""


class ErrorInfo(msgspec.Struct, omit_defaults=True):
    """An error in OpenAI's terms, with the HTTP status it is given before a stream has begun."""

    status: int
    code: str
    message: str
    type: str = "server_error"
    param: str | None = None
    retry_after_s: int | None = None


class Timings(msgspec.Struct, omit_defaults=True):
    """When a request passed each hop, Unix ms; 0 where it did not."""

    accepted_ms: int = 0
    routed_ms: int = 0
    assigned_ms: int = 0
    started_ms: int = 0
    first_token_ms: int = 0
    finished_ms: int = 0
    load_ms: int = 0
    """A duration: how long of the wait its model was being loaded on the worker that answered."""


class AttemptOpened(msgspec.Struct, tag_field="type", tag="attempt_opened"):
    """A scheduler opens attempt `attempt` (2 or higher: the first is implicit) of a request."""

    request_id: str
    tenant: str
    attempt: int
    epoch: int
    worker: str
    reason: str
    at_ms: int


class Terminal(msgspec.Struct, tag_field="type", tag="terminal", omit_defaults=True):
    """How a request ended. The first one in `inference.log` that no higher attempt precedes decides."""

    request_id: str
    tenant: str
    attempt: int
    epoch: int
    status: Status
    key_id: str = ""
    model: str = ""
    alias: str = ""
    pool: str = ""
    provider: str = ""
    worker: str = ""
    stream: bool = False
    reply_partition: int = 0
    usage: Usage = msgspec.field(default_factory=Usage)
    error: ErrorInfo | None = None
    choices: msgspec.Raw = NOTHING
    """The whole answer as OpenAI's non-streamed `choices`; `NOTHING` where nothing was generated."""
    system_fingerprint: str | None = None
    timings: Timings = msgspec.field(default_factory=Timings)
    price: Price | None = None
    last_seq: int = 0
    """`seq` of the last frame written before the terminal frame."""
    user_id: str = ""


LogRecord = AttemptOpened | Terminal


class Stage(StrEnum):
    """Lifecycle stages, in the order in which a request passes them."""

    ACCEPTED = "accepted"
    ROUTED = "routed"
    QUEUED = "queued"
    ASSIGNED = "assigned"
    STARTED = "started"
    FIRST_TOKEN = "first_token"  # noqa: S105 - no password
    CANCEL_ASKED = "cancel_asked"
    ATTEMPT_LOST = "attempt_lost"
    DUPLICATE = "duplicate"
    TERMINAL = "terminal"


STAGE_RANK: dict[str, int] = {stage.value: rank for rank, stage in enumerate(Stage)}


class LifecycleEvent(msgspec.Struct, omit_defaults=True):
    """One step of a request (`inference.events`); informational, it decides nothing."""

    request_id: str
    tenant: str
    stage: Stage
    at_ms: int
    role: str
    instance: str
    attempt: int = 1
    epoch: int = 0
    detail: dict[str, str | int | float | bool] = {}


class Cancellation(msgspec.Struct, omit_defaults=True):
    """A wish to end a request (`inference.cancellations`); it may overtake the request itself."""

    request_id: str
    tenant: str
    reason: str
    at_ms: int
    by: str = ""


class PricedBefore(msgspec.Struct, frozen=True):
    """What a usage cost in an earlier revision."""

    revision: int
    price_version: int
    currency: str
    cost: Decimal


class UsageEvent(msgspec.Struct, omit_defaults=True):
    """What one request cost (`usage.events`), under a deterministic id.

    There is one a request, and one more each time that it is priced anew. Of the events of one id the highest revision
    counts, and of that the one with the lowest offset; so a replay changes nothing, and no event is ever overwritten.
    """

    usage_id: str
    request_id: str
    tenant: str
    key_id: str
    model: str
    alias: str
    provider: str
    worker: str
    status: Status
    attempts: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    estimated: bool
    price_version: int
    currency: str
    cost: Decimal
    stream: bool
    accepted_ms: int
    finished_ms: int
    queue_ms: int
    ttft_ms: int
    generation_ms: int
    user_id: str = ""
    error_code: str = ""
    images: int = 0
    audio_seconds: Decimal = Decimal(0)
    load_ms: int = 0
    revision: int = 0
    """0 as it was metered; grows each time that it is priced anew."""
    repriced_of: list[PricedBefore] = []
    """What it cost in each earlier revision, the first one first."""


class LeaseEvent(msgspec.Struct, omit_defaults=True):
    """A step of a lease's life (`vram.leases`, key: `lease_id/term` on the pool's partition)."""

    lease_id: str
    pool: str
    term: int
    worker: str
    model: str
    state: str
    """`granted`, `loading`, `active`, `draining`, `releasing`, `free`, `lost` or `quarantined`."""
    at_ms: int
    epoch: int = -1
    """Offset of the lease's `granted` record; -1 in that record itself, whose offset is the epoch."""
    boot: str = ""
    bytes: int = 0
    """Memory that it holds on its device; 0 where none is counted."""
    reason: str = ""
    device: str = ""
    """Empty where the model takes none of the worker's counted memory."""


class RunningAttempt(msgspec.Struct, array_like=True):
    """An attempt that a worker is generating."""

    request_id: str
    attempt: int
    epoch: int
    tokens: int = 0
    """Completion tokens so far."""
    goes_on: bool = False
    """Whether another attempt could go on from what this one has generated."""


class Resident(msgspec.Struct, omit_defaults=True):
    """A model that a worker holds, is loading, or failed to load."""

    model: str
    epoch: int
    state: str
    """`loading`, `active`, `unloading` (its memory is not free yet) or `failed`."""
    bytes: int = 0
    """Memory that it was seen to take, or until then is expected to; 0 where nobody can tell."""
    error: str = ""
    device: str = ""
    progress: str = ""
    """How far a load is that takes long, such as a download."""


RAM = "ram"
"""Id of main memory as a device; other devices that are not shared are GPUs."""


class ServerHeld(msgspec.Struct):
    """A model in the memory of a server that several workers, and others, may use."""

    models: list[str]
    """Ids of ours that mean it; empty where nobody of ours would ask for it."""
    bytes: int


class Device(msgspec.Struct, omit_defaults=True):
    """Memory of a worker that models share."""

    id: str
    bytes: int
    """What models may take together: the total without the reserve and without what others hold."""
    providers: list[str] = []
    """Names of the providers whose models lie on it."""
    shared: bool = False
    """Whether other workers that show this id mean the same memory, that of one server."""
    held: list[ServerHeld] = []
    """What such a server holds, whoever had it loaded."""


class Need(msgspec.Struct):
    """What a model is expected to take."""

    model: str
    bytes: int
    load_ms: int = 0
    measured: bool = False
    """Whether `bytes` is the most that a load was seen to take there, and no estimate."""


class ModelCard(msgspec.Struct, omit_defaults=True):
    """What a worker found a model to be (`model.facts`, key: worker/model); told once a change, not with heartbeats.

    Empty and 0 where its provider does not tell.
    """

    worker: str
    model: str
    provider: str
    backend_tag: str
    at_ms: int
    version: str = ""
    """Of the backend's model: the digest of its content, or of when its files were written."""
    architecture: str = ""
    parameters: int = 0
    quantisation: str = ""
    context_length: int = 0
    """Tokens that it was trained for; those that it is served with, where a server tells no more."""
    layers: int = 0
    chat_template: bool = False
    """Whether the model brings its own."""
    template_digest: str = ""
    """First digits of that template's SHA-256."""
    capabilities: list[str] = []
    """Of `chat`, `tools`, `vision`, `thinking` and `embeddings`, what the provider would serve with it."""
    weight_bytes: int = 0


class Trainer(msgspec.Struct, omit_defaults=True):
    """A training job on a worker; it is shown, once it was begun or refused, until the job is begun there anew."""

    job: str
    epoch: int
    device: str
    bytes: int
    """What it was granted."""
    notice_ms: int = 0
    """How long it takes to write its checkpoint and leave."""
    left: bool = False
    """Whether its process is gone and its memory is free."""


class WorkerStatus(msgspec.Struct, omit_defaults=True):
    """A worker's heartbeat (`worker.status`, key: worker)."""

    worker: str
    boot: str
    pool: str
    term: int
    """Highest term seen on the command topic; everything before it there has been handled."""
    at_ms: int
    providers: list[str]
    resident: list[Resident] = []
    running: list[RunningAttempt] = []
    stopping: bool = False
    devices: list[Device] = []
    """Empty where the worker's models take no memory that it could measure."""
    utilisation: dict[str, float] = {}
    """Id of a device -> share of the last moments in which it computed, 0 to 1, where its driver tells."""
    fence: int = 0
    """Highest fence of that term."""
    needs: list[Need] = []
    """Of the models that would take memory of its devices: estimated, or measured when they were loaded."""
    broken: dict[str, str] = {}
    """Providers whose circuit breaker is open here -> why; it is to be given no work for them."""
    trainers: list[Trainer] = []
    left: bool = False
    """The last word of its process: what it ran has ended, or is left to another worker to go on with."""


class IngressStatus(msgspec.Struct):
    """An ingress's heartbeat (`ingress.status`, key: instance)."""

    instance: str
    boot: str
    """Another one for each process."""
    at_ms: int


class ModelState(msgspec.Struct, omit_defaults=True):
    """How one model of a pool stands."""

    id: str
    state: str = "unloaded"
    """`active` where some worker holds it, else `loading`, `draining`, `failed` or `unloaded`."""
    queued: int = 0
    running: int = 0
    used_ms: int = 0
    """When a request was last given to it or done on it (Unix ms); 0 when nobody holds it."""


class ReleasedLease(msgspec.Struct, frozen=True):
    """A lease whose bytes are free by an operator's word, while its worker still shows them as held."""

    worker: str
    model: str
    epoch: int


class PoolWishes(msgspec.Struct, omit_defaults=True):
    """What operators asked of a pool, as the next scheduler must know it to obey each wish once."""

    next_offset: int = 0
    """Wishes of `pool.commands` before this offset are obeyed."""
    load: dict[str, int] = {}
    """Models that are to be loaded -> Unix ms after which that is given up."""
    unloaded: list[str] = []
    """Models that stay out of memory until somebody asks for them, also if they are preloaded."""
    released: list[ReleasedLease] = []


class PoolStatus(msgspec.Struct, omit_defaults=True):
    """What an ingress needs to know of a pool before it accepts (`pool.status`, key: pool)."""

    pool: str
    term: int
    at_ms: int
    ready_models: list[str]
    """Models that a live worker holds."""
    servable_models: list[str]
    """Models that some live worker could serve."""
    taken: bool = False
    """Whether its scheduler has wholly taken it: until then it gives nothing to anybody."""
    failed_models: dict[str, str] = {}
    """Models that no worker could load -> why; they are tried again, unless no device is large enough."""
    broken_models: dict[str, str] = {}
    """Models whose provider's circuit breaker is open on every worker that serves it -> why."""
    queued: int = 0
    running: int = 0
    estimated_wait_ms: int = 0
    """The longest of `waits_ms`."""
    waits_ms: dict[str, int] = {}
    """Model -> the least that a standard request which comes now waits for its slot, and one of batch work."""
    interactive_waits_ms: dict[str, int] = {}
    """Model -> the same of an interactive one."""
    workers: list[str] = []
    models: list[ModelState] = []
    wishes: PoolWishes = msgspec.field(default_factory=PoolWishes)


class PoolCommandKind(StrEnum):
    """What an operator may ask of a pool's scheduler."""

    LOAD = "load"
    """Bring the model into memory now; idle models give way."""
    UNLOAD = "unload"
    """Let the model's requests end and give its memory back; it stays out until somebody asks for it."""
    RELEASE = "release"
    """The quarantined bytes of (worker, model) are free, by the operator's word."""


class PoolCommand(msgspec.Struct, frozen=True, omit_defaults=True):
    """An operator's wish to the scheduler of a pool (`pool.commands`, key: pool); obeyed once, within a minute."""

    id: str
    pool: str
    kind: PoolCommandKind
    model: str
    worker: str = ""
    """Of a release; the others leave the choice to the scheduler."""
    actor: str = ""
    reason: str = ""
    at_ms: int = 0


class PoolTerm(msgspec.Struct):
    """A scheduler takes a pool (`pool.terms`, key: pool); the record's offset is its term."""

    pool: str
    instance: str
    at_ms: int


class LiveRequest(msgspec.Struct, omit_defaults=True):
    """A request that has no terminal yet, as its scheduler must know it after a restart (`scheduler.live`)."""

    request_id: str
    tenant: str
    pool: str
    model: str
    routed_partition: int
    routed_offset: int
    """Where in `inference.routed` the whole routed record stands."""
    accepted_ms: int
    digest: str
    reply_partition: int
    attempt: int = 0
    """0 while queued."""
    worker: str = ""
    boot: str = ""
    epoch: int = 0
    term: int = -1
    """Of the scheduler that wrote this: what an earlier one still writes after it counts for nothing."""


class DeadLetter(msgspec.Struct, omit_defaults=True):
    """Why a message is in `dead.letters`; its own bytes are the record's value, this is in the headers."""

    source_topic: str
    partition: int
    offset: int
    reason: str
    role: str
    at_ms: int
    times_seen: int = 1
