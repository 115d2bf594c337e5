"""What tests measured, as JSON in `tests/results`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"

Note = Callable[..., None]


@contextmanager
def noted(name: str, what: str, **about: object) -> Iterator[Note]:
    """Takes records; when the block ends they are written to a file of that name, as a list `what` beside `about`.

    Each of several test processes writes a file of its own.
    """
    taken: list[dict[str, object]] = []

    def take(**fields: object) -> None:
        taken.append(fields)

    began = time.time()
    yield take
    RESULTS.mkdir(exist_ok=True)
    file = "-".join(filter(None, (name, os.environ.get("PYTEST_XDIST_WORKER"))))
    summary = {**about, "seconds": round(time.time() - began, 1), what: taken}
    (RESULTS / f"{file}.json").write_text(json.dumps(summary, indent=1) + "\n")
