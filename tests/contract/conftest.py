"""The engines that the provider suites share, and what the summary of a test run says of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.backends import MAKERS, Backend, ran


@pytest.fixture(scope="session", params=MAKERS)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """Each kind of provider with a loaded model; one engine a kind for all suites."""
    async with MAKERS[request.param]() as made:
        await made.provider.load(made.model)
        yield made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which Ollama server the provider suite ran against."""
    for server in ran:
        terminalreporter.write_line(f"ollama provider: ran against {server}")
