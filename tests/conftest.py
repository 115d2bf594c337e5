"""Where tests run and in which order; stacks of a module's own, and the API of a stack as a key sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from deploy.embedded.kafka import live_shortly
from tests.support.backends import ran
from tests.support.chat import Api
from tests.support.stacks import Stack, running_stack, upstream

MakeStack = Callable[..., Stack]

live_shortly()

FOLDERS = ("unit", "walks", "contract", "extras", "parts", "integration", "stacks", "faults")
"""In the order in which one process runs them: what is cheap first."""
LONGEST_FIRST = ("integration", "walks", "contract", "faults", "stacks", "parts", "extras", "unit")
"""In the order in which several processes take them: small files fill what is left at the end."""
SHARING = ("parts", "integration", "faults")
"""Folders whose files share what they run on, so that they stay together."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the fault tests."""
    parser.addoption("--moments", type=int, default=3, help="Kills of each role, at seeded random moments.")
    parser.addoption("--seed", type=int, default=1, help="Seed of those moments.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and bring the folders into order."""
    root = Path(__file__).parent

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(root).parts[0]

    for item in items:
        item.add_marker(folder(item))
    order = LONGEST_FIRST if hasattr(config, "workerinput") else FOLDERS
    items.sort(key=lambda item: order.index(folder(item)))


class ByFolder(LoadScopeScheduling):
    """A folder whose tests share a stack goes to one process, other tests go file by file to whichever has room."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # The order is ours.

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        folder = file.split("/")[1]
        return folder if folder in SHARING else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFolder:
    """Who gets which tests when several processes run them."""
    return ByFolder(config, log)


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
def upstream_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server whose tokens are numbered; a `#bench` line in a prompt steers it."""
    with upstream(tmp_path_factory.mktemp("upstream")) as url:
        yield url


@pytest.fixture(scope="module")
def make_stack(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[MakeStack]:
    """Makes stacks of a module's own, which end with it; `make_stack(small_model=…, replicas=…)`."""
    with ExitStack() as made:

        def make(**options: object) -> Stack:
            directory = tmp_path_factory.mktemp("stack")
            return made.enter_context(running_stack(directory, upstream_url, **options))  # type: ignore[arg-type]

        yield make


@pytest.fixture
async def api(stack: Stack) -> AsyncIterator[Api]:
    """The API at the first ingress, as the admin's key sees it."""
    async with Api(stack) as made:
        yield made


@pytest.fixture
async def other(stack: Stack) -> AsyncIterator[Api]:
    """The same at the other ingress."""
    async with Api(stack, ingress=1) as made:
        yield made
