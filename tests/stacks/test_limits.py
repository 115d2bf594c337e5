"""Limits on a stack with three ingresses: races, what was reserved when parts died, and who is told what."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import NamedTuple

import httpx
import msgspec
import pytest

from bench.gateway.spec import Spec
from headrace.control_client import command, control_client
from headrace.errors import Unavailable
from headrace.limits.limiter import Limiter
from headrace.limits.lua import PENDING_US, PREFIX
from headrace.limits.scopes import Scope
from headrace.limits.standing import Standing
from headrace.redis_client import connect
from processors.metering.settlement import FETCH_WAIT_MS, REAP_EVERY_S
from schemas.control import App, Key
from schemas.events import Status, Terminal
from schemas.ids import new_request_id
from tests.conftest import MakeStack
from tests.support.accounts import settled
from tests.support.chat import Api, body, fresh
from tests.support.publishing import sealed
from tests.support.stacks import Stack, paid_model
from tests.support.waiting import until
from topics import request_log
from topics.catalogue import LOG, REQUESTS
from topics.clients import LogReader, Producer
from topics.envelope import Envelope

TOKENS = 20
COST = Decimal("0.0002")
"""Of `TOKENS` tokens."""
FREED_S = PENDING_US / 1_000_000 + REAP_EVERY_S + FETCH_WAIT_MS / 1000
"""How long a reservation without a request outlives its ingress at most: its own 10 s, then until metering's reaper
comes round, which looks every 5 s, between two fetches of half a second."""


@pytest.fixture(scope="module")
def trio(make_stack: MakeStack) -> Stack:
    return make_stack(models=paid_model(input="0", output="10.00"), replicas={"ingress": 3})


class Account:
    """A tenant of its own with one key, at every ingress."""

    def __init__(self, stack: Stack, app: App, key: Key, secret: str) -> None:
        self.stack = stack
        self.app = app
        self.key = key
        self.apis = [Api(stack, key=secret, ingress=at) for at in range(len(stack.ingress_urls))]
        self._redis = connect(stack.settings.redis_url)
        self._limiter = Limiter(self._redis)
        limits = (key.rate_limit_rpm, key.rate_limit_tpm, key.concurrency_limit, key.monthly_budget)
        self.scope = Scope("key", key.id, *limits)

    async def standing(self) -> Standing:
        """How its key stands."""
        return (await self._limiter.standing([self.scope]))[0]

    async def is_idle(self) -> bool:
        """Whether nothing of it is open, as Redis holds it: asking for its standing would give back what lapsed."""
        return int(await self._redis.hget(f"{PREFIX}s:{self.scope.name}", "open") or 0) == 0

    async def free(self, within_s: float = 20) -> Standing:
        """How it stands once nothing of it is open."""

        async def none() -> Standing | None:
            try:
                found = await self.standing()
                whole = (await self._limiter.state()).whole
            except Unavailable:
                return None
            return found if whole and not found.concurrency_limit.used else None

        return await until(none, "nothing is open", within_s)

    async def ask(
        self, ingress: int, *, tokens: int = TOKENS, interval_ms: float = 5, name: str = ""
    ) -> httpx.Response:
        """One request to `paid`, which costs `COST` for `TOKENS`."""
        spec = Spec(tokens=tokens, interval_ms=interval_ms, ttft_ms=1, id=name)
        return await self.apis[ingress % 3].ask(body(spec, model="paid", max_tokens=tokens))

    async def close(self) -> None:
        for api in self.apis:
            await api.client.aclose()
        await self._redis.aclose()


@contextlib.asynccontextmanager
async def account(stack: Stack, **limits: object) -> AsyncIterator[Account]:
    """A tenant whose key has limits."""
    await stack.ready()
    name, secret = fresh("tenant"), f"hr-{fresh('key')}"
    app = App(id=name, name=name)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    key = msgspec.convert({"id": f"k-{name}", "sha256": digest, "name": name, "app": name, **limits}, Key)
    async with control_client(stack.settings, timeout=30) as client:
        await client.submit([command(app, actor="test"), command(key, actor="test")])
    made = Account(stack, app, key, secret)
    try:
        await made.free()  # A stack that has just started fills its limits yet.
        yield made
    finally:
        await made.close()


def error_of(answer: httpx.Response) -> dict[str, str]:
    found: dict[str, str] = answer.json()["error"]
    return found


async def test_64_callers_use_a_budget_to_its_last_unit_and_no_further(trio: Stack) -> None:
    async with account(trio, monthly_budget=COST * 100) as tenant:
        answered: list[str] = []
        seen: list[Decimal] = []
        done = asyncio.Event()

        async def caller(who: int) -> None:
            while True:
                answer = await tenant.ask(who)
                if answer.status_code == 200:
                    assert answer.json()["usage"]["completion_tokens"] == TOKENS
                    answered.append(answer.headers["x-request-id"])
                    continue
                assert answer.status_code == 429, answer.text
                assert error_of(answer)["code"] == "insufficient_quota"
                if answer.headers.get("x-should-retry") == "false":
                    return
                await asyncio.sleep(0.2)

        async def watch() -> None:
            while not done.is_set():
                seen.append((await tenant.standing()).monthly_budget.used)
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(caller(who) for who in range(64)))
        done.set()
        await watching
        assert len(answered) == 100
        found = await tenant.free()
        assert found.spent == found.monthly_budget.used == COST * 100
        assert max(seen) == COST * 100

        async def billed() -> bool:
            query = f"SELECT count() AS rows, sum(cost) AS cost FROM usage WHERE tenant = '{tenant.app.id}'"  # noqa: S608
            row = (await asyncio.to_thread(trio.rows, query))[0]
            return (row["rows"], row["cost"]) == (100, COST * 100)

        await until(billed, "a usage row for each, of the same sum", 40)


async def test_concurrency_of_8_is_never_9(trio: Stack) -> None:
    async with account(trio, concurrency_limit=8) as tenant:
        name = fresh("eight")
        until_s = time.monotonic() + 5
        answered = refused = 0

        async def caller(who: int) -> None:
            nonlocal answered, refused
            turn = 0
            while time.monotonic() < until_s:
                turn += 1
                answer = await tenant.ask(who + turn, interval_ms=20, name=f"{name}-{who}-{turn}")
                answered += answer.status_code == 200
                if answer.status_code == 429:
                    refused += 1
                    error = error_of(answer)
                    assert (error["type"], error["param"]) == ("concurrency", "key.concurrency_limit")
                    assert answer.headers["retry-after"] == "1"
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(caller(who) for who in range(24)))
        tries = [one for key, entry in (await trio.all_seen()).items() if key.startswith(name) for one in entry.tries]
        moments = sorted([(one.received_ns, 1) for one in tries] + [(one.ended_ns or 2**63, -1) for one in tries])
        running = most = 0
        for _, change in moments:
            running += change
            most = max(most, running)
        assert most == 8, f"{most} at once; {answered} answered, {refused} refused"
        await tenant.free()


async def test_rates_are_told_as_openai_tells_them(trio: Stack) -> None:
    async with account(trio, rate_limit_rpm=5, rate_limit_tpm=100_000) as tenant:
        answers = await asyncio.gather(*(tenant.ask(at, tokens=2) for at in range(12)))
        good = [answer for answer in answers if answer.status_code == 200]
        assert len(good) == 5
        assert sorted(answer.headers["x-ratelimit-remaining-requests"] for answer in good) == list("01234")
        for answer in answers:
            assert answer.headers["x-ratelimit-limit-requests"] == "5"
            assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
            assert answer.headers["x-ratelimit-reset-tokens"]
        bad = next(answer for answer in answers if answer.status_code == 429)
        error = error_of(bad)
        assert (error["code"], error["type"], error["param"]) == (
            "rate_limit_exceeded",
            "requests",
            "key.rate_limit_rpm",
        )
        assert tenant.key.id in error["message"]
        assert 50 <= int(bad.headers["retry-after"]) <= 60
        found = await tenant.free()
        total = sum(answer.json()["usage"]["total_tokens"] for answer in good)
        assert found.rate_limit_tpm.used == total, "what was reserved gives way to what it came to"
        async with tenant.apis[0].open(body(Spec(tokens=1), model="paid")) as reader:
            assert reader.seen.status == 429


WINDOW_S = 60.0
RPM = 40
SUSTAINED_S = 80.0
SLOW_S, GAP_SLOW_S, GAP_S = 30.0, 2.0, 0.25


class Try(NamedTuple):
    """A request of a caller, in Unix seconds; the limits saw it between `sent` and `seen`."""

    sent: float
    seen: float
    """When the brokers had it, or its refusal came."""
    request_id: str
    accepted: bool


@pytest.mark.timeout(300)
async def test_each_sliding_minute_is_right_within_one_request_over_three_ingresses(trio: Stack) -> None:
    """Slowly at first, then more often than the limit lets through: what came slowly leaves its window one by one."""
    async with account(trio, rate_limit_rpm=RPM) as tenant:
        began = time.time()
        offsets = [at * GAP_SLOW_S for at in range(int(SLOW_S / GAP_SLOW_S))]
        offsets += [SLOW_S + at * GAP_S for at in range(int((SUSTAINED_S - SLOW_S) / GAP_S))]

        async def caller(number: int) -> Try:
            await asyncio.sleep(max(0.0, began + offsets[number] - time.time()))
            sent = time.time()
            answer = await tenant.ask(number, tokens=1)
            assert answer.status_code in (200, 429), answer.text
            return Try(sent, time.time(), answer.headers["x-request-id"], answer.status_code == 200)

        tries = await asyncio.gather(*(caller(number) for number in range(len(offsets))))
        found = await terminals(trio, {one.request_id for one in tries if one.accepted})
        took = [one._replace(seen=found[one.request_id].timings.accepted_ms / 1000) for one in tries if one.accepted]
        refused = [one for one in tries if not one.accepted]
        assert len(took) > RPM and len(refused) > RPM, "more than one window, and more than it lets through"
        # Counted is what is certain, wherever in its span each was admitted.
        most = max(sum(first.sent <= one.sent and one.seen - first.sent < WINDOW_S for one in took) for first in took)
        least = min(sum(one.seen > last.sent - WINDOW_S and one.sent < last.seen for one in took) for last in refused)
        print(f"{len(took)} accepted, {len(refused)} refused; most in a minute {most}, least at a refusal {least}")
        assert most <= RPM + 1, "more were let through in a minute"
        assert least >= RPM - 1, "one was refused with room for it"


async def test_a_publisher_that_reserved_nothing_is_admitted_by_the_router_once(trio: Stack) -> None:
    async with account(trio, concurrency_limit=1, monthly_budget=COST * 10) as tenant:
        conf = trio.settings
        raw = json.dumps(body(Spec(tokens=TOKENS, interval_ms=100), model="paid", max_tokens=TOKENS)).encode()

        def envelope(request_id: str) -> Envelope:
            return Envelope(
                request_id, "/test", time.time_ns() // 1_000_000, tenant.app.id, tenant.key.id, 0,
                hashlib.sha256(raw).hexdigest(), 60.0, 30,
            )  # fmt: skip

        async with Producer(conf.kafka, "test") as producer:
            first, second = new_request_id(), new_request_id()
            for request_id in (first, first, second):  # the first one comes twice
                sent = envelope(request_id)
                await producer.send(REQUESTS.name, raw, key="one partition", headers=sealed(sent, raw, conf.seals))
            found = await terminals(trio, {first, second})
            assert found[first].status is Status.COMPLETED
            assert found[second].status is Status.REJECTED
            error = found[second].error
            assert error is not None
            assert (error.status, error.type) == (429, "concurrency")
            standing = await tenant.free()
            assert standing.monthly_budget.used == COST
            again = msgspec.json.encode(found[first])
            head = [(request_log.KIND_HEADER, b"terminal")]
            await producer.send(LOG.name, again, key=first, headers=head)
        answer = await tenant.ask(0)
        assert answer.status_code == 200
        assert (await tenant.free()).monthly_budget.used == COST * 2, "a terminal that comes again settles nothing"


async def terminals(stack: Stack, ids: set[str]) -> dict[str, Terminal]:
    """The deciding terminals of requests, once all are there."""

    async def look() -> dict[str, Terminal] | None:
        found, view = {}, request_log.LogView()
        async with LogReader(stack.settings.kafka, "test") as reader:
            assignment = reader.assign([LOG])
            await reader.consumer.seek_to_beginning(*assignment)
            async for record in reader.read_to_end(assignment):
                terminal = view.apply(request_log.decode(record.value or b""))
                if terminal is not None and terminal.request_id in ids:
                    found[terminal.request_id] = terminal
        return found if found.keys() == ids else None

    return await until(look, "their terminals", 30)


async def test_what_a_killed_ingress_had_reserved_is_given_back(trio: Stack) -> None:
    """Its requests are on their way to a broker that stands still: taken afterwards or not, their places come back,

    and within the time that they may be pending and the reaper's period: nobody else asks meanwhile.
    """
    async with account(trio, concurrency_limit=8, monthly_budget=COST * 8) as tenant:
        kafka = trio.pid("kafka")
        victim = "ingress-1"
        asked = []
        try:
            await trio.pause("kafka")
            asked = [asyncio.create_task(tenant.ask(0)) for _ in range(8)]

            async def reserved() -> bool:
                return (await tenant.standing()).concurrency_limit.used == 8

            await until(reserved, "eight are reserved", 4)
            killed = time.monotonic()
            trio.signal(victim, signal.SIGKILL)
        finally:
            trio.signal("kafka", signal.SIGCONT)
            assert trio.pid("kafka") == kafka
        await asyncio.gather(*asked, return_exceptions=True)
        assert (await tenant.standing()).concurrency_limit.used <= 8
        await until(tenant.is_idle, "their places are free", killed + FREED_S - time.monotonic())
        await tenant.free(1)
        left = (await tenant.standing()).monthly_budget
        assert left.limit is not None
        for _ in range(int((left.limit - left.used) / COST)):
            assert (await tenant.ask(1)).status_code == 200
        refused = await tenant.ask(1)
        assert error_of(refused)["code"] == "insufficient_quota", "all of it could be used, and no more"
        await settled(trio)


async def test_redis_killed_under_running_requests(trio: Stack) -> None:
    """Nothing passes unseen meanwhile; then the month's spend and what runs is known again."""
    async with account(trio, concurrency_limit=3, monthly_budget=COST * 1000) as tenant:
        assert (await tenant.ask(0)).status_code == 200
        names = [fresh("long") for _ in range(3)]
        running = [
            asyncio.create_task(tenant.ask(at, tokens=400, interval_ms=50, name=name)) for at, name in enumerate(names)
        ]
        # One that is only reserved may be told 503.
        await until(lambda: trio.have_begun(names), "three run", 10)
        await trio.killed("valkey")

        async def refused() -> bool:
            answer = await tenant.ask(1)
            assert not any(one.done() for one in running), "they end before Redis is whole again"
            assert answer.status_code in (503, 429), answer.text
            assert int(answer.headers["retry-after"]) >= 1
            return answer.status_code == 429

        await until(refused, "Redis is whole again, and three still run", 20)
        standing = await tenant.standing()
        assert standing.concurrency_limit.used == 3
        assert standing.spent == COST
        assert [answer.status_code for answer in await asyncio.gather(*running)] == [200] * 3
        done = await tenant.free()
        assert done.spent == done.monthly_budget.used == COST + 3 * COST * 20
        ran = await asyncio.to_thread(trio.run, "rebuild", "redis")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert await tenant.standing() == done


CAPPED = """
[[models]]
id = "capped"
provider = "bench"
backend_tag = "bench"
context_length = 131072
max_concurrency = 2000
concurrency_limit = 2
"""
OWNER = {"email": "ann@example.org", "password": "Kx9!pL2-vQ7zRt"}


@pytest.fixture(scope="module")
def generous(make_stack: MakeStack) -> Stack:
    """Set up by its environment: what becomes of limits when Redis is away, and its first owner."""
    env = {
        "HEADRACE_LIMITS_ON_OUTAGE": "allow",
        "HEADRACE_ADMIN_EMAIL": OWNER["email"], "HEADRACE_ADMIN_PASSWORD": OWNER["password"],
        "HEADRACE_TRUSTED_PROXIES": "127.0.0.1",
    }  # fmt: skip
    return make_stack(models=paid_model(input="0", output="10.00") + CAPPED, env=env)


async def test_a_models_own_limit_is_that_of_all_who_ask_for_it(generous: Stack) -> None:
    async with account(generous) as one, account(generous) as other:
        asked = [
            tenant.apis[0].ask(body(Spec(tokens=20, interval_ms=50), model="capped", max_tokens=20))
            for tenant in (one, other, one, other)
        ]
        answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]


async def test_the_first_owner_of_the_environment_signs_in_and_rules(generous: Stack) -> None:
    api = Api(generous)
    async with api.client as anybody:
        token = (await anybody.post(api.url("/auth/token"), json=OWNER)).json()["access_token"]
        made = await anybody.post(
            api.url("/admin/apps"), json={"id": fresh("app"), "name": "A new one"},
            headers={"authorization": f"Bearer {token}"},
        )  # fmt: skip
        assert made.status_code == 201, made.text
        behind = {"x-forwarded-for": "203.0.113.7", "x-forwarded-proto": "https"}
        wrong = await anybody.post(api.url("/auth/token"), json=OWNER | {"password": "another one"}, headers=behind)
        assert wrong.status_code == 401

        async def told() -> str | None:
            found = await anybody.get(
                api.url("/admin/audit?kind=sessions&outcome=refused"), headers={"authorization": f"Bearer {token}"}
            )
            return next((event["detail"]["address"] for event in found.json()["data"]), None)

        assert await until(told, "it is in the trail", 20) == "203.0.113.7", "a trusted proxy says who called"


async def test_what_ran_while_limits_could_not_be_asked_is_charged_afterwards(generous: Stack) -> None:
    """Where that is allowed: Redis takes no writes for a while, and keys are still found in it."""
    async with account(generous, concurrency_limit=1, monthly_budget=COST * 5) as tenant:
        redis = connect(generous.settings.redis_url)
        try:
            await redis.config_set("min-replicas-to-write", 1)
            answers = await asyncio.gather(*[tenant.ask(0) for _ in range(4)])
            assert [answer.status_code for answer in answers] == [200] * 4, "more at once than it may"
            await redis.config_set("min-replicas-to-write", 0)
        finally:
            await redis.aclose()

        async def charged() -> bool:
            try:
                return (await tenant.standing()).spent == COST * 4
            except Unavailable:
                return False

        await until(charged, "the budget knows of all four", 30)
        assert (await tenant.ask(0)).status_code == 200
        refused = await tenant.ask(0)
        assert error_of(refused)["code"] == "insufficient_quota", "no more than the budget, once it is known"
        metrics = await tenant.apis[0].client.get(tenant.apis[0].url("/metrics"))
        bypassed = [line for line in metrics.text.splitlines() if line.startswith("headrace_limits_bypassed_total")]
        assert sum(float(line.rpartition(" ")[2]) for line in bypassed) == 4, "each is counted"
