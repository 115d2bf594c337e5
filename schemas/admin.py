"""Answers and bodies of the admin API: how models, workers and leases stand, and what may be asked of them.

Times are Unix milliseconds, sizes bytes, durations milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from schemas.admin_records import Page
from schemas.events import PoolCommandKind

Text = Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True)]


class LeaseView(BaseModel):
    """A lease that has not ended: the right of a worker to hold a model."""

    pool: str
    worker: str
    model: str
    device: str
    """Empty where the model takes no memory that is counted."""
    state: str
    """`granted`, `loading`, `active`, `draining`, `releasing` or `quarantined`."""
    bytes: int
    epoch: int
    since_ms: int
    """When it came into this state."""
    reason: str
    """Why it is in this state, where somebody said so."""


class PriceView(BaseModel):
    """Money for a million tokens, as decimal strings."""

    input: str
    output: str
    cached: str
    currency: str
    version: int


class FactsView(BaseModel):
    """What a model is, as a worker's provider told; empty and 0 where it does not tell."""

    worker: str
    told_ms: int
    version: str
    """Another one when the backend would load other weights."""
    architecture: str
    parameters: int
    quantisation: str
    context_length: int
    """Tokens that it was trained for, or is served with."""
    layers: int
    chat_template: bool
    template_digest: str
    capabilities: list[str]
    weight_bytes: int


class ModelView(BaseModel):
    """A model: how it is configured, and how it stands."""

    id: str
    aliases: list[str]
    provider: str
    backend_tag: str
    pool: str
    enabled: bool
    capabilities: list[str]
    fallbacks: list[str]
    preload: bool
    pinned: bool
    keep_alive_ms: int | None
    """How long it keeps its memory unused; null until another model wants it."""
    context_length: int
    max_concurrency: int
    bytes: int
    """Device memory that it is expected to take; 0 where none is counted."""
    load_ms: int
    price: PriceView
    """The one in force."""
    origin: Literal["file", "api"]
    """Whether `headrace.toml` names it, or it was made by the admin API or the command line."""
    default_max_tokens: int | None
    rate_limit_rpm: int | None
    rate_limit_tpm: int | None
    concurrency_limit: int | None
    adapters: dict[str, str]
    state: str
    """`active`, `loading`, `draining`, `failed`, `unloaded`, or `unknown` while the pool's scheduler is not heard."""
    error: str | None
    """Why nobody can serve it: it could not be loaded, or its provider's circuit breaker is open everywhere."""
    asked: Literal["load", "unload"] | None
    """What an operator asked for that is in force: it is to be loaded, or to stay out until it is called."""
    queued: int
    running: int
    estimated_wait_ms: int | None
    """Expected wait of a request that comes now; null while nobody can tell."""
    last_used_ms: int | None
    progress: str | None
    """How far a load is that takes long, such as a download."""
    facts: FactsView | None
    """Null until a worker has told."""
    warnings: list[str]
    """What its record says that the model itself does not bear out."""
    leases: list[LeaseView]


class ModelViews(Page):
    """The answer of `GET /admin/models`."""

    data: list[ModelView]


class DeviceView(BaseModel):
    """Memory of a worker that models share."""

    id: str
    bytes: int
    """What models may take together."""
    held_bytes: int
    """What leases hold of it."""
    utilisation: float | None = None
    """Share of the last moments in which it computed, 0 to 1; null where its driver does not tell."""


class ResidentView(BaseModel):
    """A model on a worker, as the worker tells."""

    model: str
    state: str
    device: str
    epoch: int
    bytes: int
    """Memory that it was seen to take; 0 where nobody can tell."""
    error: str | None
    progress: str | None
    """How far its load is, where that takes long."""


class WorkerView(BaseModel):
    """A worker, by its last heartbeat."""

    id: str
    pool: str
    status: Literal["ready", "stopping", "silent"]
    """`silent` when it was not heard for 3 s."""
    boot: str
    heard_ms: int
    age_ms: int
    """How long ago that was."""
    providers: list[str]
    broken: dict[str, str]
    """Providers whose circuit breaker is open there -> why."""
    devices: list[DeviceView]
    residents: list[ResidentView]
    running: int


class WorkerViews(Page):
    """The answer of `GET /admin/workers`."""

    data: list[WorkerView]


class LeaseViews(Page):
    """The answer of `GET /admin/leases`."""

    data: list[LeaseView]


class LeaseRelease(BaseModel):
    """The body of `POST /admin/leases/release`."""

    model_config = ConfigDict(extra="forbid")

    worker: Text
    model: Text
    reason: Text
    """How it is known that the bytes are free; it is kept with the lease."""


class WishTaken(BaseModel):
    """A wish is on its way to the pool's scheduler, which obeys it once, within a minute or not at all."""

    id: str
    pool: str
    kind: PoolCommandKind
    model: str
    worker: str
