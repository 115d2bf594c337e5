"""A workload: devices, models, tenants, what arrives and what breaks, as one JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from schemas.events import Priority

Name = Annotated[str, Meta(min_length=1)]
Positive = Annotated[int, Meta(gt=0)]
Seconds = Annotated[float, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0)]


class WorkloadError(ValueError):
    """A workload cannot be run; the text names the field and says why."""


class DeviceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Memory that models share; each device is a worker of its own."""

    id: Name
    bytes: Positive


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model. Tokens per second are those of one stream, at up to `max_concurrency` streams."""

    id: Name
    bytes: Positive
    load_s: Seconds
    prefill_tokens_s: Rate
    decode_tokens_s: Rate
    max_concurrency: Positive = 4
    pinned: bool = False


class TenantSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tenant and its share."""

    id: Name
    weight: Rate = 1.0


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request: it is served in time if its prefill ends within `slo_s` of `t` (seconds)."""

    t: Seconds
    id: Name
    tenant: Name
    model: Name
    prompt_tokens: Positive
    output_tokens: Positive
    slo_s: Rate
    priority: Literal["interactive", "standard", "batch"] = "standard"

    @property
    def lane(self) -> Priority:
        """Its priority as the policy knows it."""
        return Priority[self.priority.upper()]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`worker_lost` takes a device with all that it holds and runs, `worker_back` brings it back empty, `load_fails`
    lets the load that is going on there fail at its end, or the next one."""

    t: Seconds
    kind: Literal["worker_lost", "worker_back", "load_fails"]
    device: Name


class TrainingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A training job that is there from `t` on: it needs `seconds` on a device, with `bytes` of it, any device.

    It takes `notice_s` to write its checkpoint and leave, after which it can go on where it stopped.
    """

    t: Seconds
    id: Name
    bytes: Positive
    seconds: Rate
    notice_s: Seconds = 5.0


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a run is given. Tenants that are not listed at all have a weight of 1 each."""

    devices: Annotated[list[DeviceSpec], Meta(min_length=1)]
    models: Annotated[list[ModelSpec], Meta(min_length=1)]
    arrivals: list[Arrival]
    tenants: list[TenantSpec] = []
    faults: list[Fault] = []
    training: list[TrainingSpec] = []

    def weights(self) -> dict[str, float]:
        """The share of each tenant that is listed or asks."""
        listed = {tenant.id: tenant.weight for tenant in self.tenants}
        return listed or {arrival.tenant: 1.0 for arrival in self.arrivals}


def parse(text: bytes) -> Workload:
    """Read and check a workload's JSON. Raises WorkloadError, which names the field."""
    try:
        workload = msgspec.json.decode(text, type=Workload)
    except msgspec.DecodeError as error:
        raise WorkloadError(f"not a workload: {error}") from error
    check(workload)
    return workload


def check(workload: Workload) -> None:
    """Names must be unique and known. Raises WorkloadError."""
    _unique("devices", (device.id for device in workload.devices))
    _unique("models", (model.id for model in workload.models))
    _unique("tenants", (tenant.id for tenant in workload.tenants))
    _unique("arrivals", (arrival.id for arrival in workload.arrivals))
    _unique("training", (job.id for job in workload.training))
    _known("arrivals", "model", [arrival.model for arrival in workload.arrivals], {one.id for one in workload.models})
    if workload.tenants:
        names = [arrival.tenant for arrival in workload.arrivals]
        _known("arrivals", "tenant", names, {tenant.id for tenant in workload.tenants})
    _known("faults", "device", [fault.device for fault in workload.faults], {one.id for one in workload.devices})


def _unique(kind: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for at, name in enumerate(names):
        if name in seen:
            raise WorkloadError(f"$.{kind}[{at}].id: {name!r} is there twice")
        seen.add(name)


def _known(kind: str, field: str, names: Sequence[str], known: set[str]) -> None:
    for at, name in enumerate(names):
        if name not in known:
            raise WorkloadError(f"$.{kind}[{at}].{field}: {name!r} is not one of {', '.join(sorted(known))}")
