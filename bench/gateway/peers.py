"""`python -m bench.gateway peers`: other gateways on the same work, before the same upstream, in the same run."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from rich.console import Console

from bench.gateway import stack
from bench.gateway.client import Target
from bench.gateway.measure import LoadFailed, Subject
from bench.gateway.processes import NotReady, child, wait_ready
from bench.gateway.recipes import RECIPES, CannotInstall, Recipe
from bench.gateway.report import Report, new_report
from bench.gateway.run import compare, work_directory
from bench.gateway.scenarios import Scenario

START_SECONDS = 120.0


def free_port() -> int:
    """A port that is free now; programs that cannot take port 0 and tell need one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> str | None:
    """`url` once it answers 200."""
    try:
        return url if httpx.get(url, timeout=2.0).status_code == 200 else None
    except httpx.TransportError:
        return None


@contextmanager
def serving(recipe: Recipe, work: Path, upstream: str) -> Iterator[Subject]:
    """A peer, installed and ready, in front of the upstream. Raises CannotInstall and NotReady."""
    launch = recipe.launch(recipe.ensure(), work, upstream, free_port())
    log = work / f"{recipe.name}.log"
    with child(launch.command, log, env=launch.env, cwd=work) as process:
        wait_ready(process, log, lambda _: _answers(launch.probe), START_SECONDS)
        yield Subject(name=f"{recipe.name} {recipe.version}", target=launch.target, roots=[process.pid])


def run(
    wanted: Sequence[Scenario],
    names: Sequence[str] | None,
    *,
    quick: bool,
    console: Console,
    keep: Path | None = None,
    with_headrace: bool = True,
) -> Report:
    """Measure the direct path, Headrace and every peer (one up at a time); a peer that fails becomes a note."""
    report = new_report("peers", quick=quick)
    with work_directory(keep) as work, ExitStack() as running:
        upstream = running.enter_context(stack.upstream(work))
        direct = Subject(name="direct", target=Target(base_url=upstream))
        direct.warm_up()
        compare([direct], wanted, report, console)
        if with_headrace:
            console.print("starting Headrace …", highlight=False)
            with stack.headrace(work, upstream) as subject:
                subject.warm_up()
                compare([subject], wanted, report, console)
        for recipe in RECIPES:
            if names and recipe.name not in names:
                continue
            console.print(f"starting {recipe.name} {recipe.version} (the first time installs it) …", highlight=False)
            try:
                with serving(recipe, work, upstream) as subject:
                    subject.warm_up()
                    compare([subject], wanted, report, console)
            except (CannotInstall, NotReady, LoadFailed) as error:
                report.notes.append(f"{recipe.name}: {type(error).__name__}: {error}")
                console.print(f"[yellow]{report.notes[-1]}[/]", highlight=False)
    return report
