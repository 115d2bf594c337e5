"""The commands on users, models, apps and keys on the real stack: what they are told is in force, and in the trail."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.chat import fresh
from tests.support.stacks import HEADRACE, NO_TLS, Stack, clean_environment
from tests.support.waiting import until

FIRST, SECOND = "a long enough sentence", "another long sentence"


@pytest.fixture
async def admin(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=stack.ingress_urls[0], headers={"authorization": f"Bearer {stack.key}"}, timeout=60, verify=NO_TLS
    ) as made:
        yield made


async def run(stack: Stack, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, [HEADRACE, *arguments, "--data-dir", str(stack.data_dir)],
        input=stdin, capture_output=True, text=True, timeout=90, check=False, env=clean_environment(),
    )  # fmt: skip


async def shown(stack: Stack, *arguments: str, stdin: str = "") -> Any:
    """What a command gives as JSON."""
    ran = await run(stack, *arguments, "--json", stdin=stdin)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


async def ids(stack: Stack, *arguments: str) -> list[str]:
    return [one["id"] for one in await shown(stack, *arguments)]


async def refusal(stack: Stack, *arguments: str, stdin: str = "") -> str:
    """The sentence of a command that must fail."""
    ran = await run(stack, *arguments, stdin=stdin)
    assert (ran.returncode, ran.stdout) == (1, ""), ran.stdout + ran.stderr
    return ran.stderr


async def reasons(admin: httpx.AsyncClient, kind: str, key: str, count: int) -> list[str]:
    """Why a record was changed, from its first version on, once the trail has that many changes."""

    async def told() -> list[str] | None:
        found = (await admin.get("/admin/audit", params={"kind": kind, "key": key, "limit": 500})).json()["data"]
        said = [one["reason"] for one in reversed(found) if one["action"] != "read"]
        return said if len(said) >= count else None

    return await until(told, f"{count} changes are in the trail")


async def test_a_user_is_made_found_changed_and_disabled(stack: Stack, admin: httpx.AsyncClient) -> None:
    email = f"{fresh('ada')}@example.org"

    async def signs_in(password: str) -> bool:
        answer = await admin.post("/auth/token", json={"email": email, "password": password})
        return answer.status_code == 200

    made = await shown(
        stack, "users", "create", email, "--role", "member", "--app", "default", "--name", "Ada",
        "--reason", "joins", stdin=f"{FIRST}\n",
    )  # fmt: skip
    wanted = {"email": email, "role": "member", "apps": ["default"], "name": "Ada", "can_sign_in": True}
    assert {name: made[name] for name in wanted} == wanted
    await until(lambda: signs_in(FIRST), "it signs in")
    assert await shown(stack, "users", "show", email) == made
    found = ("users", "list", "--search", email.upper())
    assert await shown(stack, *found, "--app", "default", "--role", "member", "--enabled") == [made]
    for other in (("--app", "elsewhere"), ("--role", "viewer"), ("--disabled",)):
        assert await shown(stack, *found, *other) == [], other
    changed = await shown(stack, "users", "update", email, "--role", "viewer", "--app", "none", "--name", "Ada L.")
    assert changed == made | {"role": "viewer", "apps": [], "name": "Ada L."}
    weak = await refusal(stack, "users", "password", email, stdin="short\n")
    assert "at least 8 characters" in weak and "short" not in weak
    await shown(stack, "users", "password", email, "--reason", "leaked", stdin=f"{SECOND}\n")
    await until(lambda: signs_in(SECOND), "it signs in with the new password")
    assert not await signs_in(FIRST)
    disabled = await shown(stack, "users", "disable", made["id"])
    assert (disabled["enabled"], disabled["can_sign_in"]) == (False, False)
    assert await ids(stack, *found, "--disabled") == [made["id"]]
    assert await reasons(admin, "users", made["id"], 4) == ["joins", "", "leaked", "disabled"]


async def test_a_search_for_users_is_in_the_trail_with_its_filters(stack: Stack, admin: httpx.AsyncClient) -> None:
    name = fresh("nobody")
    assert await shown(stack, "users", "list", "-q", name, "--app", "default", "--role", "viewer", "--enabled") == []

    async def told() -> bool:
        looks = (await admin.get("/admin/audit?kind=users&key=all&action=read")).json()["data"]
        wanted = {"only_q": name, "only_app": "default", "only_role": "viewer", "only_enabled": "True"}
        return wanted in [look["detail"] for look in looks]

    await until(told, "the search is in the trail")


async def test_a_model_is_made_with_all_that_the_admin_api_takes(stack: Stack) -> None:
    name = fresh("coder")
    await shown(
        stack, "models", "create", name, "--provider", "local", "--tag", "SmolLM2-135M-Instruct", "--disabled",
        "--input", "0.50", "--output", "2", "--cached", "0.05", "--currency", "EUR", "--alias", f"{name}-too",
        "--adapter", "tone=/tone.gguf", "--adapter", "law=/law=.gguf", "--context-length", "2048",
        "--capability", "code", "--fallback", "bench", "--no-preload", "--pinned", "--keep-alive", "90s",
        "--memory", "2 GiB", "--load-time", "8s", "--default-max-tokens", "256", "--rpm", "5",
    )  # fmt: skip
    model = await shown(stack, "models", "show", name)
    wanted = {
        "enabled": False, "aliases": [f"{name}-too"], "adapters": {"tone": "/tone.gguf", "law": "/law=.gguf"},
        "context_length": 2048, "capabilities": ["code"], "fallbacks": ["bench"], "preload": False, "pinned": True,
        "keep_alive_ms": 90_000, "bytes": 2 * 2**30, "load_ms": 8_000, "default_max_tokens": 256,
        "rate_limit_rpm": 5, "origin": "api",
    }  # fmt: skip
    assert {field: model[field] for field in wanted} == wanted
    price = model["price"]
    amounts = [Decimal(price[kind]) for kind in ("input", "output", "cached")]
    assert (amounts, price["currency"]) == ([Decimal("0.50"), Decimal(2), Decimal("0.05")], "EUR")


async def test_a_model_is_changed_value_by_value_and_disabled(stack: Stack, admin: httpx.AsyncClient) -> None:
    name = fresh("coder")
    await shown(
        stack, "models", "create", name, "--provider", "local", "--tag", "SmolLM2-135M-Instruct", "--disabled",
        "--alias", f"{name}-too", "--adapter", "tone=/tone.gguf", "--adapter", "law=/law.gguf",
        "--fallback", "bench", "--no-preload", "--pinned", "--keep-alive", "90s", "--default-max-tokens", "256",
        "--memory", "2 GiB", "--rpm", "5", "--reason", "tried",
    )  # fmt: skip
    await shown(
        stack, "models", "update", name, "--no-pinned", "--keep-alive", "none", "--default-max-tokens", "none",
        "--memory", "0B", "--load-time", "1.5s", "--rpm", "none", "--alias", "none", "--without-adapter", "tone",
        "--adapter", "tone2=/2.gguf",
    )  # fmt: skip
    model = await shown(stack, "models", "show", name)
    wanted = {
        "pinned": False, "keep_alive_ms": None, "default_max_tokens": None, "bytes": 0, "load_ms": 1_500,
        "rate_limit_rpm": None, "aliases": [], "adapters": {"law": "/law.gguf", "tone2": "/2.gguf"},
        "fallbacks": ["bench"], "preload": False, "enabled": False,
    }  # fmt: skip
    assert {field: model[field] for field in wanted} == wanted
    moved = ("models", "update", name, "--provider", "bench", "--tag", "bench", "--enabled")
    assert "loads no adapters" in await refusal(stack, *moved)
    assert "must not be null" in await refusal(stack, "models", "update", name, "--memory", "none")
    assert 'write a duration such as "30s"' in await refusal(stack, "models", "update", name, "--keep-alive", "30")
    await shown(stack, *moved, "--without-adapter", "law", "--without-adapter", "tone2")
    model = await shown(stack, "models", "show", name)
    assert (model["enabled"], model["provider"], model["adapters"]) == (True, "bench", {})
    await shown(stack, "models", "disable", name, "--reason", "of no use")
    model = await shown(stack, "models", "show", name)
    assert (model["enabled"], model["fallbacks"]) == (False, [])
    first, *_, last = await reasons(admin, "models", name, 5)
    assert (first, last) == ("tried", "of no use")


async def test_an_app_is_made_with_its_publishers_and_found(
    stack: Stack, admin: httpx.AsyncClient, tmp_path: Path
) -> None:
    public = Ed25519PrivateKey.generate().public_key()
    text, file = base64.b64encode(public.public_bytes_raw()).decode(), tmp_path / "orders.pub.pem"
    file.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    name = fresh("shop")
    create = ("apps", "create", name, "--name", "The shop", "--publisher", f"text={text}")
    assert "write NAME=KEY" in await refusal(stack, *create, "--publisher", "orders")
    app = await shown(
        stack, *create, "--publisher", f"file={file}", "--producer-byte-rate", "5000", "--reason", "opens"
    )  # fmt: skip
    assert (app["publishers"], app["producer_byte_rate"]) == ({"text": text, "file": text}, 5000)
    assert (await admin.get(f"/admin/apps/{name}")).json() == app
    assert await shown(stack, "apps", "list", "--search", name, "--enabled") == [app]
    assert await shown(stack, "apps", "list", "-q", name, "--disabled") == []
    assert await reasons(admin, "apps", name, 1) == ["opens"]


async def test_keys_are_found_by_owner_and_name(stack: Stack) -> None:
    name = fresh("key")
    owner = await shown(stack, "users", "create", f"{fresh('bob')}@example.org", "--no-password")
    assert owner["can_sign_in"] is False
    key = await shown(stack, "keys", "create", "--name", name, "--owner", owner["id"])
    assert await ids(stack, "keys", "list", "--owner", owner["id"], "--enabled") == [key["id"]]
    assert await ids(stack, "keys", "list", "--search", name, "--app", "default") == [key["id"]]
    assert await ids(stack, "keys", "list", "--search", name, "--owner", "nobody") == []
    assert await ids(stack, "keys", "list", "--search", name, "--disabled") == []
