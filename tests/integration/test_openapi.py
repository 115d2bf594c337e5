"""Schemathesis over the whole OpenAPI, with data that fits it and data that does not: no route answers with a bug."""

from __future__ import annotations

import asyncio
from collections import Counter
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


def document_of(url: str) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{url}/openapi.json", timeout=TIMEOUT_S).json()
    return found


def operations(document: dict[str, Any], mode: GenerationMode) -> set[str]:
    """The document's operations; of those that take no data, none can be sent data that does not fit."""
    return {
        f"{method.upper()} {path}"
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if mode is GenerationMode.POSITIVE
        or "requestBody" in operation
        or any(one["in"] in ("query", "path") for one in operation.get("parameters", ()))
    }


def bugs(url: str, headers: dict[str, str], mode: GenerationMode, examples: int) -> list[str]:
    """What was answered with a server error, over all operations; each of them must have answered."""
    document = document_of(url)
    wanted = operations(document, mode)
    found: list[str] = []
    answered: Counter[str] = Counter()

    def try_operation(operation: Any) -> None:
        @settings(
            max_examples=examples, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case: Case) -> None:
            answer = case.call(base_url=url, headers=headers, timeout=TIMEOUT_S)
            answered[operation.label] += 1
            if answer.status_code >= 500 and operation.label != MAY_BE_UNAVAILABLE:
                found.append(f"{operation.label}: {answer.status_code} {answer.text[:300]} <- {case.as_curl_command()}")

        one()

    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        if operation.label in wanted:
            try_operation(operation)
    assert answered.keys() == wanted, "each operation of the document was tried, and nothing else"
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
async def test_whatever_is_sent_no_route_answers_with_a_bug(stack: Stack, mode: GenerationMode) -> None:
    url = stack.ingress_urls[0]
    as_admin = {"Authorization": f"Bearer {stack.key}"}
    assert await asyncio.to_thread(bugs, url, as_admin, mode, BY_ADMIN) == []
    assert await asyncio.to_thread(bugs, url, {"Authorization": "Bearer hr-none"}, mode, BY_NOBODY) == []
    assert "unhandled" not in stack.role_logs()
