"""Who serves a request, on the whole stack: fallbacks, circuit breakers, choices by task, what a key may reach."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.gateway.spec import Spec
from bench.gateway.stack import upstream
from tests.conftest import MakeStack
from tests.support.chat import Api, Seen, body, fresh
from tests.support.kafka import end_offsets
from tests.support.stacks import Stack, closed_port
from tests.support.waiting import until
from topics.catalogue import REQUESTS

MODELS = """
[[providers]]
name = "shaky"
kind = "openai"
base_url = "http://127.0.0.1:{port}/v1"
options = {{ connect_timeout_s = 1 }}

[[models]]
id = "shaky"
provider = "shaky"
backend_tag = "bench"
aliases = ["nickname"]
context_length = 4096
capabilities = ["code"]
fallbacks = ["gone-too", "spare"]
price = {{ input = "1", output = "1" }}
[[models]]
id = "gone-too"
provider = "shaky"
backend_tag = "bench"
context_length = 4096
capabilities = []
[[models]]
id = "alone"
provider = "shaky"
backend_tag = "bench"
context_length = 4096
capabilities = []
[[models]]
id = "spare"
provider = "bench"
backend_tag = "bench"
context_length = 4096
capabilities = ["code", "json"]
price = {{ input = "5", output = "5" }}
[[models]]
id = "untried"
provider = "bench"
backend_tag = "bench"
context_length = 4096
max_concurrency = 1
capabilities = []
[[models]]
id = "retired"
provider = "bench"
backend_tag = "bench"
enabled = false
fallbacks = ["spare"]
"""


class Engine:
    """The upstream behind the provider `shaky`, which goes away and comes back on its port."""

    def __init__(self, directory: Path, port: int) -> None:
        self._directory, self._port = directory, port
        self._running = ExitStack()

    def start(self) -> None:
        self._running.enter_context(upstream(self._directory, self._port))

    def stop(self) -> None:
        self._running.close()


@pytest.fixture(scope="module")
def routed(make_stack: MakeStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Engine]]:
    port = closed_port()
    engine = Engine(tmp_path_factory.mktemp("shaky"), port)
    engine.start()
    try:
        yield make_stack(models=MODELS.format(port=port)), engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def stack(routed: tuple[Stack, Engine]) -> Stack:
    return routed[0]


@pytest.fixture(scope="module")
def engine(routed: tuple[Stack, Engine]) -> Engine:
    return routed[1]


@pytest.fixture
async def api(stack: Stack) -> AsyncIterator[Api]:
    async with Api(stack) as made:
        yield made


def key_for(stack: Stack, *models: str) -> str:
    """A new key that may use these models only."""
    ran = stack.run("keys", "create", "--name", fresh("key"), *(f"--model={model}" for model in models))
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


async def step(api: Api, answer: httpx.Response | Seen, stage: str = "routed") -> dict[str, Any]:
    """The detail of one step of a request's life."""

    async def told() -> dict[str, Any] | None:
        life = (await api.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
        return next((one["detail"] for one in life.get("steps", ()) if one["stage"] == stage), None)

    return await until(told, f"the step {stage!r}", 10)


async def open_breakers(api: Api) -> set[str]:
    text = (await api.client.get(api.url("/metrics"))).text
    return {
        sample.labels["provider"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "headrace_provider_breaker_open" and sample.value
    }


HI = Spec(tokens=2, interval_ms=1)


async def test_a_provider_goes_its_fallback_serves_and_it_comes_back(api: Api, stack: Stack, engine: Engine) -> None:
    first = await api.ask(body(HI, model="shaky"))
    assert (first.status_code, first.json()["model"], first.headers["x-hr-model"]) == (200, "shaky", "shaky")
    assert "fallback" not in await step(api, first)

    engine.stop()
    errors = []

    async def served_by_another() -> httpx.Response | None:
        answer = await api.ask(body(HI, model="nickname"))
        if answer.status_code == 200:
            return answer
        errors.append((answer.status_code, answer.json()["error"]["code"]))
        return None

    answer = await until(served_by_another, "the fallback serves", 30)
    assert 5 <= len(errors) <= 20 and {code for _, code in errors} == {"provider_error"}, errors
    assert (answer.json()["model"], answer.headers["x-hr-model"]) == ("spare", "spare")
    detail = await step(api, answer)
    assert (detail["fallback"], detail["model"], detail["alias"]) == (True, "spare", "nickname")
    assert detail["not_chosen"].startswith("shaky: The provider of") and "gone-too: " in detail["not_chosen"]
    seen = await api.stream(body(HI, model="shaky"))
    assert seen.done and seen.headers["x-hr-model"] == "spare"
    assert {chunk["model"] for chunk in seen.chunks} == {"spare"}
    await until(lambda: open_breakers(api), "the breaker shows in the metrics", 10)
    assert await open_breakers(api) == {"shaky"}

    query = (  # the id is the ingress's own
        "SELECT model, alias, cost / (prompt_tokens + completion_tokens) AS each FROM usage WHERE request_id = "  # noqa: S608
        f"'{answer.headers['x-request-id']}'"
    )
    [row] = await until(lambda: asyncio.to_thread(stack.rows, query), "the usage row", 30)
    assert (row["model"], row["alias"], float(str(row["each"]))) == ("spare", "nickname", pytest.approx(5e-6))

    before = await end_offsets(stack.settings, REQUESTS)
    async with Api(stack, key=key_for(stack, "shaky")) as bound:
        for refused in (await api.ask(body(HI, model="alone")), await bound.ask(body(HI, model="shaky"))):
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "provider_error")
            assert int(refused.headers["retry-after"]) >= 1
    assert await end_offsets(stack.settings, REQUESTS) == before, "it is refused before anything is published"
    assert (await api.ask(body(HI, model="auto:code"))).json()["model"] == "spare"
    assert (await api.client.get(api.url("/health/ready"))).status_code == 200

    engine.start()

    async def served_again() -> bool:
        return (await api.ask(body(HI, model="shaky"))).headers.get("x-hr-model") == "shaky"

    await until(served_again, "the model itself serves again", 90)

    async def closed() -> bool:
        return await open_breakers(api) == set()

    await until(closed, "the breaker is closed", 15)
    assert (await api.ask(body(HI, model="alone"))).status_code == 200


async def test_a_choice_is_made_by_task_and_explained(api: Api, stack: Stack) -> None:
    answer = await api.ask(body(HI, model="auto:code"))
    assert (answer.status_code, answer.json()["model"], answer.headers["x-hr-model"]) == (200, "shaky", "shaky")
    detail = await step(api, answer)
    assert (detail["task"], detail["model"], detail["alias"]) == ("auto:code", "shaky", "auto:code")
    assert "spare: costs as much or more" in detail["not_chosen"] and "bench: no code" in detail["not_chosen"]
    life = (await api.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
    assert (life["model"], life["alias"], life["provider"]) == ("shaky", "auto:code", "shaky")

    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    seen = await api.stream(body(HI, model="auto:code", response_format=schema))
    assert seen.done and {chunk["model"] for chunk in seen.chunks} == {"spare"}
    assert "shaky: no json" in (await step(api, seen))["not_chosen"]
    assert (await api.ask(body(HI, model="auto:json"))).json()["model"] == "spare"
    assert (await api.ask(body(HI, model="auto"))).json()["model"] in {"narrow", "impatient"}, (
        "the cheapest chat models"
    )
    long = await api.ask(body("x" * 40_000, model="auto:code", max_tokens=3))
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    nobody = await api.ask(body(HI, model="auto:vision"))
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (404, "model_not_found")
    assert (await api.ask(body(HI, model="auto:poems"))).status_code == 404
    listed = {card["id"]: card for card in (await api.get("/v1/models")).json()["data"]}
    assert {name for name in listed if name.startswith("auto")} == {
        "auto", "auto:chat", "auto:code", "auto:json", "auto:long-context",
    }  # fmt: skip
    assert listed["auto"]["owned_by"] == "headrace"
    assert (await api.get("/v1/models/auto:code")).json() == listed["auto:code"]
    assert (await api.get("/v1/models/auto:vision")).status_code == 404


async def test_a_key_reaches_no_model_that_it_may_not_name(api: Api, stack: Stack) -> None:
    async with Api(stack, key=key_for(stack, "spare")) as bound:
        answer = await bound.ask(body(HI, model="auto:code"))
        assert (answer.status_code, answer.json()["model"]) == (200, "spare"), "though shaky is cheaper"
        assert "not_chosen" not in await step(api, answer), "it is told nothing of others"
        for name in ("auto", "auto:chat", "shaky", "nickname", "retired"):
            refused = await bound.ask(body(HI, model=name))
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        listed = [card["id"] for card in (await bound.get("/v1/models")).json()["data"]]
        assert listed == ["spare", "auto:code", "auto:json"]


async def test_a_disabled_model_is_served_by_its_fallback(api: Api) -> None:
    seen = await api.stream(body(HI, model="retired"))
    assert seen.done and seen.headers["x-hr-model"] == "spare"
    assert (await step(api, seen))["not_chosen"] == "retired: is disabled"


async def test_a_resumed_choice_bears_the_same_model(api: Api) -> None:
    async with api.open(body(Spec(tokens=20, interval_ms=20), model="auto:code"), {"x-hr-resume": "30"}) as reader:
        seen = await reader.until_tokens(3)
        await reader.close()
    rest = await api.resume(seen.completion_id, seen.last_id)
    assert rest.done and {chunk["model"] for chunk in [*seen.chunks, *rest.chunks]} == {"shaky"}
    headers = {"idempotency-key": fresh("again")}
    answers = [await api.ask(body(HI, model="auto:code"), headers) for _ in range(2)]
    assert [answer.json()["model"] for answer in answers] == ["shaky", "shaky"]


@pytest.mark.parametrize(
    ("headers", "fields", "priority"),
    [
        ({}, {}, "standard"),
        ({"x-hr-priority": "interactive"}, {}, "interactive"),
        ({}, {"service_tier": "flex"}, "batch"),
        ({}, {"service_tier": "priority"}, "interactive"),
        ({}, {"service_tier": "default"}, "standard"),
        ({"x-hr-priority": "batch"}, {"service_tier": "priority"}, "batch"),
    ],
)
async def test_a_priority_travels_with_the_request_and_not_to_the_provider(
    api: Api, stack: Stack, headers: dict[str, str], fields: dict[str, object], priority: str
) -> None:
    spec = Spec(tokens=1, id=fresh("priority"), keep_body=True)
    answer = await api.ask(body(spec, **fields), headers)
    assert answer.status_code == 200, answer.text
    assert (await step(api, answer))["priority"] == priority
    [sent] = (await stack.seen(spec.id)).tries
    assert "service_tier" not in msgspec.json.decode(sent.body or "")


async def test_a_priority_that_is_none_is_refused(api: Api) -> None:
    answer = await api.ask(body(HI), {"x-hr-priority": "urgent"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", "x-hr-priority")
    assert "interactive, standard, batch" in error["message"]


async def test_a_wait_beyond_the_deadline_is_refused_early_and_of_that_model_alone(api: Api, stack: Stack) -> None:
    slow = Spec(tokens=20, interval_ms=100)
    assert (await api.ask(body(slow, model="narrow"))).status_code == 200
    waiting = [asyncio.create_task(api.ask(body(slow, model="narrow"))) for _ in range(5)]

    async def refused_early() -> httpx.Response | None:
        """Until its next status the scheduler refuses by itself, once the request is published."""
        before = await end_offsets(stack.settings, REQUESTS)
        answer = await api.ask(body(HI, model="narrow"), {"x-request-timeout": "1.5"})
        early = await end_offsets(stack.settings, REQUESTS) == before
        return answer if answer.status_code == 503 and early else None

    answer = await until(refused_early, "it is refused before anything is published", 8)
    wait_s = int(answer.headers["retry-after"])
    assert 2 <= wait_s <= 12
    assert f"is about {wait_s} s" in answer.json()["error"]["message"]
    hurried = await api.ask(body(HI, model="narrow"), {"x-hr-start-within": "1.5"})
    assert hurried.status_code == 503 and int(hurried.headers["retry-after"]) >= 2, "so is what may wait no longer"
    other = await api.ask(body(HI, model="bench"), {"x-request-timeout": "1.5", "x-hr-start-within": "1.5"})
    assert other.status_code == 200, "the wait is that of one model"
    assert [(await one).status_code for one in waiting] == [200] * 5


async def test_what_did_not_begin_in_time_expires_and_what_did_runs_to_its_end(api: Api) -> None:
    """On a model of which nobody knows yet how long its answers take."""
    async with api.open(body(Spec(tokens=40, interval_ms=100), model="untried"), {"x-hr-start-within": "9"}) as running:
        await running.until_tokens(1)
        began = time.monotonic()
        late = await api.ask(body(HI, model="untried"), {"x-hr-start-within": "1"})
        waited_s = time.monotonic() - began
        whole = await running.rest()
    error = late.json()["error"]
    assert (late.status_code, error["code"]) == (504, "deadline_exceeded") and "was to begin by now" in error["message"]
    assert 1 <= waited_s < 3, "it ended while the other ran"
    assert whole.done and len(whole.tokens) == 40, "what began in time is not ended by that"
    life = (await api.get(f"/v1/requests/{late.headers['x-request-id']}")).json()
    assert life["status"] == "expired"
