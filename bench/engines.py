"""How many tokens a second the engines of the providers give on this machine, at several numbers of streams.

    python -m bench.engines --model llama_cpp=SmolLM2-135M-Instruct --model transformers=/models/SmolLM2-135M-Instruct

Each engine runs alone, in its child process, with the same prompts and the same number of tokens for every answer.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from bench.output import new_console, save
from processors.generation.providers.base import Done, Provider
from processors.generation.providers.factory import make_provider
from schemas import control

TOKENS = 96
"""Of each answer."""
ROUNDS = 3
STREAMS = (1, 4, 8)


class Figures(msgspec.Struct):
    """One engine at one number of streams: the median of the rounds."""

    engine: str
    streams: int
    tokens_per_s: float
    """Of all streams together, prompts and first tokens included."""
    first_token_s: float
    load_s: float
    resident_mb: int


class Report(msgspec.Struct):
    """What is kept of a run."""

    started: str
    figures: list[Figures]


async def answer(provider: Provider, model: control.Model, number: int, ends: int) -> tuple[float, int]:
    """Seconds to the first piece, and tokens, of one answer that a bias keeps from ending early."""
    messages = [{"role": "user", "content": f"Tell story number {number} of the sea."}]
    body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0.0, "logit_bias": {str(ends): -100}}
    began, first, tokens = time.monotonic(), 0.0, 0
    async for batch in provider.generate(model, body):
        first = first or time.monotonic() - began
        if isinstance(done := batch[-1], Done) and done.usage is not None:
            tokens = done.usage.completion_tokens
    return first, tokens


async def measure(kind: str, tag: str, ends: int) -> list[Figures]:
    """The figures of one engine."""
    provider = make_provider(control.Provider(name=kind, kind=kind))
    rows: list[Figures] = []
    try:
        model = control.Model("bench", kind, tag, context_length=512, max_concurrency=max(STREAMS))
        began = time.monotonic()
        await provider.load(model)
        load_s = time.monotonic() - began
        await answer(provider, model, 0, ends)
        for streams in STREAMS:
            rates, firsts = [], []
            for turn in range(ROUNDS):
                began = time.monotonic()
                made = await asyncio.gather(
                    *(answer(provider, model, turn * streams + number, ends) for number in range(streams))
                )
                rates.append(sum(tokens for _, tokens in made) / (time.monotonic() - began))
                firsts += [first for first, _ in made]
            rate, first = sorted(rates)[ROUNDS // 2], sorted(firsts)[len(firsts) // 2]
            size = (await provider.resident())[0].bytes // 1_000_000
            rows.append(Figures(kind, streams, round(rate, 1), round(first, 3), round(load_s, 1), size))
    finally:
        await provider.close()
    return rows


def main(
    model: Annotated[list[str], typer.Option(help="KIND=TAG of an engine to measure, each in its turn.")],
    ends: Annotated[int, typer.Option(help="Token that would end an answer; 2 for SmolLM2.")] = 2,
) -> None:
    """Measure, show and keep the figures."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    rows: list[Figures] = []
    for one in model:
        kind, _, tag = one.partition("=")
        rows += asyncio.run(measure(kind, tag, ends))
    table = Table(*Figures.__struct_fields__)
    for row in rows:
        table.add_row(*map(str, msgspec.structs.astuple(row)))
    new_console(100).print(table)
    print(save(Report(started, rows), "engines", started))


if __name__ == "__main__":
    typer.run(main)
