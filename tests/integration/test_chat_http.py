"""OpenAI's chat API over the whole stack, with OpenAI's own client unchanged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from bench.gateway.spec import Spec
from tests.support.chat import Api, body, fresh, numbers
from tests.support.stacks import Stack
from tests.support.waiting import until

ROLES = {"ingress", "router", "scheduler", "worker", "metering", "answers", "sink", "control"}
SMALL = "smollm2"


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.key, max_retries=0) as made:
        yield made


def asked(spec: Spec) -> list[dict[str, str]]:
    return body(spec)["messages"]  # type: ignore[no-any-return]


async def test_a_whole_answer_has_openais_shape(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model=SMALL, messages=[{"role": "user", "content": "Say hello."}], max_tokens=8, temperature=0
    )
    answer = raw.parse()
    assert answer.id.startswith("chatcmpl-")
    assert raw.headers["x-request-id"] in answer.id
    assert (answer.object, answer.model) == ("chat.completion", SMALL)
    [choice] = answer.choices
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_stream_has_role_deltas_finish_and_usage_in_order(client: openai.AsyncOpenAI, stack: Stack) -> None:
    chunks: list[ChatCompletionChunk] = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="bench", messages=asked(Spec(tokens=5, interval_ms=5)), stream=True,  # type: ignore[arg-type]
            stream_options={"include_usage": True},
        )
    ]  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert numbers("".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])) == [0, 1, 2, 3, 4]
    last = chunks[-1]
    assert (last.choices, last.usage is not None and last.usage.completion_tokens) == ([], 5)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


async def test_the_bytes_of_a_stream(api: Api) -> None:
    async with api.open(body(Spec(tokens=3, interval_ms=1))) as reader:
        assert reader.seen.headers["content-type"].startswith("text/event-stream")
        seen = await reader.rest()
    assert seen.done and not seen.broken
    assert seen.tokens == [0, 1, 2]
    assert seen.finish == "stop"
    assert seen.request_id in seen.completion_id
    assert "usage" not in seen.chunks[-1]
    assert seen.last_id is not None and seen.last_id.startswith("1:")


def test_the_synchronous_client(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.key, max_retries=0) as client:
        answer = client.chat.completions.create(model="bench", messages=asked(Spec(tokens=4)))  # type: ignore[arg-type]
        assert numbers(answer.choices[0].message.content or "") == [0, 1, 2, 3]
        with client.chat.completions.create(
            model="bench",
            messages=asked(Spec(tokens=4)),
            stream=True,  # type: ignore[arg-type]
        ) as stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert numbers(text) == [0, 1, 2, 3]


async def test_n_choices_streamed_and_not(client: openai.AsyncOpenAI) -> None:
    ask = {"model": SMALL, "messages": [{"role": "user", "content": "Name a colour."}], "n": 2, "max_tokens": 6}
    answer = await client.chat.completions.create(**ask)  # type: ignore[call-overload]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.finish_reason for choice in answer.choices)
    texts, roles, finished = {0: "", 1: ""}, set(), set()
    async for chunk in await client.chat.completions.create(**ask, stream=True):  # type: ignore[call-overload]
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.delta.role:
                roles.add(choice.index)
            if choice.finish_reason:
                finished.add(choice.index)
    assert all(texts.values()) and roles == finished == {0, 1}


async def test_seed_stop_and_max_tokens(client: openai.AsyncOpenAI) -> None:
    ask = {"model": SMALL, "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 1.0}
    first = await client.chat.completions.create(**ask, max_tokens=12, seed=7)  # type: ignore[call-overload]
    again = await client.chat.completions.create(**ask, max_tokens=12, seed=7)  # type: ignore[call-overload]
    text = first.choices[0].message.content
    assert text == again.choices[0].message.content
    assert first.choices[0].finish_reason == "length"
    stop = text.split()[2]
    cut = await client.chat.completions.create(**ask, max_tokens=12, seed=7, stop=[stop])  # type: ignore[call-overload]
    assert cut.choices[0].finish_reason == "stop"
    assert stop not in cut.choices[0].message.content


async def test_logprobs_streamed_and_not_are_the_same(client: openai.AsyncOpenAI) -> None:
    ask = {
        "model": SMALL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0, "seed": 1,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    answer = await client.chat.completions.create(**ask)  # type: ignore[call-overload]
    whole = [entry.token for entry in answer.choices[0].logprobs.content]
    assert all(len(entry.top_logprobs) == 2 for entry in answer.choices[0].logprobs.content)
    streamed = [
        entry.token
        async for chunk in await client.chat.completions.create(**ask, stream=True)  # type: ignore[call-overload]
        for choice in chunk.choices
        if choice.logprobs and choice.logprobs.content
        for entry in choice.logprobs.content
    ]
    assert streamed == whole and whole


async def test_json_schema_binds_the_answer(client: openai.AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model=SMALL,
        messages=[{"role": "user", "content": "Pick a colour."}],
        response_format={"type": "json_schema", "json_schema": {"name": "pick", "schema": schema, "strict": True}},
        max_tokens=64,
    )
    assert json.loads(answer.choices[0].message.content or "")["colour"] in ("red", "blue")


async def test_every_parameter_reaches_the_provider_unchanged(client: openai.AsyncOpenAI, stack: Stack) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    sent = {
        "stop": ["zz"], "seed": 9, "temperature": 0.5, "top_p": 0.25, "presence_penalty": 0.5, "logprobs": True,
        "frequency_penalty": -0.5, "logit_bias": {"5": 1}, "tools": [tool], "tool_choice": "auto", "user": "u-1",
        "metadata": {"a": "b"}, "response_format": {"type": "json_object"}, "top_logprobs": 3,
        "parallel_tool_calls": False, "max_completion_tokens": 3,
    }  # fmt: skip
    spec = Spec(tokens=9, interval_ms=1, id=fresh("passes-on"), keep_body=True)
    answer = await client.chat.completions.create(model="bench", messages=asked(spec), **sent)  # type: ignore[call-overload]
    assert answer.choices[0].finish_reason == "length"
    arrived = json.loads((await stack.seen(spec.id)).tries[0].body or "")
    assert {name: arrived.get(name) for name in sent} == sent
    assert arrived["messages"] == asked(spec)


async def test_errors_become_openais_exceptions(client: openai.AsyncOpenAI, stack: Stack) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="no-such", messages=asked(Spec()))  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="bench", messages=[], temperature=0)
    assert wrong.value.param == "messages"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="hr-wrong").chat.completions.create(
            model="bench",
            messages=asked(Spec()),  # type: ignore[arg-type]
        )
    with pytest.raises(openai.InternalServerError) as failed:
        await client.chat.completions.create(model="bench", messages=asked(Spec(status=500)))  # type: ignore[arg-type]
    assert failed.value.code == "provider_error"
    stream = await client.chat.completions.create(
        model="bench",
        messages=asked(Spec(tokens=9, interval_ms=1, die_after=3)),
        stream=True,  # type: ignore[arg-type]
    )
    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass


async def test_models_are_listed_under_ids_and_aliases(client: openai.AsyncOpenAI) -> None:
    listed = {model.id: model async for model in client.models.list()}
    assert {"bench", "narrow", SMALL, "gpt-4o-mini"} <= set(listed)
    one = await client.models.retrieve("gpt-4o-mini")
    assert (one.id, one.object, one.owned_by) == ("gpt-4o-mini", "model", "local")
    assert one.created == listed["gpt-4o-mini"].created
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("no-such")


async def test_an_alias_answers_under_its_own_name(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
    )
    assert answer.model == "gpt-4o-mini"


async def test_a_requests_life_is_shown_hop_by_hop(api: Api) -> None:
    seen = await api.stream(body(Spec(tokens=4, interval_ms=5)))
    stages = ["accepted", "routed", "assigned", "started", "first_token", "terminal"]

    async def told() -> dict[str, object] | None:
        life = (await api.get(f"/v1/requests/{seen.completion_id}")).json()
        return life if [step["stage"] for step in life["steps"] if step["stage"] != "queued"] == stages else None

    life = await until(told, "all steps", 10)
    assert life["request_id"] == seen.request_id
    assert (life["status"], life["model"], life["provider"], life["attempts"]) == ("completed", "bench", "bench", 1)
    assert life["usage"]["completion_tokens"] == 4  # type: ignore[index]
    assert {step["role"] for step in life["steps"]} == {"ingress", "router", "scheduler", "worker"}  # type: ignore[attr-defined]
    by_uuid = await api.get(f"/v1/requests/{seen.request_id}")
    assert by_uuid.json()["status"] == "completed"
    unknown = await api.get("/v1/requests/" + "0" * 32)
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "not_found"


async def test_health_and_metrics_of_every_role(api: Api) -> None:
    assert (await api.client.get(api.url("/health/live"))).json() == {"status": "live"}
    ready = await api.client.get(api.url("/health/ready"))
    assert (ready.status_code, ready.json()) == (
        200,
        {"status": "ready", "waiting_for": {}, "failed": {}, "warnings": {}},
    )
    await api.stream(body(Spec(tokens=4, interval_ms=1)))

    async def complete() -> bool:
        text = (await api.client.get(api.url("/metrics"))).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        roles = {sample.labels.get("role") for sample in samples}
        terminals = sum(sample.value for sample in samples if sample.name == "headrace_terminals_total")
        lag = [sample for sample in samples if sample.name == "headrace_sink_lag_records"]
        return roles >= ROLES and terminals > 0 and bool(lag)

    await until(complete, "metrics of all roles", 15)


async def test_many_callers_at_once_each_get_their_own_tokens(api: Api) -> None:
    seen = await asyncio.gather(
        *(api.stream(body(Spec(tokens=20, interval_ms=10, seq=1000 * number))) for number in range(40))
    )
    for number, one in enumerate(seen):
        assert one.done and one.tokens == list(range(1000 * number, 1000 * number + 20))


async def test_readiness_says_why_a_model_could_not_be_loaded_and_the_others_are_served(
    api: Api, stack: Stack, tmp_path: Path
) -> None:
    config = stack.data_dir.with_suffix(".toml")
    broken = tmp_path / "broken.toml"
    broken.write_text(
        config.read_text() + '[[models]]\nid = "gone"\nprovider = "local"\nbackend_tag = "no-such.gguf"\n'
    )
    try:
        applied = await asyncio.to_thread(stack.run, "apply", "--config", str(broken))
        assert applied.returncode == 0, applied.stderr

        async def told() -> str | None:
            ready = await api.client.get(api.url("/health/ready"))
            reason = ready.json()["failed"].get("gone", "")
            return reason if ready.status_code == 200 and reason.startswith("could not be loaded: ") else None

        reason = await until(told, "the reason stands in /health/ready", 20)
        assert "no-such.gguf" in reason
        doctor = await asyncio.to_thread(stack.run, "doctor")
        assert doctor.returncode == 1 and f"model gone: {reason}" in doctor.stdout
    finally:
        restored = await asyncio.to_thread(stack.run, "apply", "--config", str(config))
    assert restored.returncode == 0, restored.stderr
    await stack.ready()
