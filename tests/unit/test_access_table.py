"""Every route x everybody who may ask: what the application does is what the table in docs/api.md says."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.responses import Response

from headrace.access import GRANTS, Permission
from headrace.registry import Snapshot, snapshot_of
from headrace.settings import Settings
from ingress import guard
from ingress.app import make_app
from ingress.services import Services
from ingress.signin.sessions import Session, stamp_of
from ingress.signin.tokens import LIFE_S, SignIn
from schemas.control import ROLES, App, Key, User

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
ROW = re.compile(r"^\| `(GET|POST|PATCH|DELETE) (\S+)` \| (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", re.M)
ASKERS = (*ROLES, "nobody")
SECRET = "s" * 48
NOW = time.time()

Table = dict[tuple[str, str], dict[str, str]]


def documented() -> Table:
    """The table: route -> asker -> `yes`, `no` or `signed-in`."""
    rows = ROW.findall(DOCS.read_text())
    assert rows, "docs/api.md has the table"
    return {(row[0], row[1]): dict(zip(ASKERS, row[3:], strict=True)) for row in rows}


def key(role: str, **fields: object) -> Key:
    name = "-".join([role, *map(str, fields)])
    return Key(id=f"key-{name}", sha256=f"hash of {name}", name=name, app="a", role=role, **fields)  # type: ignore[arg-type]


def user(role: str, **fields: object) -> User:
    name = "-".join([role, *map(str, fields)])
    return User(id=name, email=f"{name}@example.org", role=role, apps=("a",), **fields)  # type: ignore[arg-type]


KEYS = {f"hr-{role}": key(role) for role in ROLES} | {
    "hr-expired": key("owner", expires_at=NOW - 1),
    "hr-revoked": key("owner", enabled=False),
    "hr-off": Key(id="off", sha256="", name="", app="off", role="owner"),
}
USERS = {held.id: held for held in (*map(user, ROLES), user("owner", enabled=False), user("owner", name="changed"))}


class _Registry:
    """The control plane as this module has it."""

    snapshot: Snapshot = snapshot_of([], [], [b'{"id":"a","name":"A"}', b'{"id":"off","name":"O","enabled":false}'], 1)

    async def key(self, sha256_hex: str) -> Key | None:
        import hashlib

        return next(
            (held for text, held in KEYS.items() if hashlib.sha256(text.encode()).hexdigest() == sha256_hex), None
        )

    async def user(self, user_id: str, *, fresh: bool = False) -> User | None:
        return USERS.get(user_id)


class _Sessions:
    """One session of each user, under its id; that of `changed` began under another role."""

    async def get(self, session_id: str) -> Session | None:
        held = USERS.get(session_id)
        if held is None:
            return None
        return Session(held.id, "another" if "name" in held.id else stamp_of(held), "")


@pytest.fixture
def app() -> FastAPI:
    parts = SimpleNamespace(settings=Settings(), registry=_Registry(), sessions=_Sessions(), signin=SignIn(SECRET))
    made = make_app(cast(Services, parts))
    # What lies behind the guard is not here; that it was reached is all that counts.
    made.add_exception_handler(Exception, lambda request, error: Response(status_code=500))
    return made


@pytest.fixture
async def caller(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://headrace") as made:
        yield made


def routes(app: FastAPI) -> set[tuple[str, str]]:
    return {
        (method, str(route.path).replace(":path}", "}"))
        for route in iter_route_contexts(app.routes)
        for method in route.methods or ()
        if method != "HEAD"
    }


def token(user_id: str, *, age_s: float = 0, secret: str = SECRET, session: str | None = None) -> str:
    return SignIn(secret).issue(user_id, session or user_id, now_s=time.time() - age_s)


async def outcome(caller: httpx.AsyncClient, method: str, path: str, bearer: str | None) -> int:
    """401 or 403 where the guard refuses; what comes after it, without the parts behind, does not matter here."""
    headers = {"authorization": f"Bearer {bearer}"} if bearer is not None else {}
    answer = await caller.request(method, re.sub(r"\{\w+\}", "x", path), headers=headers)
    return answer.status_code


def test_the_table_has_every_route_and_no_other(app: FastAPI) -> None:
    assert routes(app) == documented().keys()


async def test_every_role_may_do_what_the_table_says(app: FastAPI, caller: httpx.AsyncClient) -> None:
    wrong = []
    for (method, path), allowed in documented().items():
        for role in ROLES:
            for kind, bearer in (("key", f"hr-{role}"), ("user", token(role))):
                may = allowed[role] == "yes" or (allowed[role] == "signed-in" and kind == "user")
                status = await outcome(caller, method, path, bearer)
                if (status not in (401, 403)) is not may or status == 401:
                    wrong.append(f"{method} {path} as {kind} of role {role}: {status}")
        status = await outcome(caller, method, path, None)
        if (status != 401) is not (allowed["nobody"] == "yes"):
            wrong.append(f"{method} {path} without a key: {status}")
    assert wrong == []


@pytest.mark.parametrize(
    ("bearer", "status"),
    [
        ("hr-unknown", 401),
        ("hr-expired", 401),
        ("hr-revoked", 401),
        ("hr-off", 403),
        (token("owner", age_s=LIFE_S + 1), 401),
        (token("owner", secret="t" * 48), 401),
        (token("owner", session="ended"), 401),
        (token("owner", session="admin"), 401),
        (token("owner-enabled"), 401),
        (token("owner-name"), 401),
    ],
    ids=["unknown", "expired", "revoked", "app-off", "old", "forged", "ended", "of-another", "disabled", "changed"],
)
async def test_who_is_not_let_in_is_let_in_nowhere(
    app: FastAPI, caller: httpx.AsyncClient, bearer: str, status: int
) -> None:
    for (method, path), allowed in documented().items():
        if allowed["nobody"] != "yes":
            assert await outcome(caller, method, path, bearer) == status, f"{method} {path}"


async def test_a_body_is_not_read_before_its_sender_is_known(caller: httpx.AsyncClient) -> None:
    answer = await caller.post("/admin/keys", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 401


def test_a_route_that_does_not_say_what_it_needs_cannot_be_made() -> None:
    router = guard.router()

    async def forgotten() -> None: ...

    with pytest.raises(TypeError, match="forgotten must say what it needs"):
        router.get("/forgotten")(forgotten)


def test_a_viewer_changes_and_generates_nothing() -> None:
    assert Permission.GENERATE not in GRANTS["viewer"]
    for role in ("member", "viewer"):
        assert not [one for one in GRANTS[role] if one.value.endswith((".write", ".steer"))]
    assert App("a", "A").enabled
