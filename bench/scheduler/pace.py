"""How fast the simulator runs: simulated seconds for each second of wall time, for every workload and policy."""

from __future__ import annotations

import time

import msgspec

from bench.scheduler.generators import SECONDS, SHAPES, generate
from bench.scheduler.policies import POLICIES, simulate


class Pace(msgspec.Struct):
    """One run of a policy on a built-in workload."""

    workload: str
    policy: str
    rate: float
    """Requests per second."""
    simulated_s: float
    """From the beginning to the last outcome."""
    wall_s: float

    @property
    def ratio(self) -> float:
        """Simulated seconds per second of wall time."""
        return self.simulated_s / self.wall_s


def measure(seconds: float = SECONDS) -> list[Pace]:
    """Run each workload near the load that Headrace's policy bears, under each policy, with arrivals for `seconds`."""
    return [_run(name, policy, seconds) for name in SHAPES for policy in POLICIES]


def _run(name: str, policy: str, seconds: float) -> Pace:
    rate = SHAPES[name].near
    workload = generate(name, rate=rate, seed=1, seconds=seconds)
    began = time.perf_counter()
    done = simulate(workload, policy, seed=1)
    return Pace(name, policy, rate, done.seconds, time.perf_counter() - began)
