"""A stack that is told by its environment alone which models of an Ollama server to pull and to serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.gateway.stack import up_command
from tests.support.backends import ollama_server
from tests.support.stacks import NO_TLS, Process
from tests.support.waiting import until

KEY = "hr-admin-of-the-tests"
SERVED, MISSING = "smollm2:135m", "no-such-model:1b"


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = tmp_path_factory.mktemp("ollama")
    with ollama_server() as (url, genuine, _):
        if genuine:
            pytest.skip("what the genuine server pulls comes from a hub")
        env = {
            "HEADRACE_OLLAMA_MODELS": f"{SERVED}, {MISSING}",
            "OLLAMA_BASE_URL": url,
            "HEADRACE_ADMIN_KEY": KEY,
        }
        process = Process(up_command(None, directory / "data"), directory / "log", env)
        try:
            yield process.line.removeprefix("ready ")
        finally:
            assert process.stop() == 0


@pytest.mark.timeout(120)
async def test_models_are_pulled_and_served_and_one_that_cannot_be_says_why(base_url: str) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=60, verify=NO_TLS) as http:
        chat = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 5}
        answer = await http.post("/v1/chat/completions", json={"model": SERVED, **chat})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 5
        assert {one["id"] for one in (await http.get("/v1/models")).json()["data"]} >= {SERVED, MISSING}

        async def refused() -> httpx.Response | None:
            said = await http.post("/v1/chat/completions", json={"model": MISSING, **chat})
            return said if "could not be loaded" in said.text else None

        said = await until(refused, "the model that the server cannot pull is refused with the reason", 60)
        assert said.status_code in (502, 503) and "file does not exist" in said.json()["error"]["message"], said.text
        ready = (await http.get("/health/ready")).json()
        assert ready["status"] == "ready" and "file does not exist" in ready["failed"][MISSING]
        events = (await http.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
        assert events["model"] == SERVED
