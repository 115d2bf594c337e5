"""Schemathesis over the whole OpenAPI, with data that fits it and data that does not: no route answers with a bug."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode

from tests.support.stacks import Stack

BY_ADMIN, BY_NOBODY = 8, 3
"""Cases of each operation and each kind of data."""
TIMEOUT_S = 30
MAY_BE_UNAVAILABLE = "GET /health/ready"
"""It says by 503 that something is not ready, and another test may just have seen to that."""


def described(url: str) -> Any:
    document = requests.get(f"{url}/openapi.json", timeout=TIMEOUT_S).json()
    return schemathesis.openapi.from_dict(document)


def bugs(url: str, headers: dict[str, str], mode: GenerationMode, examples: int) -> list[str]:
    """What was answered with a server error, over all operations."""
    found: list[str] = []
    tried: set[str] = set()

    def try_operation(operation: Any) -> None:
        @settings(
            max_examples=examples, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case: Case) -> None:
            answer = case.call(base_url=url, headers=headers, timeout=TIMEOUT_S)
            tried.add(operation.label)
            if answer.status_code >= 500 and operation.label != MAY_BE_UNAVAILABLE:
                found.append(f"{operation.label}: {answer.status_code} {answer.text[:300]} <- {case.as_curl_command()}")

        one()

    for result in described(url).get_all_operations():
        operation = result.ok()
        negatable = operation.body or operation.query or operation.path_parameters
        if mode is GenerationMode.POSITIVE or negatable:
            try_operation(operation)
    assert len(tried) > 10
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
async def test_whatever_is_sent_no_route_answers_with_a_bug(stack: Stack, mode: GenerationMode) -> None:
    url = stack.ingress_urls[0]
    as_admin = {"Authorization": f"Bearer {stack.key}"}
    assert await asyncio.to_thread(bugs, url, as_admin, mode, BY_ADMIN) == []
    assert await asyncio.to_thread(bugs, url, {"Authorization": "Bearer hr-none"}, mode, BY_NOBODY) == []
    assert "unhandled" not in stack.role_logs()
