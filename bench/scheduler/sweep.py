"""The sweep: each built-in workload at rising rates, and the highest at which a policy keeps its promise."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from bench.scheduler.generators import SECONDS, SHAPES, generate
from bench.scheduler.policies import POLICIES, simulate

TARGET = 0.9
"""Share of requests that must be served within their SLO."""
LOAD_JITTER = 0.1
"""Loads take up to this share longer than their models' `load_s`, which is what policies expect."""
GIVE_UP = 2
"""So many rates in a row below the target end a policy's curve."""
LOWER_STEPS = 6
"""How often a rate is halved for a policy that misses the target at the first one."""
LONGEST_S = 1_800.0


class Effort(msgspec.Struct, frozen=True):
    """How exact a sweep is."""

    factor: float
    """Between two rates."""
    seeds: int
    requests: int
    """Low rates are run for longer, until so many requests are to be expected."""


FULL = Effort(factor=math.sqrt(2), seeds=3, requests=200)
QUICK = Effort(factor=2.0, seeds=1, requests=100)


class Point(msgspec.Struct):
    """A policy at a rate: means over the seeds. Times are seconds, rates per second."""

    rate: float
    slo_attainment: float
    goodput: float
    shed_rate: float
    ttft_p50_s: float
    ttft_p95_s: float
    swaps: float
    jain: float
    trained_share: float
    """Of the run, the part in which each training job trained; 0 where there is none."""
    slo_by_seed: list[float]
    shed_by_seed: list[float]


class Curve(msgspec.Struct):
    """A policy on a workload."""

    policy: str
    capacity: float | None
    """Highest rate at which the target is met, interpolated between the last that meets it and the next above; None
    when none does."""
    points: list[Point]


class WorkloadSweep(msgspec.Struct):
    """All policies on a workload."""

    workload: str
    about: str
    curves: list[Curve]

    def capacity(self, policy: str) -> float | None:
        """Of one policy."""
        return next(curve.capacity for curve in self.curves if curve.policy == policy)

    def ratio(self, other: str) -> float | None:
        """Headrace's capacity over another policy's; None where either has none."""
        ours, theirs = self.capacity("headrace"), self.capacity(other)
        return ours / theirs if ours and theirs else None


class SweepReport(msgspec.Struct, kw_only=True):
    """The whole sweep."""

    kind: str = "scheduler"
    started: str
    quick: bool
    python: str
    target: float = TARGET
    load_jitter: float = LOAD_JITTER
    seed: int
    sweeps: list[WorkloadSweep]


def sweep(*, quick: bool, seed: int, names: list[str], progress: Callable[[str], None]) -> SweepReport:
    """Sweep these workloads; `progress` is told what comes next."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    effort = QUICK if quick else FULL
    sweeps = []
    for name in names:
        curves = []
        for policy in POLICIES:
            progress(f"{name}: {policy}")
            curves.append(_curve(name, policy, effort, seed))
        sweeps.append(WorkloadSweep(name, SHAPES[name].about, curves))
    return SweepReport(started=started, quick=quick, python=platform.python_version(), seed=seed, sweeps=sweeps)


def _curve(name: str, policy: str, effort: Effort, seed: int) -> Curve:
    rate = SHAPES[name].rate
    points = [_point(name, policy, rate, effort, seed)]
    for _ in range(LOWER_STEPS):
        if points[0].slo_attainment >= TARGET:
            break
        points.insert(0, _point(name, policy, points[0].rate / 2, effort, seed))
    missed = 0 if points[-1].slo_attainment >= TARGET else 1
    while missed < GIVE_UP:
        points.append(_point(name, policy, points[-1].rate * effort.factor, effort, seed))
        missed = 0 if points[-1].slo_attainment >= TARGET else missed + 1
    return Curve(policy, capacity(points), points)


def _point(name: str, policy: str, rate: float, effort: Effort, seed: int) -> Point:
    seconds = min(LONGEST_S, max(SECONDS, effort.requests / rate))
    runs = [
        simulate(generate(name, rate=rate, seed=one, seconds=seconds), policy, seed=one, load_jitter=LOAD_JITTER)
        for one in range(seed, seed + effort.seeds)
    ]

    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 4)

    return Point(
        rate=rate,
        slo_attainment=mean([run.slo_attainment for run in runs]),
        goodput=mean([run.goodput for run in runs]),
        shed_rate=mean([run.shed_rate for run in runs]),
        ttft_p50_s=mean([run.ttft_s.p50 for run in runs]),
        ttft_p95_s=mean([run.ttft_s.p95 for run in runs]),
        swaps=mean([run.swaps for run in runs]),
        jain=mean([run.jain for run in runs]),
        trained_share=mean([run.trained_share for run in runs]),
        slo_by_seed=[round(run.slo_attainment, 4) for run in runs],
        shed_by_seed=[round(run.shed_rate, 4) for run in runs],
    )


def capacity(points: list[Point]) -> float | None:
    """Where the curve last falls through the target, along the logarithm of the rate; points by rising rate."""
    met = [at for at, point in enumerate(points) if point.slo_attainment >= TARGET]
    if not met:
        return None
    last = points[met[-1]]
    if met[-1] + 1 == len(points):
        return last.rate
    after = points[met[-1] + 1]
    share = (last.slo_attainment - TARGET) / (last.slo_attainment - after.slo_attainment)
    return float(last.rate * (after.rate / last.rate) ** share)
