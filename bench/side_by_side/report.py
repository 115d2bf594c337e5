"""The result of a side-by-side run: one JSON file, and tables in which each server is a column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec
from rich.console import Console
from rich.table import Table

from bench.gateway.figures import Percentiles
from bench.gateway.report import Machine, this_machine
from bench.side_by_side.figures import Figures, Outcome, Tenant

MIB = 1024 * 1024


class Report(msgspec.Struct, kw_only=True):
    """All figures of a run. Times are milliseconds where nothing else is said."""

    kind: str
    started: str
    seed: int
    seconds: float
    requests: int
    machine: Machine
    figures: list[Figures] = []
    budgets: dict[str, int] = {}
    """Subject -> bytes that its models may take; 0 where it is told how many models."""


def new_report(seed: int, seconds: float, requests: int) -> Report:
    """An empty report of now, on this machine."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return Report(
        kind="side-by-side", started=started, seed=seed, seconds=seconds, requests=requests, machine=this_machine()
    )


def show(report: Report, console: Console) -> None:
    """Print a report as tables."""
    console.print(
        f"{report.started} · {report.requests} requests in {report.seconds:g} s, seed {report.seed} · "
        f"{report.machine.cores} cores · load before {report.machine.load_before}",
        highlight=False,
    )
    console.print(whole_table(report.figures))
    console.print(tenant_table(report.figures))
    for one in report.figures:
        for note in one.notes:
            console.print(f"{one.subject}: {note}", highlight=False, markup=False)


def whole_table(figures: Sequence[Figures]) -> Table:
    """A row for each figure."""
    table = Table("", *(one.subject for one in figures), title="The same requests, one server after the other")
    for end in Outcome:
        table.add_row(end.value, *(str(one.outcomes[end.value]) for one in figures))
    table.add_section()
    rows: list[tuple[str, Callable[[Figures], str]]] = [
        ("engine alone, tokens/s of one stream", lambda one: f"{one.alone_tokens_s:.1f}"),
        ("of prompts beyond the context", lambda one: str(one.too_long)),
        ("first token p50 / p95 / p99, s", lambda one: _seconds(one.first)),
        ("switches (engines started)", lambda one: str(one.machine.loads)),
        ("engines, most MiB resident", lambda one: f"{one.machine.engines_peak / MIB:,.0f}"),
        ("all processes, most MiB", lambda one: f"{one.machine.all_peak / MIB:,.0f}"),
        ("whole run, s", lambda one: f"{one.seconds:.1f}"),
    ]
    for label, value in rows:
        table.add_row(label, *map(value, figures))
    for same in zip(*(one.leaving for one in figures), strict=True):
        label = f"left in the {same[0].moment}: engine's CPU s after, mean / most"
        table.add_row(label, *(f"{one.busy_s:.1f} / {one.busy_most_s:.1f}" for one in same))
    return table


def tenant_table(figures: Sequence[Figures]) -> Table:
    """What each tenant got; the modest ones beside the greedy one."""
    table = Table("tenant", "", *(one.subject for one in figures), title="Tenants")
    rows: list[tuple[str, Callable[[Tenant], str]]] = [
        ("answered of asked", lambda one: f"{one.answered} of {one.asked}"),
        ("completion tokens", lambda one: str(one.tokens)),
        ("first token p50 / p95 / p99, s", lambda one: _seconds(one.first)),
        ("whole answer p50 / p95 / p99, s", lambda one: _seconds(one.waited)),
    ]
    for at, tenant in enumerate(figures[0].tenants if figures else ()):
        for label, value in rows:
            table.add_row(tenant.tenant if label == rows[0][0] else "", label, *(value(f.tenants[at]) for f in figures))
        table.add_section()
    return table


def _seconds(found: Percentiles) -> str:
    return f"{found.p50 / 1000:.1f} / {found.p95 / 1000:.1f} / {found.p99 / 1000:.1f}"
