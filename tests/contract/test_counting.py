"""Tokens of an OpenAI-compatible server that does not report them: it is asked to count, if it has a call that does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from processors.generation.attempt import Attempt
from processors.generation.bodies import Bodies
from processors.generation.frames_out import FrameWriter
from processors.generation.providers.base import Provider
from processors.generation.providers.factory import make_provider
from schemas import control
from schemas.control import Model
from schemas.events import BodyRef, GenerateCommand, Routed, Status, Usage
from tests.support.recorder import Recorder
from topics.cluster import Cluster
from topics.outcomes import Outcomes

MODEL = Model(id="m", provider="p", backend_tag="tag")
ASK = [{"role": "user", "content": "one two three"}]
SAID = ["four five six ", "seven eight"]
"""What the server says, in pieces of several words; a word is a token here."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def silent(request: web.Request) -> web.StreamResponse:
    """An answer without usage, which was asked for."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for text in SAID:
        chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        await answer.write(f"data: {json.dumps(chunk)}\n\n".encode())
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    await answer.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())
    return answer


class Words:
    """Counts as vLLM's `/tokenize` does: the messages, and two tokens where it is the assistant's turn."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

    async def tokenize(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.asked.append(asked)
        if asked["add_generation_prompt"] == asked["continue_final_message"]:
            return web.json_response({"error": {"message": "cannot do both"}}, status=400)
        words = sum(len(one["content"].split()) for one in asked["messages"])
        return web.json_response({"count": words + 2, "max_model_len": 4096, "tokens": []})


@asynccontextmanager
async def served(**calls: Handler) -> AsyncIterator[tuple[Provider, list[str]]]:
    """A provider on a server with these calls, and the paths that were asked of it."""
    paths: list[str] = []

    @web.middleware
    async def noted(request: web.Request, handler: Handler) -> web.StreamResponse:
        paths.append(request.path)
        return await handler(request)

    app = web.Application(middlewares=[noted])
    app.router.add_post("/v1/chat/completions", silent)
    for name, handler in calls.items():
        app.router.add_post(f"/{name}", handler)
    async with TestServer(app) as server:
        provider = make_provider(control.Provider(name="p", kind="openai", base_url=str(server.make_url("/v1"))))
        try:
            yield provider, paths
        finally:
            await provider.close()


async def metered(provider: Provider) -> Usage:
    """What an attempt on that provider is metered with."""
    body = msgspec.Raw(msgspec.json.encode({"messages": ASK}))
    routed = Routed(
        "0" * 32, "t", "k", "m", "m", "default", 0, BodyRef(0, 0), body, stream=True, prompt_tokens_estimate=99
    )
    recorder = Recorder()

    def fail(error: BaseException) -> None:
        raise error

    async def no_engine() -> bool:
        return False

    attempt = Attempt(
        GenerateCommand(1, "b", 1, 3, 0, routed), MODEL, provider, worker="w", writer=FrameWriter(recorder, fail),
        outcomes=Outcomes(recorder, "worker", "w"), bodies=Bodies(Cluster("nowhere")), engine_again=no_engine,
    )  # fmt: skip
    await attempt.run()
    terminal = recorder.terminal()
    assert terminal.status is Status.COMPLETED
    return terminal.usage


async def test_a_silent_server_counts_prompt_and_answer_itself() -> None:
    words = Words()
    async with served(tokenize=words.tokenize) as (provider, paths):
        usage = await metered(provider)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.estimated) == (5, 5, True)
    assert paths.count("/tokenize") == 2
    assert {one["model"] for one in words.asked} == {"tag"}


async def test_without_such_a_call_pieces_are_counted_and_it_is_not_looked_for_again() -> None:
    async with served() as (provider, paths):
        usage = await metered(provider)
        assert (usage.prompt_tokens, usage.completion_tokens, usage.estimated) == (99, len(SAID), True)
        looked = len(paths)
        assert await provider.count_prompt(MODEL, {"messages": ASK}) is None
        assert len(paths) == looked == 3


@pytest.mark.parametrize("answer", [{"no": "count"}, "text"])
async def test_an_answer_that_is_no_count_is_none(answer: object) -> None:
    async def odd(_: web.Request) -> web.Response:
        return web.json_response(answer)

    async with served(tokenize=odd) as (provider, _):
        usage = await metered(provider)
    assert (usage.prompt_tokens, usage.completion_tokens) == (99, len(SAID))


async def test_two_that_find_at_once_that_there_is_no_such_call_do_not_fail() -> None:
    async with served() as (provider, paths):
        counted = await asyncio.gather(*(provider.count_prompt(MODEL, {"messages": ASK}) for _ in range(5)))
        assert (counted, len(paths)) == ([None] * 5, 10)
        assert await provider.count_prompt(MODEL, {"messages": ASK}) is None
        assert len(paths) == 10
