"""Sweeps as pictures: an SVG a workload, the same bytes for the same figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from bench.scheduler.sweep import TARGET, Curve, Point, SweepReport, WorkloadSweep

SIZE_INCHES = (9.0, 3.9)


class Line(NamedTuple):
    """How a policy is drawn: told apart by colour, by marker and by dashes alike."""

    colour: str
    marker: str
    size: float
    """Of the marker; all but the smallest are hollow, so that those of lines that coincide are all seen."""
    dashes: str | tuple[int, tuple[int, ...]]


LINES = {
    "llama-swap": Line("#A6568A", "D", 8, (0, (1, 2, 5, 2))),
    "ollama": Line("#D55E00", "v", 9, ":"),
    "ollama-fast-path": Line("#B87800", "^", 8, "-."),
    "lru": Line("#000000", "s", 6, "--"),
    "headrace-untold": Line("#2B8C6F", "P", 7, (0, (5, 1))),
    "headrace": Line("#0072B2", "o", 4, "-"),
}
"""From the lowest to the topmost. The colours are Okabe and Ito's, two of them darkened for a white ground."""


def draw(report: SweepReport, directory: Path) -> list[Path]:
    """Write a picture of each workload into a directory, which is made if it is not there; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    return [_draw(one, directory / f"scheduling-{one.workload}.svg") for one in report.sweeps]


def _draw(sweep: WorkloadSweep, path: Path) -> Path:
    # Without a salt the ids of clip paths are random; text stays text, which is smaller, and can be found and read out.
    with mpl.rc_context({"svg.hashsalt": "headrace", "svg.fonttype": "none", "font.size": 9}):
        # White also where the page is dark: the lines are made for it.
        figure = Figure(figsize=SIZE_INCHES, layout="constrained", facecolor="white")
        within, shed = figure.subplots(1, 2, sharex=True, width_ratios=(3, 2))
        for curve in sorted(sweep.curves, key=lambda curve: list(LINES).index(curve.policy)):
            _line(within, curve, lambda point: point.slo_by_seed)
            _line(shed, curve, lambda point: point.shed_by_seed)
        within.axhline(TARGET, color="#444444", linewidth=1.2, label=f"target: {TARGET:.0%}")
        within.set(ylim=(_floor(sweep), 1.02), ylabel="first token within its SLO (% of requests)")
        shed.set(ylim=(-0.01, max(0.1, shed.get_ylim()[1])), ylabel="refused or expired (% of requests)")
        for axes in (within, shed):
            _scale(axes)
        handles, labels = within.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(labels), frameon=False)
        figure.suptitle(f"{sweep.workload}: {sweep.about}", fontsize=10)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    return path


def _floor(sweep: WorkloadSweep) -> float:
    """A multiple of 20 % below all that is drawn."""
    least = min(value for curve in sweep.curves for point in curve.points for value in point.slo_by_seed)
    return max(0, math.floor(5 * least - 0.1)) / 5


def _line(axes: Axes, curve: Curve, values: Callable[[Point], Sequence[float]]) -> None:
    """The mean over the seeds, within a band from the least to the most of them."""
    line = LINES[curve.policy]
    rates = [point.rate for point in curve.points]
    seeds = [values(point) for point in curve.points]
    axes.fill_between(
        rates, [min(one) for one in seeds], [max(one) for one in seeds], color=line.colour, alpha=0.13, linewidth=0
    )
    axes.plot(
        rates,
        [sum(one) / len(one) for one in seeds],
        color=line.colour,
        marker=line.marker,
        markersize=line.size,
        markerfacecolor=line.colour if curve.policy == "headrace" else "none",
        linestyle=line.dashes,
        linewidth=1.5,
        label=curve.policy,
    )


def _scale(axes: Axes) -> None:
    axes.set(xscale="log", xlabel="offered load (requests/s)")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color="#dddddd", linewidth=0.6)
