"""What the summary of a test run says about the contract tests."""

from __future__ import annotations

import pytest

from tests.support.backends import ran


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which Ollama server the provider suite ran against."""
    for server in ran:
        terminalreporter.write_line(f"ollama provider: ran against {server}")
