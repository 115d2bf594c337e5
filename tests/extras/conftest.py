"""Tests of the extra `transformers`: left out, with the reason in the summary, where it is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from processors.generation.providers.transformers import NEEDED

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the extra."""
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        reason = f"the extra transformers is not installed (no {', '.join(missing)}): just test-extras"
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
