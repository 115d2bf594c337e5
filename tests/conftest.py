"""Fixtures of the real stack. Each is made at most once a session, and has ended when the session has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from clickhouse.migrate import migrate
from headrace.settings import Settings
from tests.support.backends import ran
from tests.support.stacks import Stack, running_infra, running_stack, upstream
from topics.apply import apply_all

MakeStack = Callable[..., Stack]

ON_STACKS = ("integration", "compat", "browser", "faults")
"""Folders whose tests run stacks, in their order."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the fault tests."""
    parser.addoption("--moments", type=int, default=3, help="Kills of each role, at seeded random moments.")
    parser.addoption("--seed", type=int, default=1, help="Seed of those moments.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and run the cheap ones first."""
    order = ("unit", "walks", "contract", "extras", *ON_STACKS)
    root = Path(__file__).parent

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(root).parts[0]

    for item in items:
        item.add_marker(folder(item))
    items.sort(key=lambda item: order.index(folder(item)) if folder(item) in order else len(order))


class TwoLanes(LoadScopeScheduling):
    """All that needs a stack in one process, one after the other; the others take the rest, a file at a time.

    Two stacks at once on two cores are late for everything that a test waits for.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "stacks" if file.split("/")[1] in ON_STACKS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> TwoLanes:
    """Who gets which tests when several processes run them."""
    return TwoLanes(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several test processes hands on what the summary is to say."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["ollama"] = ran


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    """Take what a test process says for the summary."""
    ran.extend(getattr(node, "workeroutput", {}).get("ollama", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which Ollama server the provider suite ran against."""
    for server in ran:
        terminalreporter.write_line(f"ollama provider: ran against {server}")


@pytest.fixture(scope="session")
async def infra(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    """Kafka with the catalogue's topics, Valkey, and ClickHouse with its tables; no role runs."""
    with running_infra(tmp_path_factory.mktemp("infra") / "data") as conf:
        await apply_all(conf, workers=["w1"])
        await asyncio.to_thread(migrate, conf)
        yield conf


@pytest.fixture(scope="session")
def upstream_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server whose tokens are numbered; a `#bench` line in a prompt steers it."""
    with upstream(tmp_path_factory.mktemp("upstream")) as url:
        yield url


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[Stack]:
    """One whole stack with two ingresses, the small real model, and models on the numbered upstream."""
    directory = tmp_path_factory.mktemp("stack")
    with running_stack(directory, upstream_url, small_model=True, replicas={"ingress": 2}) as made:
        yield made


@pytest.fixture(scope="module")
def make_stack(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[MakeStack]:
    """Makes stacks of a module's own, which end with it; `make_stack(small_model=…, replicas=…)`."""
    with ExitStack() as made:

        def make(**options: object) -> Stack:
            directory = tmp_path_factory.mktemp("stack")
            return made.enter_context(running_stack(directory, upstream_url, **options))  # type: ignore[arg-type]

        yield make
