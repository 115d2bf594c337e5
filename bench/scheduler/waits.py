"""How honest the policy's estimates are: the wait that each request is told about, and the one that it then has.

Nobody is refused here, and whoever still waits after its SLO leaves then, so that what would have been refused can be
seen to be served.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from statistics import median

import msgspec

from bench.scheduler.engine import Engine, Job
from bench.scheduler.generators import SECONDS, generate
from bench.scheduler.headrace import DAY_MS, Headrace
from bench.scheduler.sweep import FULL, LOAD_JITTER, LONGEST_S
from processors.scheduler.messages import Arrived, CancelAsked
from processors.scheduler.policy import estimated_wait_ms
from processors.scheduler.state import Request


class Told(msgspec.Struct, frozen=True):
    """One request. Times are milliseconds."""

    estimate_ms: int
    """The wait that was expected when it came."""
    waited_ms: int
    """Until it was begun, or its caller left."""
    slo_ms: int
    begun: bool
    held: bool
    """Whether somebody held its model when it came, or was about to."""

    @property
    def refused(self) -> bool:
        """Whether it would have been."""
        return self.estimate_ms > self.slo_ms

    @property
    def error_ms(self) -> int:
        """By how much the estimate was wrong; at least, where the request was not begun."""
        off_ms = self.estimate_ms - self.waited_ms
        return abs(off_ms) if self.begun else max(0, -off_ms)


class Waits(msgspec.Struct, frozen=True):
    """The estimates on a workload. Errors are medians in seconds, the rest shares of all requests."""

    workload: str
    rate: float
    requests: int
    error_s: float
    error_unheld_s: float
    """Of those whose model nobody held."""
    refused_falsely: float
    """Would have been refused, and were begun in time."""
    refused_rightly: float
    late: float
    """Would not have been refused, and were not begun in time."""


class _Patient(Headrace):
    """Tells the policy of no SLO, so that it refuses nothing, and notes what it expects of each request."""

    def __init__(self, engine: Engine) -> None:
        self.expected: dict[str, tuple[int, bool]] = {}
        """Request -> (estimate in milliseconds, whether its model was held)."""
        super().__init__(engine)

    def on_arrival(self, job: Job) -> None:
        spec, now_ms, pool = job.spec, job.arrived_ms, self._pool
        held = any(lease.coming for lease in pool.of_model(spec.model))
        wait_ms = estimated_wait_ms(pool, pool.models[spec.model], now_ms, spec.tenant, spec.lane)
        self.expected[spec.id] = (wait_ms, held)
        self._engine.after(slo_ms(job) + 1, partial(self._leave, job))
        self._tell(
            Arrived(
                Request(
                    spec.id, spec.tenant, spec.model, now_ms, now_ms + DAY_MS,
                    priority=spec.lane, prompt_tokens=spec.prompt_tokens,
                )
            )
        )  # fmt: skip

    def _leave(self, job: Job) -> None:
        if job.open and job.started_ms is None:
            self._engine.end(job, "expired")
            self._tell(CancelAsked(job.spec.id, "The caller left.", job.spec.tenant))


def slo_ms(job: Job) -> int:
    """How long a request may wait."""
    return round(job.spec.slo_s * 1000)


def measure(name: str, rate: float, *, seeds: Iterable[int] = range(1, 1 + FULL.seeds)) -> Waits:
    """Run a built-in workload at a rate, as long as a sweep does, and compare."""
    told: list[Told] = []
    for seed in seeds:
        seconds = min(LONGEST_S, max(SECONDS, FULL.requests / rate))
        drivers: list[_Patient] = []

        def policy(engine: Engine, drivers: list[_Patient] = drivers) -> _Patient:
            drivers.append(_Patient(engine))
            return drivers[-1]

        workload = generate(name, rate=rate, seed=seed, seconds=seconds)
        engine = Engine(workload, policy, seed=seed, load_jitter=LOAD_JITTER)
        engine.run()
        told += [_told(job, *drivers[-1].expected[job.spec.id]) for job in engine.jobs.values()]
    return summary(name, rate, told)


def _told(job: Job, estimate_ms: int, held: bool) -> Told:
    begun_ms = job.started_ms
    waited_ms = slo_ms(job) if begun_ms is None else begun_ms - job.arrived_ms
    return Told(estimate_ms, waited_ms, slo_ms(job), begun=begun_ms is not None, held=held)


def summary(name: str, rate: float, told: list[Told]) -> Waits:
    """The figures of so many requests; there must be one."""

    def share(of: Iterable[bool]) -> float:
        return sum(of) / len(told)

    return Waits(
        workload=name,
        rate=rate,
        requests=len(told),
        error_s=median(one.error_ms for one in told) / 1000,
        error_unheld_s=median([one.error_ms for one in told if not one.held] or [0]) / 1000,
        refused_falsely=share(one.refused and one.begun for one in told),
        refused_rightly=share(one.refused and not one.begun for one in told),
        late=share(not one.refused and not one.begun for one in told),
    )
