"""The result of a run: one JSON file, and tables for a reader."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from rich.console import Console
from rich.table import Table

from bench.gateway.figures import Percentiles
from bench.gateway.measure import Measurement
from bench.gateway.targets import Verdict
from bench.gateway.usage import Usage

COLOURS = {"stretch": "bold green", "met": "green", "missed": "red"}


class Machine(msgspec.Struct, kw_only=True):
    """What the figures were measured on."""

    cores: int | None
    system: str
    python: str
    load_before: float
    """One-minute load average when the run began: above 0.5 something else was running too."""


class Report(msgspec.Struct, kw_only=True):
    """All figures of a run. Times are milliseconds where nothing else is said."""

    kind: str
    started: str
    quick: bool
    machine: Machine
    floor: Percentiles | None = None
    """One aiokafka hop on the stack's broker."""
    idle: Usage | None = None
    measurements: list[Measurement] = []
    verdicts: list[Verdict] = []
    notes: list[str] = []
    """What could not be measured, and why."""


def this_machine() -> Machine:
    """What the figures are about to be measured on."""
    return Machine(
        cores=os.cpu_count(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        load_before=round(os.getloadavg()[0], 2),
    )


def new_report(kind: str, *, quick: bool) -> Report:
    """An empty report of now, on this machine."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return Report(kind=kind, started=started, quick=quick, machine=this_machine())


def show(report: Report, console: Console) -> None:
    """Print a report as tables."""
    machine = report.machine
    console.print(
        f"{report.started} · {machine.cores} cores · {machine.system} · Python {machine.python} · "
        f"load before {machine.load_before}",
        highlight=False,
    )
    if report.measurements:
        console.print(measurement_table(report.measurements))
    if report.floor:
        console.print(f"one Kafka hop: p50 {report.floor.p50:.2f} ms, p99 {report.floor.p99:.2f} ms", highlight=False)
    if report.verdicts:
        console.print(verdict_table(report.verdicts))
    for note in report.notes:
        console.print(f"[yellow]{note}[/]", highlight=False)


def measurement_table(measurements: Sequence[Measurement]) -> Table:
    """One row a scenario and subject; rows of a scenario stand together."""
    table = Table(
        title="Gateway: p50 / p99 in ms; wrong tokens: lost/doubled/reordered/foreign; "
        "CPU and peak RSS of the subject; stolen: CPU time that a hypervisor gave to others"
    )
    table.add_column("scenario", no_wrap=True)
    table.add_column("subject", no_wrap=True)
    for column in ("TTFT", "token delay", "stall-free", "wrong tokens", "errors", "requests/s", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("CPU ms/req", "tok/CPU-s", "RSS MiB", "stolen"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = ""
    for one in sorted(measurements, key=lambda item: _first_seen(measurements, item.scenario)):
        load, order = one.load, one.load.order
        if previous and previous != one.scenario:
            table.add_section()
        table.add_row(
            one.scenario if one.scenario != previous else "",
            one.subject,
            f"{load.ttft.p50:,.1f} / {load.ttft.p99:,.1f}",
            f"{load.delay.p50:,.1f} / {load.delay.p99:,.1f}",
            f"{load.stall_free:.1%}",
            f"{order.lost}/{order.doubled}/{order.reordered}/{order.foreign}",
            str(sum(load.errors.values())),
            f"{load.requests_per_second:,.0f}",
            f"{load.tokens_per_second:,.0f}",
            f"{one.cpu_ms_per_request():.2f}" if one.usage else "",
            f"{one.tokens_per_cpu_second():,.0f}" if one.usage else "",
            f"{one.usage.rss_peak:,.0f}" if one.usage else "",
            f"{one.stolen:.1%}",
        )
        previous = one.scenario
    return table


def _first_seen(measurements: Sequence[Measurement], scenario: str) -> int:
    return next(at for at, one in enumerate(measurements) if one.scenario == scenario)


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Each target beside its figure."""
    table = Table(title="Targets")
    for column in ("target", "figure", "goal", "verdict"):
        table.add_column(column)
    for verdict in verdicts:
        table.add_row(verdict.target, verdict.figure, verdict.goal, f"[{COLOURS[verdict.outcome]}]{verdict.outcome}[/]")
    return table
