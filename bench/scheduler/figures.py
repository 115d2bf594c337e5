"""The figures of a run. Times are seconds from the beginning of the workload."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from bench.scheduler.engine import Engine, Job


class Percentiles(msgspec.Struct):
    """Of times in seconds; 0 where there was none."""

    p50: float
    p95: float
    p99: float


class RequestFigures(msgspec.Struct):
    """One request."""

    id: str
    tenant: str
    model: str
    outcome: str
    """`finished`, `rejected` or `expired` (the policy shed it), `abandoned` (its caller left) or `failed`."""
    in_slo: bool
    arrived_s: float
    started_s: float | None
    first_token_s: float | None
    ended_s: float
    device: str
    """The last that it ran on; empty if none."""


class TrainingFigures(msgspec.Struct):
    """One training job."""

    id: str
    trained_s: float
    """Of its work, what was done when the last request had its outcome."""
    begun: int
    """How often it began, or went on after it had given way."""
    done: bool


class Figures(msgspec.Struct, kw_only=True):
    """One run of one policy."""

    policy: str
    seed: int
    seconds: float
    """From the beginning to the last outcome."""
    goodput: float
    """Requests that finished within their SLO, per second."""
    slo_attainment: float
    """Share of requests that finished and whose first token came within their SLO."""
    shed_rate: float
    """Share of requests that the policy rejected, or let expire while they waited."""
    wait_s: Percentiles
    """Arrival to beginning of prefill, of the requests that were started."""
    ttft_s: Percentiles
    """Arrival to end of prefill, of the requests that came so far."""
    swaps: int
    """Models that were unloaded."""
    loads: int
    loading_s: float
    """Time that devices spent loading, all together."""
    jain: float
    """Jain's index of served tokens over weight, among the tenants that asked: 1 is even, 1/n is all to one."""
    outcomes: dict[str, int]
    tenants: dict[str, int]
    """Prompt and completion tokens that each was served."""
    requests: list[RequestFigures]
    training: list[TrainingFigures]

    @property
    def trained_share(self) -> float:
        """Mean share of the run in which a training job trained; 0 where there is none."""
        return sum(job.trained_s for job in self.training) / (len(self.training) * self.seconds or 1)


def figures(engine: Engine, policy: str, seed: int) -> Figures:
    """The figures of a run that is over."""
    jobs = list(engine.jobs.values())
    good = sum(within_slo(job) for job in jobs)
    outcomes = Counter(job.outcome for job in jobs)
    seconds = max((job.finished_ms or 0 for job in jobs), default=0) / 1000
    served = Counter({job.spec.tenant: 0 for job in jobs})
    for job in jobs:
        if job.first_ms is not None:
            served[job.spec.tenant] += job.spec.prompt_tokens + engine.tokens(job)
    weights = engine.workload.weights()
    return Figures(
        policy=policy,
        seed=seed,
        seconds=seconds,
        goodput=good / seconds if seconds else 0.0,
        slo_attainment=good / len(jobs) if jobs else 1.0,
        shed_rate=(outcomes["rejected"] + outcomes["expired"]) / len(jobs) if jobs else 0.0,
        wait_s=percentiles(job.started_ms - job.arrived_ms for job in jobs if job.started_ms is not None),
        ttft_s=percentiles(job.first_ms - job.arrived_ms for job in jobs if job.first_ms is not None),
        swaps=engine.swaps,
        loads=engine.loads,
        loading_s=engine.loading_ms / 1000,
        jain=jain([tokens / weights[tenant] for tenant, tokens in served.items()]),
        outcomes=dict(sorted(outcomes.items())),
        tenants=dict(sorted(served.items())),
        requests=[_of_request(job) for job in jobs],
        training=[
            TrainingFigures(job.spec.id, job.trained_ms(engine.now_ms) / 1000, job.begun, not job.left_ms)
            for job in engine.trainings.values()
        ],
    )


def within_slo(job: Job) -> bool:
    """Whether it finished, and its first token came in time."""
    if job.outcome != "finished" or job.first_ms is None:
        return False
    return job.first_ms - job.arrived_ms <= round(job.spec.slo_s * 1000)


def percentiles(times_ms: Iterable[int]) -> Percentiles:
    """By nearest rank, of milliseconds."""
    ordered = sorted(times_ms)
    return Percentiles(*(_nearest(ordered, share) for share in (0.5, 0.95, 0.99)))


def _nearest(ordered: Sequence[int], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1000 if ordered else 0.0


def jain(values: Sequence[float]) -> float:
    """Jain, Chiu and Hawe, "A Quantitative Measure of Fairness" (1984): (sum x)^2 / (n sum x^2); 1 when all are 0."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def _of_request(job: Job) -> RequestFigures:
    return RequestFigures(
        id=job.spec.id,
        tenant=job.spec.tenant,
        model=job.spec.model,
        outcome=job.outcome,
        in_slo=within_slo(job),
        arrived_s=job.arrived_ms / 1000,
        started_s=_seconds(job.started_ms),
        first_token_s=_seconds(job.first_ms),
        ended_s=(job.finished_ms or 0) / 1000,
        device=job.served_by,
    )


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000
