"""The roles of a stack as children: what each is told by its environment, and in which order they end."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.embedded.child import GIVES_WAY, ChildSpec

START_ORDER = ("control", "router", "scheduler", "metering", "answers", "sink", "worker", "ingress")
STOP_ORDER = ("ingress", "worker", "scheduler", "router", "metering", "answers", "sink", "control")
"""Callers are let go first, then work runs out along the stream; what counts and stores it ends last."""
_DRAINING = ("ingress", "worker")
_SPARE_SECONDS = 5.0


class BadReplicas(ValueError):
    """A `role=N` that names no role, or no count from 1 to 16; the text says which."""


def parse_replicas(wishes: list[str]) -> dict[str, int]:
    """`["ingress=2"]` to a count for every role; 1 for those not named. Raises BadReplicas."""
    counts = dict.fromkeys(START_ORDER, 1)
    for wish in wishes:
        role, _, number = wish.partition("=")
        if role not in counts:
            raise BadReplicas(f"{wish!r}: {role!r} is none of {', '.join(START_ORDER)}")
        if not number.isdecimal() or not 1 <= int(number) <= 16:
            raise BadReplicas(f"{wish!r}: the count must be a number from 1 to 16")
        counts[role] = int(number)
    return counts


def headrace_command() -> tuple[str, ...]:
    """The `headrace` console script beside this interpreter, or the same by module where it is not installed."""
    script = Path(sys.executable).parent / "headrace"
    return (str(script),) if script.exists() else (sys.executable, "-c", "from headrace.cli import main; main()")


def memory_shares(workers: int) -> dict[str, str]:
    """What tells the workers of one machine their parts of its memory, where whoever runs them has not."""
    said = any(os.environ.get(name) for name in ("HEADRACE_WORKER_MEMORY", "HEADRACE_WORKER_MEMORY_SHARE"))
    return {} if said or workers == 1 else {"HEADRACE_WORKER_MEMORY_SHARE": f"{1_000_000 // workers / 1_000_000}"}


def role_spec(role: str, index: int, environment: Mapping[str, str], drain_seconds: float) -> ChildSpec:
    """Replica `index` (from 1) of a role. Its instance name stays the same over restarts: Kafka then knows it again."""
    name = f"{role}-{index}"
    own = {"HEADRACE_INSTANCE": name, "MALLOC_ARENA_MAX": "2"}
    if role == "worker":
        own["HEADRACE_WORKER_ID"] = f"w{index}"
    return ChildSpec(
        name,
        (*headrace_command(), "run", role),
        call=("headrace.process:run_role", role),
        env={**environment, **own},
        stop_seconds=_SPARE_SECONDS + (drain_seconds if role in _DRAINING else _SPARE_SECONDS),
        nice=GIVES_WAY if role == "sink" else 0,
    )


def prepare_spec(environment: Mapping[str, str], workers: int) -> ChildSpec:
    """The process that makes topics and tables and puts the configuration into force, once, while a stack starts."""
    names = tuple(f"w{index}" for index in range(1, workers + 1))
    argv = (sys.executable, "-m", "deploy.embedded.prepare", *names)
    return ChildSpec("prepare", argv, call=("deploy.embedded.prepare:main", *names), env=environment)
