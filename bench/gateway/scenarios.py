"""What is measured: each scenario is a load that runs against every subject alike."""

from __future__ import annotations

import msgspec

from bench.gateway.client import Plan

ARRIVALS_PER_SECOND = 100
"""Streams begin at this rate, so that a run of N streams tests N streams and not a burst of N arrivals."""
WARM_UP = Plan(callers=32, tokens=16, interval_ms=5, rounds=10_000, seconds=20, ramp_seconds=0.5, timeout_seconds=20)
"""What every subject does before it is measured, so that its machine code is compiled: users are served by processes
that have run for hours."""


class Scenario(msgspec.Struct, kw_only=True, frozen=True):
    """A named load."""

    name: str
    title: str
    plan: Plan


def _streams(callers: int, seconds: float) -> Scenario:
    return Scenario(
        name=f"streams-{callers}",
        title=f"{callers} streams, 20 tokens/s",
        plan=Plan(
            callers=callers,
            tokens=int(seconds * 20),
            interval_ms=50,
            ramp_seconds=callers / ARRIVALS_PER_SECOND,
            timeout_seconds=seconds * 2 + 60,
        ),
    )


def scenarios(*, quick: bool = False) -> list[Scenario]:
    """All scenarios in the order in which they run; `quick` ones are shorter and fewer.

    The heaviest comes last: a subject that it overloads works on at the leftovers for a while.
    """
    one = Scenario(
        name="ttft-1",
        title="1 stream after another",
        plan=Plan(callers=1, tokens=4, interval_ms=10, rounds=50 if quick else 200, ramp_seconds=0),
    )
    short = Scenario(
        name="short-64",
        title="64 callers, short answers, 20 ms upstream",
        plan=Plan(
            callers=64,
            stream=False,
            tokens=8,
            interval_ms=0,
            ttft_ms=20,
            rounds=1_000_000,
            seconds=5.0 if quick else 10.0,
            ramp_seconds=0.5,
            timeout_seconds=60,
        ),
    )
    if quick:
        return [one, short, _streams(50, 5), _streams(500, 7)]
    return [one, short, _streams(50, 12), _streams(200, 12), _streams(500, 16)]
