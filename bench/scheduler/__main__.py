"""`python -m bench.scheduler`: the scheduling policy under a simulated load, beside what others do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from bench.output import RESULTS, new_console, save
from bench.scheduler import generators
from bench.scheduler import pace as pace_module
from bench.scheduler import speed as speed_module
from bench.scheduler import sweep as sweep_module
from bench.scheduler import waits as waits_module
from bench.scheduler.policies import POLICIES, simulate
from bench.scheduler.show import figures_table, pace_table, speed_table, sweep_table, waits_table
from bench.scheduler.workload import WorkloadError, parse

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)
WIDTH = 150
"""Columns of the tables."""
Seed = Annotated[int, typer.Option(help="The same seed gives the same figures.")]


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data + b"\n")
    sys.stdout.flush()


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    workload: Annotated[Path | None, typer.Option(help="The workload to run, as JSON.")] = None,
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(POLICIES)}.")] = "headrace",
    seed: Seed = 1,
    load_jitter: Annotated[
        float, typer.Option(min=0.0, help="Loads take up to this share longer than expected, at random.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, with every request.")] = False,
) -> None:
    """Run one workload under one policy, or one of the commands."""
    if context.invoked_subcommand is not None:
        return
    if workload is None:
        typer.echo(context.get_help())
        raise typer.Exit
    if policy not in POLICIES:
        raise typer.BadParameter(f"{policy!r} is none of {', '.join(POLICIES)}", param_hint="--policy")
    try:
        text = workload.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{workload}: {error.strerror}", param_hint="--workload") from error
    try:
        parsed = parse(text)
    except WorkloadError as error:
        # Not a BadParameter: its frame would break the name of the field over lines.
        typer.echo(f"{workload}: {error}", err=True)
        raise typer.Exit(2) from error
    result = simulate(parsed, policy, seed=seed, load_jitter=load_jitter)
    if as_json:
        _write(msgspec.json.format(msgspec.json.encode(result), indent=2))
    else:
        new_console(WIDTH).print(figures_table(result))


@app.command()
def workload(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(generators.SHAPES)}.")],
    rate: Annotated[float, typer.Option(min=0.001, help="Requests per second, on average.")],
    seed: Seed = 1,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long requests come.")] = generators.SECONDS,
) -> None:
    """Write a built-in workload to the standard output."""
    _known([name])
    made = generators.generate(name, rate=rate, seed=seed, seconds=seconds)
    _write(msgspec.json.format(msgspec.json.encode(made), indent=1))


@app.command()
def sweep(
    name: Annotated[list[str] | None, typer.Option("--workload", help="Only this one; may be given often.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rates, one seed: half a minute.")] = False,
    seed: Seed = 1,
    output: Annotated[Path, typer.Option(help="Directory for the JSON result.")] = RESULTS,
    pictures: Annotated[Path | None, typer.Option(help="Directory for a picture of each workload, as SVG.")] = None,
) -> None:
    """Find the highest load that each policy bears, for every built-in workload."""
    _known(name or [])
    console = new_console(WIDTH)
    with console.status("") as status:
        report = sweep_module.sweep(
            quick=quick, seed=seed, names=name or list(generators.SHAPES), progress=status.update
        )
    console.print(sweep_table(report))
    path = save(report, report.kind, report.started, output)
    written = [path]
    if pictures is not None:
        # Here, since matplotlib takes half a second to import and is there for developers only.
        from bench.scheduler.pictures import draw

        written += draw(report, pictures)
    for one in written:
        console.print(f"written to {one}", highlight=False)


@app.command()
def speed() -> None:
    """Time the policy alone, with 1,000 queued requests and 30 models."""
    new_console(WIDTH).print(speed_table(speed_module.measure()))


@app.command()
def pace() -> None:
    """Time the simulator: each built-in workload near the load that Headrace's policy bears, under each policy."""
    new_console(WIDTH).print(pace_table(pace_module.measure()))


@app.command()
def waits(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(generators.SHAPES)}.")],
    rate: Annotated[list[float], typer.Option(min=0.001, help="Requests per second; may be given often.")],
) -> None:
    """Compare the waits that the policy expects with those that requests have."""
    _known([name])
    new_console(WIDTH).print(waits_table([waits_module.measure(name, one) for one in rate]))


def _known(names: list[str]) -> None:
    unknown = [name for name in names if name not in generators.SHAPES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: none of {', '.join(generators.SHAPES)}")


if __name__ == "__main__":
    app()
