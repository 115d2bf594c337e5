"""LoRA adapters over the whole stack: `model: "smollm2:tone"`."""

from __future__ import annotations

import openai
import pytest

from tests.support.chat import Api, body
from tests.support.stacks import Stack


async def test_adapters_are_listed_as_models(api: Api) -> None:
    listed = {card["id"] for card in (await api.get("/v1/models")).json()["data"]}
    assert listed >= {"smollm2", "gpt-4o-mini", "smollm2:tone", "smollm2:lost"}
    assert (await api.get("/v1/models/smollm2:tone")).json()["id"] == "smollm2:tone"
    assert (await api.get("/v1/models/smollm2:other")).status_code == 404


async def test_a_caller_names_an_adapter_behind_a_colon(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.key, max_retries=0) as client:

        async def says(model: str) -> str:
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Tell of the sea."}], max_tokens=16, temperature=0
            )
            assert answer.model == "smollm2", "the model that served, as for aliases"
            return answer.choices[0].message.content or ""

        tuned = await says("smollm2:tone")
        assert await says("smollm2") != tuned
        assert await says("gpt-4o-mini:tone") == tuned


@pytest.mark.parametrize("model", ["smollm2:other", "smollm2:", "bench:tone"])
async def test_an_adapter_that_is_not_there_is_a_model_that_is_not_there(api: Api, model: str) -> None:
    answer = await api.ask(body("Hello", model=model))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_adapter_that_cannot_be_read_fails_its_requests_with_the_reason(api: Api) -> None:
    answer = await api.ask(body("Hello", model="smollm2:lost"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "provider_error")
    assert "adapter 'lost'" in answer.json()["error"]["message"]
    assert "/no/such.gguf" in answer.json()["error"]["message"]
