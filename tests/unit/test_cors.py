"""Which pages may call the API from a browser, and what they may read of its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from headrace.settings import Settings
from ingress.app import make_app
from ingress.services import Services

PAGE = "https://console.example.org"


@asynccontextmanager
async def serving(origins: str) -> AsyncIterator[httpx.AsyncClient]:
    services = cast("Services", SimpleNamespace(settings=Settings(cors_origins=origins)))
    transport = httpx.ASGITransport(cast("Any", make_app(services)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(
    ("origins", "allowed"),
    [
        ("", None),
        (PAGE, PAGE),
        (f"https://other.example.org, {PAGE}", PAGE),
        ("*", "*"),
        ("https://other.example.org", None),
    ],
)
async def test_only_the_pages_that_are_named_may_call(origins: str, allowed: str | None) -> None:
    async with serving(origins) as client:
        answer = await client.get("/health/live", headers={"Origin": PAGE})
        assert answer.status_code == 200
        assert answer.headers.get("access-control-allow-origin") == allowed
        asking = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, idempotency-key",
        }
        asked = await client.options("/v1/chat/completions", headers=asking)
        assert (asked.status_code == 200) is (allowed is not None)
        assert asked.headers.get("access-control-allow-origin") == allowed


async def test_a_page_may_read_what_it_needs_to_go_on() -> None:
    async with serving(PAGE) as client:
        answer = await client.get("/health/live", headers={"Origin": PAGE})
    exposed = set(answer.headers["access-control-expose-headers"].split(", "))
    assert {"x-request-id", "x-hr-stream-id", "retry-after", "x-ratelimit-remaining-tokens"} <= exposed
