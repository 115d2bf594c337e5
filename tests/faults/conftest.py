"""One stack for all kills, the moments of the kills, and their results as JSON."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.results import Note, noted
from tests.support.stacks import Stack, paid_model, running_stack

PRICE = {"input": "1.50", "output": "7.25", "cached": "0.30"}
"""Of `paid`, in dollars a million tokens."""


@pytest.fixture(scope="package")
def victim(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[Stack]:
    """A stack with two ingresses whose processes are killed."""
    directory = tmp_path_factory.mktemp("victim")
    with running_stack(directory, upstream_url, models=paid_model(**PRICE), replicas={"ingress": 2}) as made:
        yield made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[Stack]:
    """A stack with two workers that hold the same models; `worker-1` is lost."""
    with running_stack(tmp_path_factory.mktemp("pair"), upstream_url, replicas={"worker": 2}) as made:
        yield made


@pytest.fixture(scope="session")
def moments(request: pytest.FixtureRequest) -> int:
    """Kills of each role."""
    return int(request.config.getoption("--moments"))


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of the moments."""
    return int(request.config.getoption("--seed"))


@pytest.fixture(scope="package")
def note(seed: int, moments: int) -> Iterator[Note]:
    """Takes what a kill did; all of them are written when these tests end."""
    with noted("faults", "kills", seed=seed, moments=moments) as take:
        yield take
