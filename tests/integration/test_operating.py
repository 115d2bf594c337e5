"""Operating a stack: dead letters, audit, erasure; what no tenant sees of another; no secret at rest in plain."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.gateway.spec import Spec
from headrace.api_keys import new_key, sha256
from headrace.control_client import command, control_client
from headrace.redis_client import connect
from schemas.control import App, Key, Record, User
from schemas.ids import new_request_id
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, body, fresh
from tests.support.publishing import sealed
from tests.support.stacks import PROVIDER_KEY, Stack
from tests.support.waiting import until
from topics.catalogue import CATALOGUE, DEAD_LETTERS, LOG, REPLIES, REQUESTS, ROUTED, worker_commands
from topics.clients import LogReader, Producer
from topics.envelope import Envelope


@dataclass
class Tenant:
    """An app of a test's own, with a key of a user of its own."""

    id: str
    user: str
    key_id: str
    text: str
    api: Api


@pytest.fixture
async def tenants(stack: Stack) -> AsyncIterator[list[Tenant]]:
    """Two tenants with a member's key each."""
    made: list[Tenant] = []
    records: list[Record] = []
    for _ in range(2):
        name, text = f"t-{uuid.uuid4().hex[:8]}", new_key()
        made.append(Tenant(name, f"u-{name}", f"key-{name}", text, Api(stack, key=text)))
        records += [
            App(id=name, name=name),
            User(id=f"u-{name}", email=f"{name}@example.org", apps=(name,)),
            Key(id=f"key-{name}", sha256=sha256(text), name=name, app=name, owner_id=f"u-{name}"),
        ]
    async with control_client(stack.settings, timeout=20) as client:
        await client.submit([command(record, actor="test") for record in records])
    yield made
    for tenant in made:
        await tenant.api.client.aclose()


async def buried(stack: Stack, api: Api, tenant: Tenant, raw: bytes) -> tuple[dict[str, Any], str]:
    """A request of a tenant that nobody can read, as its letter is listed, and its id."""
    request_id = new_request_id()
    sent = Envelope(request_id, "/test", int(request_id[:12], 16), tenant.id, tenant.key_id, 0, "0" * 64, 30.0)
    async with Producer(stack.settings.kafka, "test") as producer:
        await producer.send(REQUESTS.name, raw, key=request_id, headers=sealed(sent, raw, stack.settings.seals))

    async def listed() -> dict[str, Any] | None:
        page = (await api.get("/admin/dead-letters?topic=inference.requests&role=router")).json()
        return next((one for one in page["data"] if one["request_id"] == request_id), None)

    return await until(listed, "its letter", 20), request_id


async def trail(api: Api, **wanted: str) -> list[dict[str, Any]]:
    """Events of the audit trail, oldest first."""
    asked = "&".join(f"{name}={value}" for name, value in wanted.items())
    data: list[dict[str, Any]] = (await api.get(f"/admin/audit?limit=500&{asked}")).json()["data"]
    return data[::-1]


async def test_a_dead_letter_is_looked_at_mended_and_sent_once(
    stack: Stack, api: Api, tenants: list[Tenant], tmp_path: Path
) -> None:
    secret = fresh("prompt")
    letter, request_id = await buried(stack, api, tenants[0], secret.encode() + b"{")
    path = f"/admin/dead-letters/{letter['number']}"
    assert (letter["tenant"], letter["replayed_as"], letter["times_seen"]) == (tenants[0].id, None, 1)
    without, whole = (await api.get(path)).json(), (await api.get(f"{path}?body=true")).json()
    assert without["body"] is None and secret in whole["body"]
    assert ["hr-tenant", tenants[0].id] in whole["headers"]
    for forbidden in ("/admin/dead-letters", path, "/admin/audit", "/admin/erasures"):
        assert (await tenants[0].api.get(forbidden)).status_code == 403

    good = body(Spec(tokens=3, interval_ms=1))
    sent = (await api.post(f"{path}/replay", {"reason": "mended", "body": good})).json()
    assert sent["request_id"] != request_id
    rows = await usage_rows(stack, [sent["request_id"]])
    row = rows[sent["request_id"]]
    assert (row["tenant"], row["status"]) == (tenants[0].id, "completed")
    twice = await api.post(f"{path}/replay", {"reason": "twice", "body": good})
    assert (twice.status_code, twice.json()["error"]["code"]) == (409, "refused")
    assert sent["request_id"] in twice.json()["error"]["message"]
    file = tmp_path / "body.json"
    file.write_text(json.dumps(good))
    number = str(letter["number"])
    refused = stack.run("dead-letters", "edit", number, "--body-file", str(file))
    assert refused.returncode == 1 and "say `again`" in refused.stderr
    again = stack.run("dead-letters", "edit", number, "--body-file", str(file), "--again", "--reason", "once more")
    assert again.returncode == 0, again.stderr
    assert (await api.get(path)).json()["replayed_as"] in again.stdout

    async def looks() -> list[str] | None:
        reads = [one["detail"]["body"] for one in await trail(api, key=number) if one["action"] == "read"]
        return reads if len(reads) >= 2 else None

    assert (await until(looks, "both looks are in the trail"))[:2] == ["false", "true"]
    done = await trail(api, kind="replays", key=f"{number}/{letter['at_ms']}")
    assert [(one["action"], one["outcome"]) for one in done] == [
        ("create", "applied"), ("update", "applied"), ("update", "refused"), ("update", "refused"),
        ("update", "applied"), ("update", "applied"),
    ]  # fmt: skip
    assert done[0]["reason"] == "mended" and secret not in json.dumps(await trail(api))
    await settled(stack)


async def test_wishes_and_looks_are_written_down_and_the_trail_is_whole(
    stack: Stack, api: Api, tenants: list[Tenant], tmp_path: Path
) -> None:
    answer = await tenants[0].api.ask(body(Spec(tokens=2, interval_ms=1)))
    request_id = answer.headers["x-request-id"]
    assert (await tenants[0].api.get(f"/v1/requests/{request_id}")).status_code == 200
    assert await trail(api, kind="requests", key=request_id) == [], "one's own is nobody else's matter"
    assert (await api.get(f"/v1/requests/{request_id}")).status_code == 200
    [look] = await until(lambda: trail(api, kind="requests", key=request_id), "the look is in the trail")
    assert (look["action"], look["detail"]) == ("read", {"tenant": tenants[0].id})
    assert (await api.post("/admin/models/bench/load", {})).status_code == 202
    wished = await until(lambda: trail(api, kind="models", action="load"), "the wish is in the trail")
    assert wished[-1]["actor"] == look["actor"]
    notes = tmp_path / "heads"
    ran = [stack.run("audit", "verify", "--notes", str(notes)) for _ in range(2)]
    assert [one.returncode for one in ran] == [0, 0], ran[0].stderr + ran[1].stderr
    assert len(notes.read_text().splitlines()) == 2
    notes.write_text("1 " + "0" * 64 + "\n")
    forged = stack.run("audit", "verify", "--notes", str(notes))
    assert (forged.returncode, "broken at event 1:" in forged.stderr) == (1, True)
    listed = json.loads(stack.run("audit", "list", "--since", "1h", "--kind", "requests", "--json").stdout)
    assert request_id in [one["key"] for one in listed]

    async def in_sql() -> bool:
        rows = await asyncio.to_thread(stack.rows, "SELECT count() AS n, max(seq) AS last FROM audit_events")
        return rows[0]["n"] == rows[0]["last"] >= look["seq"]

    await until(in_sql, "every event is a row", 20)
    [row] = stack.rows(f"SELECT hash, actor FROM audit_events WHERE seq = {look['seq']}")  # noqa: S608
    assert (row["hash"], row["actor"]) == (look["hash"], look["actor"])


async def test_what_is_erased_is_given_out_by_nobody_and_no_rebuild_brings_it_back(
    stack: Stack, api: Api, tenants: list[Tenant]
) -> None:
    mine, other = tenants
    once = {"idempotency-key": "order-1"}
    asked = body(Spec(tokens=4, interval_ms=1), stream=True)
    seen, theirs = await mine.api.stream(asked, once), await other.api.stream(asked, once)
    letter, failed = await buried(stack, api, mine, b"not json " + fresh("prompt").encode())
    ids = [seen.request_id, theirs.request_id]
    await usage_rows(stack, ids)
    named = ", ".join(f"'{one}'" for one in [*ids, failed])
    rows = f"SELECT request_id, error_message, key_id FROM requests WHERE request_id IN ({named})"  # noqa: S608
    detail = f"SELECT detail FROM request_events WHERE request_id = '{seen.request_id}' AND stage = 'accepted'"  # noqa: S608

    async def stored() -> bool:
        found = await asyncio.to_thread(stack.rows, rows)
        return len(found) == 3 and any(row["error_message"] for row in found)

    await until(stored, "their rows", 30)
    assert stack.rows(detail)[0]["detail"]

    done = await api.post("/admin/erasures", {"user": mine.user, "reason": "asked to"})
    assert done.status_code == 202, done.text
    subjects = [f"key/{mine.key_id}", f"key/user:{mine.user}", f"user/{mine.user}"]
    assert sorted(one["subject"] for one in done.json()["data"]) == subjects
    paths = [f"/v1/requests/{seen.request_id}", f"/v1/chat/completions/{seen.completion_id}/stream"]

    async def refused() -> None:
        for path in paths:
            for who in (mine.api, api):
                answer = await who.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (410, "erased"), path
        again = await mine.api.stream(asked, once)
        assert (again.status, again.error["code"] if again.error else "") == (410, "erased")
        path = f"/admin/dead-letters/{letter['number']}"
        assert (await api.get(f"{path}?body=true")).status_code == 410
        assert (await api.post(f"{path}/replay", {"reason": "try"})).status_code == 410
        shown = stack.run("dead-letters", "show", str(letter["number"]), "--body")
        assert (shown.returncode, "erased" in shown.stderr) == (1, True)
        kept = await other.api.stream(asked, once)
        assert kept.status == 200 and kept.request_id == theirs.request_id, "others' is theirs"

    await refused()

    async def scrubbed() -> bool:
        found = await asyncio.to_thread(stack.rows, rows)
        steps = await asyncio.to_thread(stack.rows, detail)
        return not any(row["error_message"] for row in found) and steps == [{"detail": {"erased": "true"}}]

    await until(scrubbed, "the rows are without it", 20)
    for part in ("clickhouse", "redis"):
        assert stack.run("rebuild", part).returncode == 0
    assert await scrubbed()
    assert len(stack.rows(rows)) == 3
    await refused()
    await usage_rows(stack, ids)

    async def known() -> bool:
        views = (await api.get("/admin/erasures")).json()["data"]
        return all(one["applied"]["clickhouse"] for one in views if one["subject"] in subjects)

    await until(known, "it is known to be done", 20)
    shown: list[dict[str, Any]] = []
    part: dict[str, Any] = {"has_more": True, "last_id": ""}
    while part["has_more"]:
        part = (await api.get(f"/admin/erasures?limit=2&after={part['last_id']}")).json()
        shown += part["data"]
    listed = [one["subject"] for one in shown]
    assert set(subjects) <= set(listed) and len(set(listed)) == len(listed)
    assert [one["asked_ms"] for one in shown] == sorted((one["asked_ms"] for one in shown), reverse=True)
    later = await mine.api.ask(body(Spec(tokens=1, interval_ms=1)))
    assert later.status_code == 200, "what is asked later is not meant"
    assert (await mine.api.get(f"/v1/requests/{later.headers['x-request-id']}")).status_code == 200
    assert stack.run("erase", "--request", later.headers["x-request-id"]).returncode == 0
    assert (await mine.api.get(f"/v1/requests/{later.headers['x-request-id']}")).status_code == 410
    assert mine.key_id in stack.run("erasures", "--json").stdout


async def test_no_tenant_reads_resumes_or_takes_over_anothers_request(stack: Stack, tenants: list[Tenant]) -> None:
    mine, other = tenants
    once = {"idempotency-key": "same-for-both"}
    asked = body(Spec(tokens=5, interval_ms=1), stream=True)
    seen = await mine.api.stream(asked, once)
    theirs = await other.api.stream(asked, once)
    assert theirs.request_id != seen.request_id, "keys of two tenants are two"
    assert (await other.api.stream({**asked, "max_tokens": 3}, once)).status == 409, "and each keeps to its own body"
    for path in (
        f"/v1/requests/{seen.request_id}",
        f"/v1/requests/{seen.completion_id}",
        f"/v1/chat/completions/{seen.completion_id}/stream",
    ):
        answer = await other.api.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
        unknown = await other.api.get(path.replace(seen.request_id, new_request_id()))
        same = re.sub(r"[0-9a-f]{32,}", "", unknown.json()["error"]["message"])
        assert re.sub(r"[0-9a-f]{32,}", "", answer.json()["error"]["message"]) == same, "not even that there is one"
    async with mine.api.open(body(Spec(tokens=60, interval_ms=30))) as reader:
        await reader.until_tokens(3)
        stranger = await other.api.resume(reader.seen.completion_id)
        assert stranger.status == 404
        whole = await reader.rest()
    assert whole.done and len(whole.tokens) == 60, "nobody else's coming and going ends it"


async def signed_in(api: Api, app: str) -> str:
    """The access token of a new member of an app."""
    email, password = f"{fresh('user')}@example.org", fresh("a password")
    made = await api.post("/admin/users", {"email": email, "password": password, "role": "member", "apps": [app]})
    assert made.status_code == 201, made.text
    token: str = (await api.post("/auth/token", {"email": email, "password": password})).json()["access_token"]
    return token


async def test_a_signed_in_user_reads_resumes_and_ends_no_request_of_an_app_that_is_not_theirs(
    stack: Stack, api: Api, tenants: list[Tenant]
) -> None:
    mine, other = tenants
    theirs, name = await signed_in(api, other.id), fresh("guarded")
    async with Api(stack, key=await signed_in(api, mine.id)) as colleague, Api(stack, key=theirs) as stranger:
        async with mine.api.open(body(Spec(tokens=100, interval_ms=30, id=name))) as reader:
            seen = await reader.until_tokens(3)
            life, stream = f"/v1/requests/{seen.request_id}", f"/v1/chat/completions/{seen.completion_id}/stream"
            for path in (life, f"/v1/requests/{seen.completion_id}", stream):
                for headers in ({}, {"x-hr-app": mine.id}):
                    answer = await stranger.get(path, **headers)
                    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
            for path in (life, stream, f"/v1/chat/completions/{seen.completion_id}"):
                ended = await stranger.client.delete(stranger.url(path), headers={"authorization": f"Bearer {theirs}"})
                assert ended.status_code in (404, 405), "no route ends a request by its id"
            assert (await colleague.get(life)).json()["tenant"] == mine.id
            resumed = await colleague.resume(seen.completion_id)
            whole = await reader.rest()
        assert resumed.done and resumed.tokens == whole.tokens == list(range(100)), "a member of the app may"
        row = (await usage_rows(stack, [seen.request_id]))[seen.request_id]
        assert (row["tenant"], row["status"]) == (mine.id, "completed")
        assert (await stack.seen(name)).disconnects == 0


async def test_no_secret_is_at_rest_in_plain(stack: Stack, api: Api, tenants: list[Tenant]) -> None:
    """Keys are nowhere but with their callers; prompts in the topics that carry them, and nowhere else."""
    prompt, bad = fresh("secretprompt"), fresh("hr-nobodys-key")
    created = stack.run("keys", "create", "--name", "swept").stdout.strip()
    secrets = {"key": tenants[0].text, "created": created, "admin": stack.key, "provider": PROVIDER_KEY, "unknown": bad}
    secrets |= {name: (stack.data_dir / f"{name}.secret").read_text().strip() for name in ("jwt", "ingress")}
    asked = body(f"{prompt}\n{Spec(tokens=3, interval_ms=1).line()}")
    for sent in (asked, {**asked, "stream": True}, {**asked, "model": prompt}, {**asked, "n": prompt}):
        await tenants[0].api.ask(sent)
    await tenants[0].api.ask(json.dumps(asked).encode()[:-2])
    async with Api(stack, key=bad) as nobody:
        assert (await nobody.ask(asked)).status_code == 401
    async with Api(stack, key=created) as swept:
        assert (await swept.ask(asked)).status_code == 200
    secrets |= await signed_in_and_out(api)
    await api.post("/admin/models/bench/load", {})
    await buried(stack, api, tenants[0], b"{" + prompt.encode())
    assert stack.run("keys", "revoke", created).returncode == 0
    await settled(stack)

    def look(where: str, text: str | bytes, names: dict[str, str]) -> None:
        raw = text.encode() if isinstance(text, str) else text
        found = [name for name, secret in names.items() if secret.encode() in raw]
        assert not found, f"{found} in {where}"

    content = (REQUESTS, ROUTED, REPLIES, LOG, DEAD_LETTERS, worker_commands("w1"))
    records = 0
    for topic in (*CATALOGUE, worker_commands("w1")):
        async with LogReader(stack.settings.kafka, "sweep") as reader:
            async for record in reader.read_to_end(reader.assign([topic])):
                records += 1
                raw = b"\n".join([record.key or b"", record.value or b"", *(value for _, value in record.headers)])
                look(topic.name, raw, secrets if topic in content else secrets | {"prompt": prompt})
    assert records > 100
    secrets["prompt"] = prompt
    logs = [stack.data_dir.with_suffix(".log"), *(stack.data_dir / "logs").iterdir()]
    for log in logs:
        look(str(log), log.read_bytes(), secrets)
    redis = connect(stack.settings.redis_url)
    keys = 0
    async for name in redis.scan_iter():
        keys += 1
        held = await redis.dump(name)
        look(f"redis {name!r}", bytes(name) + await _plain(redis, name) + bytes(held or b""), secrets)
    await redis.aclose()
    assert keys > 10
    named = stack.rows("SELECT name FROM system.tables WHERE database = currentDatabase()")
    tables = [str(row["name"]) for row in named]
    assert len(tables) > 5
    for table in tables:
        look(f"clickhouse {table}", str(stack.rows(f"SELECT * FROM {table}")), secrets)  # noqa: S608


async def signed_in_and_out(api: Api) -> dict[str, str]:
    """A user was made, signed in, mistyped its password, and left; what of that must be nowhere."""
    email, password, wrong = f"{fresh('swept')}@example.org", fresh("a password"), fresh("a wrong one")
    made = await api.post("/admin/users", {"email": email, "password": password, "role": "member", "apps": ["default"]})
    assert made.status_code == 201, made.text
    failed = await api.post("/auth/token", {"email": email, "password": wrong})
    assert failed.status_code == 401
    misplaced = await api.post("/auth/token", {"email": password, "password": email})
    assert misplaced.status_code == 401
    tokens = (await api.post("/auth/token", {"email": email, "password": password})).json()
    access, refresh = tokens["access_token"], tokens["refresh_token"]
    left = await api.client.post(api.url("/auth/logout"), headers={"authorization": f"Bearer {access}"})
    assert left.status_code == 204
    return {"password": password, "wrong password": wrong, "access token": access, "refresh token": refresh}


async def _plain(redis: Any, name: bytes) -> bytes:
    """A value as its commands give it: a dump may be compressed."""
    kind = await redis.type(name)
    read = {b"string": "GET", b"hash": "HGETALL", b"set": "SMEMBERS"}.get(kind)
    if read is not None:
        return repr(await redis.execute_command(read, name)).encode()
    if kind == b"list":
        return repr(await redis.lrange(name, 0, -1)).encode()
    return repr(await redis.zrange(name, 0, -1)).encode() if kind == b"zset" else b""
