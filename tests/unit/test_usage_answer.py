"""Answers about usage: what lies beyond the limit is told, and OpenAPI describes what is sent and what is asked."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from clickhouse.usage_query import DIMENSIONS, MEASURES, Bucket, UsageQuery, Windows, build
from headrace.analytics import UsageAnswer
from headrace.settings import Settings
from ingress.app import make_app
from ingress.services import Services
from ingress.usage import rendered
from schemas.usage import UsageRow, UsageRows

BEGAN = datetime(2026, 9, 29, tzinfo=UTC)
QUERY = UsageQuery(BEGAN, BEGAN + timedelta(days=30), Bucket.DAY, ("tenant", "error"), limit=2)
DECIMALS = ("cost", "audio_seconds")


def row(tenant: str) -> tuple[object, ...]:
    """A row as ClickHouse's client gives it."""
    measures = [Decimal("0.10") if name in DECIMALS else 1.5 if name.endswith("_ms") else 1 for name in MEASURES]
    return (BEGAN, tenant, "", "USD", *measures)


ROWS = [row("a"), row("b"), row("c")]


def test_a_row_more_than_the_limit_is_asked_for() -> None:
    sql, values = build(QUERY, Windows())
    assert sql.endswith("LIMIT {limit:UInt32}") and values["limit"] == 3
    assert build(UsageQuery(BEGAN, QUERY.end, limit=10_000), Windows())[1]["limit"] == 10_001


@pytest.mark.parametrize(("found", "more"), [(0, False), (1, False), (2, False), (3, True)])
def test_whether_there_is_more_is_told_in_either_form(found: int, more: bool) -> None:
    answer = UsageAnswer.of(QUERY, ROWS[:found])
    shown = json.loads(bytes(rendered(QUERY, answer, "json", "").body))
    assert shown["has_more"] is more
    assert [one["tenant"] for one in shown["data"]] == ["a", "b"][:found]
    table = rendered(QUERY, answer, None, "text/csv")
    assert table.headers["x-hr-has-more"] == ("true" if more else "false")
    assert table.headers.get("x-hr-last-id") == shown["last_id"] == answer.last_id
    assert (shown["last_id"] is None) is (found == 0)
    assert len(bytes(table.body).splitlines()) == 1 + min(found, 2)


@pytest.mark.parametrize("path", ["/v1/usage", "/admin/usage"])
def test_openapi_describes_what_is_sent(path: str) -> None:
    document = make_app(cast(Services, SimpleNamespace(settings=Settings()))).openapi()
    described: dict[str, Any] = document["paths"][path]["get"]["responses"]["200"]
    assert described["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/UsageRows"}
    assert described["content"]["text/csv"]["schema"] == {"type": "string"}
    assert described["headers"]["x-hr-has-more"]["schema"]["enum"] == ["true", "false"]
    assert described["headers"]["x-hr-last-id"]["schema"] == {"type": "string"}
    fields = document["components"]["schemas"]["UsageRow"]
    assert fields["properties"].keys() == {"start", *DIMENSIONS, "currency", *MEASURES}
    assert set(fields["required"]) == {"currency", *MEASURES}
    assert document["components"]["schemas"]["UsageRows"]["properties"]["bucket"]["enum"] == list(Bucket)


@pytest.mark.parametrize("path", ["/v1/usage", "/admin/usage"])
def test_what_may_be_asked_is_what_the_documentation_says(path: str) -> None:
    section = (Path(__file__).parents[2] / "docs/api.md").read_text().split("\n## Usage\n")[1].split("\n## ")[0]
    said = re.findall(r"^\| (`.*?`) \| (admin only)?", section, re.M)
    wanted = {name for names, admins in said if path == "/admin/usage" or not admins for name in names.split(", ")}
    document = make_app(cast(Services, SimpleNamespace(settings=Settings()))).openapi()
    parameters = document["paths"][path]["get"]["parameters"]
    assert {f"`{one['name']}`" for one in parameters if one["in"] == "query"} == wanted


def test_the_description_fits_an_answer() -> None:
    shown = json.loads(bytes(rendered(QUERY, UsageAnswer.of(QUERY, ROWS), "json", "").body))
    read = UsageRows.model_validate(shown, strict=True)
    assert (read.has_more, [one.tenant for one in read.data]) == (True, ["a", "b"])
    assert (read.data[0].cost, read.data[0].start) == ("0.1", "2026-09-29T00:00:00Z")
    assert read.data[0].model_fields_set == UsageRow.model_fields.keys() & {*QUERY.columns}
