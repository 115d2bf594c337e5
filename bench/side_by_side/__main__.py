"""`python -m bench.side_by_side`: the same requests on a genuine Ollama and on Headrace; memory for two of 3 models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.gateway.processes import NotReady
from bench.output import RESULTS, new_console, save
from bench.side_by_side import run as run_module
from bench.side_by_side.ollama import DIRECTORY
from bench.side_by_side.report import show
from bench.side_by_side.subjects import SUBJECTS

WIDTH = 120
"""Columns of the tables."""


def main(
    subject: Annotated[list[str] | None, typer.Option(help="Only this one; may be given often.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests.")] = 1,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long requests come.")] = 50.0,
    ollama: Annotated[Path, typer.Option(help="Where Ollama's program is, or is built.")] = DIRECTORY,
    threads: Annotated[
        int | None, typer.Option(help="Threads of Ollama's engines, by default its own choice; its threads spin.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for the JSON result.")] = RESULTS,
    keep: Annotated[Path | None, typer.Option(help="Keep logs and data in this new directory.")] = None,
) -> None:
    """Measure, show and keep the figures; about six minutes."""
    unknown = [name for name in subject or [] if name not in SUBJECTS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: none of {', '.join(SUBJECTS)}", param_hint="--subject")
    console = new_console(WIDTH)
    report = run_module.run(
        subject or SUBJECTS, seed=seed, seconds=seconds, console=console, program=ollama, threads=threads, keep=keep
    )
    show(report, console)
    console.print(f"written to {save(report, report.kind, report.started, output)}", highlight=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except NotReady as error:
        sys.exit(f"{type(error).__name__}: {error}")
