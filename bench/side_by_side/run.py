"""One run: each subject alone on the machine, one after the other, with the same requests at the same times."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.gateway.processes import NotReady
from bench.gateway.run import work_directory
from bench.side_by_side import ollama, weights
from bench.side_by_side.client import Callers
from bench.side_by_side.figures import Figures, Leaving, summarise
from bench.side_by_side.report import Report, new_report
from bench.side_by_side.subjects import HEADRACE, Subject, running
from bench.side_by_side.watch import Watch, busy_after
from bench.side_by_side.workload import MODELS, QUIET, Ask, generate, leaver

ALONE_TOKENS = 24
LEAVERS = 2
"""Callers who leave at each moment, one after the other."""
PREFILL_S = 0.3
"""A prompt near the context's end takes longer than that."""
LONG_TOKENS = 200
PIECES = 3
"""Of text that a caller has seen who leaves in the answer."""


def run(
    names: Sequence[str],
    *,
    seed: int,
    seconds: float,
    console: Console,
    program: Path,
    threads: int | None,
    keep: Path | None,
) -> Report:
    """Measure the subjects of these names, in their order. `program` is Ollama's directory. Raises `NotReady`."""
    asks = generate(seed, seconds)
    report = new_report(seed, seconds, len(asks))
    wants_ollama = any(name != HEADRACE for name in names)
    built = ollama.install(program) if wants_ollama else Path()
    with work_directory(keep) as directory:
        folder = directory / "models"
        folder.mkdir(exist_ok=True)
        models = weights.copies(folder)
        prompts = weights.prompt_tokens(asks)
        for name in names:
            console.print(f"  {name}: starting …", highlight=False)
            with running(name, directory / name, models, built, threads) as subject:
                report.figures.append(asyncio.run(measure(subject, asks, prompts, console)))
                report.budgets[name] = subject.budget
    return report


async def measure(subject: Subject, asks: Sequence[Ask], prompts: Sequence[int], console: Console) -> Figures:
    """The figures of one subject. Raises `NotReady` when it answers nothing before the load."""
    async with Callers(subject.server) as callers:
        for model in MODELS:
            seen = await callers.ask(leaver(0, model, QUIET, words=10, tokens=ALONE_TOKENS))
            if not seen.finish:
                raise NotReady(f"{subject.name} does not answer: {seen.error or seen.broken}")
        # A short prompt's stream is as fast as the engine decodes; the last model asked for is loaded by now.
        seen = await callers.ask(leaver(1, MODELS[-1], QUIET, words=10, tokens=ALONE_TOKENS))
        alone = seen.completion_tokens / (seen.end_s - (seen.first_s or 0.0))
        console.print(f"  {subject.name}: {len(asks)} requests …", highlight=False)
        with Watch(subject.roots) as watch:
            saw = await callers.run(asks)
        figures = summarise(subject.name, asks, prompts, saw, watch.machine)
        console.print(f"  {subject.name}: callers who leave …", highlight=False)
        figures.alone_tokens_s = round(alone, 1)
        for moment, stays_s, pieces in (("prefill", PREFILL_S, None), ("answer", None, PIECES)):
            figures.leaving.append(await _leave(callers, subject, moment, stays_s, pieces))
    return figures


async def _leave(callers: Callers, subject: Subject, moment: str, stays_s: float | None, pieces: int | None) -> Leaving:
    """Let callers leave one after the other, of a model that is loaded; what the engines did afterwards."""
    busy: list[float] = []
    for number in range(LEAVERS):
        await callers.ask(leaver(number, MODELS[0], QUIET, words=10, tokens=1))
        await asyncio.to_thread(busy_after, subject.roots)
        ask = leaver(number, MODELS[0], QUIET, words=700, tokens=LONG_TOKENS, stays_s=stays_s)
        await callers.ask(ask, leaves_after=pieces)
        busy.append(await asyncio.to_thread(busy_after, subject.roots))
    mean = sum(busy) / len(busy)
    return Leaving(moment=moment, callers=LEAVERS, busy_s=round(mean, 2), busy_most_s=round(max(busy), 2))
