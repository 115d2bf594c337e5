"""What a reader sees of figures and sweeps: tables."""

from __future__ import annotations

from rich.table import Table

from bench.scheduler.figures import Figures
from bench.scheduler.pace import Pace
from bench.scheduler.policies import POLICIES
from bench.scheduler.speed import Speed
from bench.scheduler.sweep import TARGET, SweepReport
from bench.scheduler.waits import Waits


def figures_table(run: Figures) -> Table:
    """One run."""
    table = Table(title=f"{run.policy}, seed {run.seed}", show_header=False)
    rows = {
        "requests": ", ".join(f"{number} {outcome}" for outcome, number in run.outcomes.items()),
        "goodput": f"{run.goodput:.3f} requests/s",
        "within SLO": f"{run.slo_attainment:.1%}",
        "shed": f"{run.shed_rate:.1%}",
        "wait p50 / p95 / p99": f"{run.wait_s.p50:.2f} / {run.wait_s.p95:.2f} / {run.wait_s.p99:.2f} s",
        "TTFT p50 / p95 / p99": f"{run.ttft_s.p50:.2f} / {run.ttft_s.p95:.2f} / {run.ttft_s.p99:.2f} s",
        "swaps, loads": f"{run.swaps}, {run.loads} ({run.loading_s:.1f} s)",
        "Jain's index": f"{run.jain:.3f}",
    }
    for job in run.training:
        rows[f"training {job.id}"] = f"{job.trained_s:.0f} s, begun {job.begun} times" + (", done" if job.done else "")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def sweep_table(report: SweepReport) -> Table:
    """The capacity of every policy on every workload, and Headrace's over some others'."""
    table = Table(title=f"Highest requests/s with {TARGET:.0%} of requests within their SLO")
    table.add_column("workload", no_wrap=True)
    ratios = ("ollama", "ollama-fast-path", "lru")
    for name in (*POLICIES, *(f"headrace / {other}" for other in ratios)):
        table.add_column(name, justify="right")
    for one in report.sweeps:
        capacities = [one.capacity(policy) for policy in POLICIES]
        cells = ["none" if value is None else f"{value:.3g}" for value in capacities]
        cells += ["" if (ratio := one.ratio(other)) is None else f"{ratio:.2f}" for other in ratios]
        table.add_row(one.workload, *cells)
    return table


def speed_table(speeds: list[Speed]) -> Table:
    """Steps of the policy, by kind of event."""
    table = Table(title="Steps of the policy")
    table.add_column("event")
    for name in ("steps", "µs/step", "steps/s"):
        table.add_column(name, justify="right")
    for one in speeds:
        table.add_row(one.event, f"{one.steps:,}", f"{one.seconds / one.steps * 1e6:,.1f}", f"{one.rate:,.0f}")
    return table


def pace_table(paces: list[Pace]) -> Table:
    """Simulated seconds per second of wall time, by workload and policy."""
    table = Table(title="Simulated seconds per second of wall time")
    for name in ("workload", "requests/s"):
        table.add_column(name, no_wrap=True)
    for policy in POLICIES:
        table.add_column(policy, justify="right")
    ratios = {(one.workload, one.policy): one.ratio for one in paces}
    for workload, rate in {one.workload: one.rate for one in paces}.items():
        table.add_row(workload, f"{rate:g}", *(f"{ratios[workload, policy]:,.0f}" for policy in POLICIES))
    return table


def waits_table(rows: list[Waits]) -> Table:
    """How honest the estimates of waits are, by workload and rate."""
    table = Table(title="Estimated waits beside those that came")
    table.add_column("workload", no_wrap=True)
    for name in (
        "requests/s",
        "requests",
        "median error",
        "model not held",
        "refused falsely",
        "rightly",
        "let in, late",
    ):
        table.add_column(name, justify="right")
    for one in rows:
        errors = (f"{seconds:.2f} s" for seconds in (one.error_s, one.error_unheld_s))
        shares = (f"{share:.2%}" for share in (one.refused_falsely, one.refused_rightly, one.late))
        table.add_row(one.workload, f"{one.rate:.3g}", f"{one.requests:,}", *errors, *shares)
    return table
