"""`python -m bench.gateway`: measure the gateway, alone or beside others."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.gateway import peers as peers_module
from bench.gateway import run as run_module
from bench.gateway.measure import KEY_VARIABLE, LoadFailed
from bench.gateway.processes import NotReady
from bench.gateway.report import show
from bench.gateway.scenarios import Scenario, scenarios
from bench.gateway.targets import failed
from bench.output import RESULTS, new_console, save

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
Names = Annotated[list[str] | None, typer.Option("--scenario", help="Run only this scenario; may be given often.")]
Quick = Annotated[bool, typer.Option("--quick", help="Shorter and fewer scenarios: about a minute.")]
Output = Annotated[Path, typer.Option(help="Directory for the JSON result.")]
Keep = Annotated[Path | None, typer.Option(help="Keep logs and data in this directory.")]

WIDTH = 170
"""Columns of the tables."""


def chosen(names: list[str] | None, *, quick: bool) -> list[Scenario]:
    """The scenarios with these names, all when none is named. Raises BadParameter for an unknown one."""
    known = {scenario.name: scenario for scenario in scenarios(quick=quick)}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: none of {', '.join(known)}", param_hint="--scenario")
    return [known[name] for name in names] if names else list(known.values())


@app.command()
def run(
    scenario: Names = None,
    quick: Quick = False,
    output: Output = RESULTS,
    keep: Keep = None,
    base_url: Annotated[
        str | None, typer.Option(help=f"Measure this endpoint instead of a stack of our own; key in {KEY_VARIABLE}.")
    ] = None,
    pid: Annotated[list[int] | None, typer.Option(help="With --base-url: root process of what is measured.")] = None,
    upstream_port: Annotated[int, typer.Option(help="Port of the mock upstream; 0 takes a free one.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 when any target is missed, not only a gate.")
    ] = False,
) -> None:
    """Measure Headrace beside the direct path and one Kafka hop, in one run."""
    console = new_console(WIDTH)
    report = run_module.run(
        chosen(scenario, quick=quick),
        quick=quick,
        console=console,
        keep=keep,
        base_url=base_url,
        api_key=os.environ.get(KEY_VARIABLE),
        roots=pid or [],
        upstream_port=upstream_port,
    )
    show(report, console)
    console.print(f"written to {save(report, report.kind, report.started, output)}", highlight=False)
    if failed(report.verdicts, strict=strict):
        raise typer.Exit(1)


@app.command()
def peers(
    peer: Annotated[list[str] | None, typer.Option(help="Only this peer; may be given often.")] = None,
    scenario: Names = None,
    quick: Quick = False,
    output: Output = RESULTS,
    keep: Keep = None,
    headrace: Annotated[bool, typer.Option(help="Whether to measure Headrace beside them.")] = True,
) -> None:
    """Measure other gateways on the same work in the same run; they are installed into a cache of their own."""
    console = new_console(WIDTH)
    report = peers_module.run(
        chosen(scenario, quick=quick), peer, quick=quick, console=console, keep=keep, with_headrace=headrace
    )
    show(report, console)
    console.print(f"written to {save(report, report.kind, report.started, output)}", highlight=False)


if __name__ == "__main__":
    try:
        app()
    except (NotReady, LoadFailed) as error:
        sys.exit(f"{type(error).__name__}: {error}")
