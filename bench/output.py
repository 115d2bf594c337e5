"""Where benchmarks write what they found, and the console that they show it on."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console

RESULTS = Path(__file__).parent / "results"


def save(report: msgspec.Struct, kind: str, started: str, directory: Path = RESULTS) -> Path:
    """Write a report as JSON, named by its kind and by when it was `started` (ISO 8601, UTC); returns the path."""
    directory.mkdir(parents=True, exist_ok=True)
    stamp = started.replace(":", "").replace("-", "").removesuffix("+0000")
    path = directory / f"{kind}-{stamp}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    return path


def new_console(width: int) -> Console:
    """A console that is wide enough for the tables also where the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=width)
