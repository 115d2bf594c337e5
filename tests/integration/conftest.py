"""The stack that these tests share: a whole one, which ends with the last of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.stacks import Stack, running_stack


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[Stack]:
    """One whole stack with two ingresses, the small real model, and models on the numbered upstream."""
    directory = tmp_path_factory.mktemp("stack")
    with running_stack(directory, upstream_url, small_model=True, replicas={"ingress": 2}) as made:
        yield made
