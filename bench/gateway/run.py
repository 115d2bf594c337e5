"""`python -m bench.gateway run`: one run that measures Headrace against the direct path and the broker's own hop."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec
from rich.console import Console

from bench.gateway import stack
from bench.gateway.client import Target
from bench.gateway.figures import Percentiles
from bench.gateway.measure import ROOT, LoadFailed, Subject
from bench.gateway.report import Report, new_report
from bench.gateway.scenarios import Scenario
from bench.gateway.targets import judge
from bench.gateway.usage import Meter, Usage

SETTLE_SECONDS = 5.0
"""Between warm-up and the idle measurement."""
FLOOR_SECONDS = 60.0


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def work_directory(keep: Path | None = None) -> Iterator[Path]:
    """A directory for logs and data, deleted at the end unless one to keep is given; SIGTERM ends like Ctrl-C."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _interrupt)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def floor(bootstrap: str, *, quick: bool) -> Percentiles:
    """One Kafka hop, measured from a process of its own. Raises LoadFailed."""
    command = [
        sys.executable,
        "-m",
        "bench.gateway.floor",
        "--bootstrap",
        bootstrap,
        "--count",
        "200" if quick else "500",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=FLOOR_SECONDS, check=False)
    if done.returncode != 0:
        raise LoadFailed(done.stderr.decode(errors="replace")[-2000:])
    return msgspec.json.decode(done.stdout, type=Percentiles)


def idle(subject: Subject, seconds: float) -> Usage | None:
    """What a subject uses while nobody calls it."""
    with Meter(subject.roots, settle=seconds) as meter:
        pass
    return meter.usage


def compare(subjects: Sequence[Subject], wanted: Sequence[Scenario], report: Report, console: Console) -> None:
    """Run every scenario on every subject, side by side in time, into the report."""
    for scenario in wanted:
        for subject in subjects:
            console.print(f"  {scenario.title}: {subject.name} …", highlight=False)
            report.measurements.append(subject.measure(scenario))


def run(
    wanted: Sequence[Scenario],
    *,
    quick: bool,
    console: Console,
    keep: Path | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    roots: Sequence[int] = (),
    upstream_port: int = 0,
) -> Report:
    """Start the upstream and a stack, measure, stop both, and return the report.

    The hop is measured before and after the loads, and the faster one counts: noise must not ease a target.

    With `base_url` nothing but the upstream is started, on `upstream_port`: that endpoint is measured, which must pass
    on to the upstream, and `roots` are the process ids whose trees it consists of.
    """
    report = new_report("gateway", quick=quick)
    with work_directory(keep) as directory, ExitStack() as running:
        upstream = running.enter_context(stack.upstream(directory, upstream_port))
        direct = Subject(name="direct", target=Target(base_url=upstream))
        console.print(f"upstream {upstream}, logs in {directory}", highlight=False)
        if base_url is None:
            console.print("starting the stack …", highlight=False)
            subject = running.enter_context(stack.headrace(directory, upstream))
        else:
            subject = Subject(name="headrace", target=Target(base_url=base_url, api_key=api_key), roots=list(roots))
        for warmed in (direct, subject):
            warmed.warm_up()
        if subject.roots:
            console.print("  idle …", highlight=False)
            time.sleep(SETTLE_SECONDS)
            report.idle = idle(subject, 5.0 if quick else 20.0)
        broker = stack.bootstrap(directory) if base_url is None else None
        before = floor(broker, quick=quick) if broker else None
        compare([direct, subject], wanted, report, console)
        after = floor(broker, quick=quick) if broker else None
        report.floor = min((one for one in (before, after) if one), key=lambda one: one.p50, default=None)
    report.verdicts = judge(report.measurements, report.floor, report.idle)
    return report
