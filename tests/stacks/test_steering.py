"""Seeing and steering models, workers and leases on the real stack: admin API and command line, on a real engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from redis.asyncio import Redis

from bench.gateway.spec import Spec
from headrace.control_client import command, control_client
from headrace.fleet import followed
from headrace.redis_client import connect
from schemas.control import Model
from schemas.events import PoolStatus
from tests.support.chat import body
from tests.support.side_worker import SideWorker
from tests.support.stacks import NO_TLS, Stack, running_stack
from tests.support.waiting import until
from topics.apply import apply_all

GIB = 2**30
MODEL = "smollm2"
STRETCHED = """
[[models]]
id = "stretched"
provider = "local"
backend_tag = "SmolLM2-135M-Instruct"
context_length = 16384
capabilities = ["chat", "tools"]
preload = false
"""
"""What its record says is more than the model is."""


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[Stack]:
    """A stack of its own: its model comes and goes, and its scheduler is killed."""
    with running_stack(tmp_path_factory.mktemp("steered"), upstream_url, small_model=True, models=STRETCHED) as stack:
        yield stack


@pytest.fixture
async def admin(steered: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with _client(steered, steered.key) as client:
        yield client


def _client(stack: Stack, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=stack.base_url, headers={"authorization": f"Bearer {key}"}, timeout=60, verify=NO_TLS
    )


async def model(admin: httpx.AsyncClient, name: str = MODEL) -> dict[str, Any]:
    answer = await admin.get(f"/admin/models/{name}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def becomes(admin: httpx.AsyncClient, state: str, name: str = MODEL) -> dict[str, Any]:
    """Wait until a model is in a state."""

    async def look() -> dict[str, Any] | None:
        found = await model(admin, name)
        return found if found["state"] == state else None

    return await until(look, f"{name} is {state}", 60)


def engines(stack: Stack) -> list[psutil.Process]:
    """The processes of llama.cpp."""
    return [process for process in stack.process.tree() if "llama_child" in " ".join(process.cmdline())]


async def ask(admin: httpx.AsyncClient) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    return await admin.post("/v1/chat/completions", json=body)


async def test_only_admins_may_see_and_steer(steered: Stack, admin: httpx.AsyncClient) -> None:
    made = steered.run("keys", "create", "--name", "member")
    routes = [
        ("GET", "/admin/models"), ("GET", f"/admin/models/{MODEL}"), ("POST", f"/admin/models/{MODEL}/load"),
        ("POST", f"/admin/models/{MODEL}/unload"), ("POST", f"/admin/models/{MODEL}/pin"),
        ("POST", f"/admin/models/{MODEL}/unpin"), ("GET", "/admin/workers"), ("GET", "/admin/leases"),
        ("POST", "/admin/leases/release"),
    ]  # fmt: skip
    body = {"worker": "w1", "model": MODEL, "reason": "x"}
    async with _client(steered, made.stdout.strip()) as member:
        for method, path in routes:
            answer = await member.request(method, path, json=body if path.endswith("release") else None)
            assert answer.status_code == 403, path
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("permission_error", "permission_denied")
            assert "The role 'member' may not do this" in error["message"]
    described = (await admin.get("/openapi.json")).json()["paths"]
    documented = {(method.upper(), path) for path, methods in described.items() for method in methods}
    assert {(method, path.replace(MODEL, "{model_id}")) for method, path in routes} <= documented
    assert (await model(admin))["state"] == "active", "nothing of it was done"


async def test_what_is_not_there_is_told(admin: httpx.AsyncClient) -> None:
    for method, path in (("GET", "/admin/models/no/such"), ("POST", "/admin/models/no/such/load")):
        answer = await admin.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    release = {"worker": "w9", "model": MODEL, "reason": "x"}
    answer = await admin.post("/admin/leases/release", json=release)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    answer = await admin.post("/admin/leases/release", json=release | {"worker": "w1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    answer = await admin.post("/admin/leases/release", json={"worker": "w1", "model": MODEL})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body.reason")


async def test_a_model_is_seen_with_its_worker_and_lease(admin: httpx.AsyncClient) -> None:
    assert (await ask(admin)).status_code == 200
    found = await until(lambda: _used(admin), "its use is told")
    [lease] = found["leases"]
    assert (found["state"], found["queued"], found["asked"], found["error"]) == ("active", 0, None, None)
    assert found["aliases"] == ["gpt-4o-mini"] and found["price"]["output"] == "0.40"
    assert (await model(admin, "gpt-4o-mini"))["id"] == MODEL
    assert (lease["worker"], lease["state"]) == ("w1", "active")
    [worker] = (await admin.get("/admin/workers")).json()["data"]
    assert (worker["id"], worker["status"], worker["pool"]) == ("w1", "ready", "default")
    assert worker["age_ms"] < 3_000
    [held] = [held for held in worker["residents"] if held["model"] == MODEL]
    assert (held["state"], held["epoch"]) == ("active", lease["epoch"])
    assert lease in (await admin.get("/admin/leases")).json()["data"]
    listed = (await admin.get("/admin/models")).json()
    assert listed["object"] == "list" and MODEL in {one["id"] for one in listed["data"]}
    disabled = [one for one in listed["data"] if one["state"] == "unknown"]
    assert not disabled, "the scheduler tells of every model"


async def events(client: httpx.AsyncClient, name: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Kind and object of each event that tells how a model stands, until the stream ends."""
    async with client.stream("GET", f"/admin/models/{name}/events") as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        kind = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


@pytest.mark.timeout(120)
async def test_whoever_watches_a_model_is_told_of_each_change(steered: Stack, admin: httpx.AsyncClient) -> None:
    assert (await becomes(admin, "active"))["id"] == MODEL
    states: list[str] = []
    async with aclosing(events(admin, "gpt-4o-mini")) as told, asyncio.timeout(60):
        async for kind, shown in told:
            assert (kind, shown["id"]) == ("model", MODEL)
            if not states or shown["state"] != states[-1]:
                states.append(shown["state"])
                if states == ["active"]:
                    assert (await admin.post(f"/admin/models/{MODEL}/unload")).status_code == 202
                elif states[-1] == "unloaded":
                    assert (await admin.post(f"/admin/models/{MODEL}/load")).status_code == 202
                elif states[-1] == "active":
                    break
    assert [state for state in states if state in ("active", "unloaded")] == ["active", "unloaded", "active"]
    assert "loading" in states
    answer = await admin.get("/admin/models/no/such/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_who_may_no_longer_watch_is_told_so(steered: Stack) -> None:
    name = f"watcher-{time.time_ns()}"
    made = steered.run("keys", "create", "--name", name, "--role", "admin")
    assert made.returncode == 0, made.stderr
    kinds: list[tuple[str, str]] = []
    async with _client(steered, made.stdout.strip()) as watcher, asyncio.timeout(30):
        async for kind, shown in events(watcher, MODEL):
            kinds.append((kind, shown["error"]["code"] if kind == "error" else ""))
            if len(kinds) == 1:
                ran = await asyncio.to_thread(steered.run, "keys", "revoke", name)
                assert ran.returncode == 0, ran.stderr
    assert kinds[0] == ("model", "") and kinds[-1][0] == "error", kinds
    assert kinds[-1][1] == "invalid_api_key", kinds


async def test_what_a_model_is_outlives_redis_and_contradicts_its_record(
    steered: Stack, admin: httpx.AsyncClient
) -> None:
    async def told() -> dict[str, Any] | None:
        return (await model(admin)).get("facts")

    facts = await until(told, "the worker told what the model is", 20)
    assert (facts["architecture"], facts["quantisation"], facts["context_length"]) == ("llama", "Q4_1", 8192)
    assert facts["parameters"] > 10**8 and facts["capabilities"] == ["chat"] and len(facts["template_digest"]) == 12
    assert (await model(admin))["warnings"] == []

    async with redis_of(steered) as redis:
        await redis.delete("hr:facts", "hr:facts:next")
        assert await until(told, "the control role has filled it again", 20) == facts
        await redis.hset(
            "hr:facts", "w1/ghost", b'{"worker":"w1","model":"ghost","provider":"","backend_tag":"","at_ms":1}'
        )
        ran = await asyncio.to_thread(steered.run, "rebuild", "redis")
        assert ran.returncode == 0, ran.stderr
        assert b"w1/ghost" not in await redis.hkeys("hr:facts"), "what Kafka does not have is gone"
        assert await told() == facts

    async def doubted() -> list[str] | None:
        return (await model(admin, "stretched"))["warnings"] or None

    long, tools = await until(doubted, "the record is doubted", 20)
    assert long.startswith("context_length is 16384, more than the 8192 tokens") and "'tools'" in tools
    ready = (await admin.get("/health/ready")).json()
    assert ready["warnings"] == {"stretched": [long, tools]}, "and requests are served all the same"
    shown = await asyncio.to_thread(steered.run, "models", "show", "stretched")
    assert "llama, 135 M parameters, Q4_1, 8192 tokens of context, chat template" in shown.stdout
    assert "lower it" in shown.stdout
    doctor = await asyncio.to_thread(steered.run, "doctor")
    assert f"LOOK    model stretched: {long}" in doctor.stdout


async def _used(admin: httpx.AsyncClient) -> dict[str, Any] | None:
    found = await model(admin)
    return found if found["last_used_ms"] and found["running"] == 0 else None


async def test_a_model_is_unloaded_and_comes_back_with_a_request_or_a_load(
    steered: Stack, admin: httpx.AsyncClient
) -> None:
    before = (await becomes(admin, "active"))["leases"][0]["epoch"]
    assert len(engines(steered)) == 1
    answer = await admin.post(f"/admin/models/{MODEL}/unload")
    assert answer.status_code == 202
    taken = answer.json()
    assert (taken["kind"], taken["model"], taken["pool"], len(taken["id"])) == ("unload", MODEL, "default", 32)
    found = await becomes(admin, "unloaded")
    assert (found["leases"], found["asked"]) == ([], "unload")
    await until(lambda: not engines(steered), "its engine is gone")
    assert (await admin.get("/health/ready")).status_code == 200, "a model that is to be out is not waited for"
    assert (await ask(admin)).status_code == 200, "who asks for it has it loaded"
    found = await becomes(admin, "active")
    assert found["asked"] is None and found["leases"][0]["epoch"] > before
    assert len(engines(steered)) == 1
    ran = steered.run("models", "unload", MODEL, "--reason", "test")
    assert ran.returncode == 0 and ran.stdout.startswith(f"{MODEL} is unloaded after "), ran.stdout + ran.stderr
    assert not engines(steered)
    assert (await admin.post(f"/admin/models/{MODEL}/load")).status_code == 202
    await becomes(admin, "active")
    assert len(engines(steered)) == 1
    rows = await until(
        lambda: steered.rows(f"SELECT reason, seconds FROM leases WHERE model = '{MODEL}' AND state = 'free'")  # noqa: S608
        [1:], "both leases that ended are in ClickHouse")  # fmt: skip
    assert "unloaded by headrace command line: test" in {row["reason"] for row in rows} | _reasons(steered)


def _reasons(stack: Stack) -> set[object]:
    return {row["reason"] for row in stack.rows(f"SELECT reason FROM leases WHERE model = '{MODEL}'")}  # noqa: S608


async def test_a_wish_is_obeyed_once_also_across_a_takeover(steered: Stack, admin: httpx.AsyncClient) -> None:
    assert steered.run("models", "unload", MODEL).returncode == 0
    await _another_scheduler(steered)
    found = await model(admin)
    assert (found["state"], found["asked"]) == ("unloaded", "unload"), "the next scheduler does not preload it"
    ran = steered.run("models", "load", "gpt-4o-mini")
    assert ran.returncode == 0 and ran.stdout.startswith(f"{MODEL} is loaded after "), ran.stdout + ran.stderr
    before = await becomes(admin, "active")
    await _another_scheduler(steered)
    after = await becomes(admin, "active")
    assert [lease["epoch"] for lease in after["leases"]] == [lease["epoch"] for lease in before["leases"]]


async def _another_scheduler(stack: Stack) -> None:
    """Kill the scheduler; return when the next one has heard from the worker and read all wishes."""
    async with followed(stack.settings) as fleet:
        term = fleet.pools["default"].term
        await stack.killed("scheduler-1")

        def settled() -> PoolStatus | None:
            status = fleet.pools["default"]
            return status if status.term > term and status.workers else None

        first = await until(settled, "another scheduler has the pool", 60)
        await until(lambda: fleet.pools["default"].at_ms > first.at_ms + 3_000, "it has worked for a while", 30)


async def test_a_pinned_model_is_not_unloaded_until_it_is_unpinned(steered: Stack, admin: httpx.AsyncClient) -> None:
    answer = await admin.post(f"/admin/models/{MODEL}/pin")
    assert (answer.status_code, answer.json()["pinned"]) == (200, True)
    await until(lambda: _pinned(admin, True), "it is in force")
    answer = await admin.post(f"/admin/models/{MODEL}/unload")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    ran = steered.run("models", "unload", MODEL)
    assert (ran.returncode, ran.stderr.strip()) == (1, f"error: The model '{MODEL}' is pinned; unpin it first.")
    assert steered.run("models", "unpin", MODEL).stdout.strip() == f"unpinned {MODEL}"
    assert steered.run("models", "unpin", MODEL).stdout.strip() == f"{MODEL} was unpinned before"
    await until(lambda: _pinned(admin, False), "it is in force")


async def _pinned(admin: httpx.AsyncClient, wanted: bool) -> bool:
    return bool((await model(admin))["pinned"] is wanted)


def test_the_command_line_shows_what_the_api_shows(steered: Stack) -> None:
    shown = steered.run("models", "list")
    assert shown.returncode == 0 and MODEL in shown.stdout and "0.10 USD" in shown.stdout, shown.stderr
    [listed] = [one for one in json.loads(steered.run("models", "list", "--json").stdout) if one["id"] == MODEL]
    one = json.loads(steered.run("models", "show", MODEL, "--json").stdout)
    assert one.keys() == listed.keys() and one["leases"] == listed["leases"]
    text = steered.run("models", "show", "gpt-4o-mini").stdout
    assert f"model      {MODEL}" in text and "w1" in text
    [worker] = json.loads(steered.run("workers", "--json").stdout)
    assert worker["id"] == "w1"
    assert "ready" in steered.run("workers").stdout
    assert one["leases"][0] in json.loads(steered.run("leases", "--json").stdout)
    assert MODEL in steered.run("leases").stdout
    ran = steered.run("leases", "release", "w1", MODEL, "--reason", "test")
    assert ran.returncode == 1 and "only quarantined bytes are released" in ran.stderr
    ran = steered.run("models", "show", "nope")
    assert (ran.returncode, ran.stderr.strip()) == (1, "error: There is no model 'nope'.")


async def test_weights_of_apps_are_in_force(steered: Stack) -> None:
    assert steered.run("apps", "create", "heavy", "--weight", "4").returncode == 0
    assert steered.run("apps", "update", "heavy", "--weight", "2.5").stdout.strip() == "updated app heavy"
    assert "2.5" in steered.run("apps", "list").stdout
    ran = steered.run("apps", "update", "nobody", "--weight", "2")
    assert ran.returncode == 1 and "there is no app 'nobody'" in ran.stderr
    assert steered.run("apps", "update", "heavy", "--weight", "0").returncode == 2
    assert steered.run("apps", "update", "heavy", "--weight", "4").returncode == 0
    heavy = steered.run("keys", "create", "--name", "heavy", "--app", "heavy").stdout.strip()
    served: list[str] = []

    async def ask_narrow(client: httpx.AsyncClient, tenant: str, spec: Spec) -> None:
        answer = await client.post("/v1/chat/completions", json=body(spec, model="narrow"))
        assert answer.status_code == 200, answer.text
        served.append(tenant)

    async with _client(steered, heavy) as one, _client(steered, steered.key) as other:
        # The first one holds the only slot until all others wait.
        first = asyncio.create_task(ask_narrow(one, "first", Spec(tokens=40, interval_ms=200)))
        await until(lambda: _running(other, 1, 0), "it runs")
        brief = Spec(tokens=20, interval_ms=1)
        rest = [asyncio.create_task(ask_narrow(*who, brief)) for who in ((one, "heavy"), (other, "light")) * 12]
        await until(lambda: _running(other, 1, 24), "the others wait")
        await asyncio.gather(first, *rest)
    # By the counters, heavy is served four times for each of light's; both have enough waiting for the first ten.
    assert served[0] == "first"
    assert 7 <= served[1:11].count("heavy") <= 9, served


async def _running(admin: httpx.AsyncClient, running: int, queued: int) -> bool:
    found = await model(admin, "narrow")
    return (found["running"], found["queued"]) == (running, queued)


# --- a quarantine, on a worker whose memory never seems to come back ----------------------------------------------


@asynccontextmanager
async def redis_of(stack: Stack) -> AsyncIterator[Redis]:
    client = connect(stack.settings.redis_url)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def side_pool(stack: Stack) -> AsyncIterator[SideWorker]:
    """A pool with one worker of 10 GiB, and two models of 8 GiB."""
    conf = stack.settings
    await apply_all(conf, workers=["side"])
    async with control_client(conf, timeout=20) as client:
        sides = [
            Model(name, "local", "x", pool="side", preload=False, bytes=8 * GIB, load_ms=100) for name in ("old", "new")
        ]
        await client.submit([command(side, actor="test") for side in sides])
        async with SideWorker(conf, "side", pool="side", provider="local", size=10 * GIB) as worker:
            yield worker
        gone = [msgspec.structs.replace(side, enabled=False) for side in sides]
        await client.submit([command(side, actor="test") for side in gone])


async def test_quarantined_bytes_are_granted_again_on_an_operators_word(
    steered: Stack, admin: httpx.AsyncClient
) -> None:
    async with side_pool(steered) as worker:
        assert await _loaded(steered, admin, "old")
        worker.keeps_showing = "old"
        assert (await admin.post("/admin/models/old/unload")).status_code == 202
        lease = await until(lambda: _lease(admin, "old", "quarantined"), "the bytes are quarantined", 60)
        assert (lease["bytes"], lease["device"], lease["worker"]) == (8 * GIB, "d0", "side")
        first, more = await pages(admin, "workers", 2)
        assert [one["id"] for one in (*first, *more)] == ["side", "w1"]
        [side] = (await admin.get("/admin/workers", params={"pool": first[0]["pool"], "status": "ready"})).json()[
            "data"
        ]
        assert side["id"] == "side"
        assert side["devices"] == [{"id": "d0", "bytes": 10 * GIB, "held_bytes": 8 * GIB, "utilisation": None}]
        assert (await asyncio.to_thread(steered.run, "models", "load", "new", "--no-wait")).returncode == 0
        said = {"worker": "side", "model": "old", "reason": "seen in nvidia-smi"}
        answer = await admin.post("/admin/leases/release", json=said)
        assert answer.status_code == 202, answer.text
        assert await until(lambda: _lease(admin, "new", "active"), "the other model has the memory")
        assert "old" in worker.residents, "though the worker still shows the first"
    [row] = await until(
        lambda: steered.rows(
            "SELECT device, bytes, byte_seconds, reason FROM leases WHERE model = 'old' AND state = 'free'"
        ),
        "the lease is in ClickHouse",
    )
    assert (row["device"], row["bytes"]) == ("d0", 8 * GIB)
    assert str(row["reason"]).startswith("released by key admin-") and "seen in nvidia-smi" in str(row["reason"])
    assert float(str(row["byte_seconds"])) > 30 * 8 * GIB, "it was held for the half minute of the quarantine"


async def pages(admin: httpx.AsyncClient, kind: str, count: int) -> list[list[dict[str, Any]]]:
    """The first pages of a list, of one item each."""
    found: list[list[dict[str, Any]]] = []
    params: dict[str, str] = {"limit": "1"}
    for number in range(count):
        answer = (await admin.get(f"/admin/{kind}", params=params)).json()
        assert answer["has_more"] is (number < count - 1)
        found.append(answer["data"])
        params["after"] = answer["last_id"]
    return found


async def _loaded(stack: Stack, admin: httpx.AsyncClient, name: str) -> bool:
    await until(lambda: _told(admin, name), "the pool has its scheduler and worker", 60)
    # Beside the worker, which is in this loop and must go on reporting.
    ran = await asyncio.to_thread(stack.run, "models", "load", name)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return (await model(admin, name))["state"] == "active"


async def _told(admin: httpx.AsyncClient, name: str) -> bool:
    workers = {one["id"] for one in (await admin.get("/admin/workers")).json()["data"]}
    return "side" in workers and (await model(admin, name))["state"] != "unknown"


async def _lease(admin: httpx.AsyncClient, name: str, state: str) -> dict[str, Any] | None:
    wanted = {"model": name, "state": state}
    found: list[dict[str, Any]] = (await admin.get("/admin/leases", params=wanted)).json()["data"]
    assert all({"model": one["model"], "state": one["state"]} == wanted for one in found)
    return found[0] if found else None


async def test_leases_of_a_stack_that_was_stopped_have_ended_when_it_runs_again(steered: Stack) -> None:
    held = f"SELECT epoch, state, toUnixTimestamp64Milli(released_at) AS ended FROM leases WHERE model = '{MODEL}'"  # noqa: S608
    open_before = [row["epoch"] for row in steered.rows(held) if row["ended"] is None]
    assert len(open_before) == 1
    steered.stop()
    stopped_ms = time.time_ns() // 1_000_000
    steered.start()

    def ended() -> list[dict[str, object]]:
        return [row for row in steered.rows(held) if row["epoch"] in open_before and row["ended"] is not None]

    [row] = await until(ended, "the lease of the run before has ended", 60)
    assert row["state"] == "lost" and int(str(row["ended"])) <= stopped_ms, "when its worker was last heard"
    still = await until(lambda: [row for row in steered.rows(held) if row["ended"] is None], "it is held again")
    assert len(still) == 1 and still[0]["epoch"] not in open_before
