"""One measurement: a scenario's load on one subject, with what the subject's processes used meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from bench.gateway.client import Plan, Target
from bench.gateway.figures import Load
from bench.gateway.scenarios import WARM_UP, Scenario
from bench.gateway.usage import Meter, StolenTime, Usage

KEY_VARIABLE = "HEADRACE_BENCH_KEY"
ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 300.0
MARGIN_SECONDS = 60.0
"""What a load may take beyond the times of its plan before it is given up."""


class Measurement(msgspec.Struct, kw_only=True):
    """Figures of one scenario on one subject."""

    subject: str
    scenario: str
    load: Load
    usage: Usage | None = None
    """Of the subject's process tree; None for the direct path."""
    stolen: float = 0.0
    """Share of the machine's CPU time that a hypervisor gave to others meanwhile: above 0.01 the figures are its."""

    def tokens_per_cpu_second(self) -> float:
        """Tokens that one CPU second of the subject carried; 0 when it has no processes of its own."""
        return self.load.tokens / self.usage.cpu_seconds if self.usage and self.usage.cpu_seconds else 0.0

    def cpu_ms_per_request(self) -> float:
        """CPU milliseconds of the subject per request."""
        return self.usage.cpu_seconds / self.load.requests * 1000 if self.usage and self.load.requests else 0.0


class LoadFailed(RuntimeError):
    """A measuring process ended with an error; the text is its own."""


class Subject(msgspec.Struct, kw_only=True):
    """Something to measure: where to call it, and the roots of its process trees (none for the direct path)."""

    name: str
    target: Target
    roots: list[int] = []

    def run(self, plan: Plan) -> Load:
        """Put a load on it from a process of its own. Raises LoadFailed."""
        command = [sys.executable, "-m", "bench.gateway.client", *_arguments(self.target, plan)]
        environment = {**os.environ, KEY_VARIABLE: self.target.api_key or ""}
        limit = plan.rounds * plan.timeout_seconds if plan.seconds is None else plan.seconds + plan.timeout_seconds
        timeout = min(limit, LONGEST_SECONDS) + MARGIN_SECONDS
        try:
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise LoadFailed(f"the load client was still running after {timeout:.0f} s") from error
        if done.returncode != 0:
            raise LoadFailed(done.stderr.decode(errors="replace")[-2000:])
        return msgspec.json.decode(done.stdout, type=Load)

    def warm_up(self) -> None:
        """A small load that does not count. Raises LoadFailed when none of it is answered."""
        load = self.run(WARM_UP)
        if sum(load.errors.values()) == load.requests:
            raise LoadFailed(f"{self.name} answered no warm-up request: {load.errors}")

    def measure(self, scenario: Scenario) -> Measurement:
        """Run a scenario and note what the subject's processes used."""
        with StolenTime() as stolen:
            load, usage = self._metered(scenario.plan)
        return Measurement(subject=self.name, scenario=scenario.name, load=load, usage=usage, stolen=stolen.share)

    def _metered(self, plan: Plan) -> tuple[Load, Usage | None]:
        if not self.roots:
            return self.run(plan), None
        with Meter(self.roots) as meter:
            load = self.run(plan)
        return load, meter.usage


def _arguments(target: Target, plan: Plan) -> list[str]:
    """The client's command line for a plan."""
    arguments = ["--base-url", target.base_url, "--model", target.model, "--api-key-env", KEY_VARIABLE]
    arguments.append("--sends-done" if target.sends_done else "--no-sends-done")
    for name, value in target.headers.items():
        arguments += ["--header", f"{name}: {value}"]
    for name in plan.__struct_fields__:
        value = getattr(plan, name)
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            arguments += [f"--{option}", str(value)]
    return arguments
