"""What OpenAPI says of headers: which records have versions, and what may be said with a change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from headrace.settings import Settings
from ingress.app import make_app
from ingress.services import Services

KINDS = ("apps", "keys", "models", "users")


@pytest.fixture(scope="module")
def operations() -> dict[tuple[str, str], dict[str, Any]]:
    """(method, path) -> what is said of it."""
    document = make_app(cast(Services, SimpleNamespace(settings=Settings()))).openapi()
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if path.startswith("/admin/")
    }


def headers_of(operation: dict[str, Any]) -> set[str]:
    return {one["name"] for one in operation.get("parameters", ()) if one["in"] == "header"}


def test_what_may_be_refused_for_its_version_takes_one(operations: dict[tuple[str, str], dict[str, Any]]) -> None:
    versioned = {place for place, operation in operations.items() if "412" in operation["responses"]}
    assert {place for place, operation in operations.items() if "If-Match" in headers_of(operation)} == versioned
    paths = {path.split("/")[2] for _, path in versioned}
    assert paths == {*KINDS, "prices"}
    assert {method for method, _ in versioned} == {"PATCH", "DELETE", "POST"}


def test_whoever_makes_or_changes_a_record_may_say_why(operations: dict[tuple[str, str], dict[str, Any]]) -> None:
    for kind in KINDS:
        for (method, path), operation in operations.items():
            if method in ("PATCH", "DELETE") or (method, path) == ("POST", f"/admin/{kind}"):
                assert "x-hr-reason" in headers_of(operation), (method, path)


def test_answers_with_one_record_name_its_version(operations: dict[tuple[str, str], dict[str, Any]]) -> None:
    for (method, path), operation in operations.items():
        shown = any(path.startswith(f"/admin/{kind}/{{") for kind in KINDS) and not path.endswith(("load", "/events"))
        made = method == "POST" and path.removeprefix("/admin/") in KINDS
        if shown or made:
            answer = operation["responses"]["201" if made else "200"]
            assert "ETag" in answer["headers"], (method, path)
            assert "content" in answer, (method, path)
