"""The engine of a real model dies, or hangs without dying, under load: each answer goes on with its successor.

The model comes back in the same worker, under the same lease, while the other models there go on.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import psutil
import pytest

from schemas.events import Terminal, WorkerStatus
from tests.conftest import MakeStack
from tests.faults.conftest import Note
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, Seen, body
from tests.support.engines import engines, freeze
from tests.support.kafka import end_offsets, records
from tests.support.stacks import Stack
from tests.support.waiting import until
from topics import request_log
from topics.catalogue import LOG, WORKER_STATUS

IDLE_S = 3.0
CROWD = 8
"""Twice as many as the engine has slots."""
BUSY_S = 2.0
"""The crowd is answered for longer than this."""
MODELS = "".join(
    f"""
[[providers]]
name = "{name}"
kind = "llama_cpp"
options = {{ idle_timeout_s = {idle_s} }}
[[models]]
id = "{name}"
provider = "{name}"
backend_tag = "SmolLM2-135M-Instruct"
context_length = 512
max_concurrency = {slots}
"""
    for name, idle_s, slots in (("victim", IDLE_S, CROWD // 2), ("neighbour", 60.0, 1))
)


@pytest.fixture(scope="module")
def real(make_stack: MakeStack) -> Stack:
    """A stack whose worker holds two real models, each with an engine of its own."""
    return make_stack(models=MODELS)


async def lease(stack: Stack, model: str) -> tuple[int, str, str]:
    """Epoch, state and device of a model in the worker's last heartbeat."""
    last = None
    for record in await records(stack.settings, WORKER_STATUS):
        if record.value:
            last = msgspec.json.decode(record.value, type=WorkerStatus)
    assert last is not None
    [found] = [one for one in last.resident if one.model == model]
    return found.epoch, found.state, found.device


async def engine_of(stack: Stack, model: str) -> psutil.Process:
    """The process of a model's engine, found by what it does: of two equal ones the slots tell them apart."""
    found: list[psutil.Process] = []

    async def two() -> bool:
        found[:] = sorted(engines(stack.process.tree()), key=lambda one: one.num_threads())
        return len(found) == 2

    await until(two, "each model has one engine", 20)
    return found[-1] if model == "victim" else found[0]


async def ready(stack: Stack, api: Api) -> None:
    """Both models answer."""
    await stack.ready()
    for model in ("victim", "neighbour"):
        await until(partial(api.answers, model), f"{model} answers", 60)


def crowd(api: Api, chance: random.Random, begun: asyncio.Event) -> list[asyncio.Task[Told]]:
    """Long answers, two for each slot; `begun` is set when one of them has some text."""
    return [
        asyncio.create_task(
            told(
                api,
                body(
                    f"Write a long story about {chance.randrange(1_000)} ships.",
                    model="victim", max_tokens=80, temperature=0.8, seed=chance.randrange(1_000),
                ),
                begun,
            )
        )
        for _ in range(CROWD)
    ]  # fmt: skip


@dataclass
class Told(Seen):
    """What a caller saw, and when it ended."""

    ended_s: float = 0.0


async def told(api: Api, question: dict[str, object], begun: asyncio.Event) -> Told:
    """A stream read to its end."""
    async with api.open(question) as reader:
        await reader.until_text()
        begun.set()
        seen = await reader.rest()
    return Told(**vars(seen), ended_s=time.monotonic())


async def accounted(stack: Stack, seen: Sequence[Seen], since: dict[int, int]) -> Counter[str]:
    """Each ended once, in the log as at its caller, with one usage of what was told; returns how."""
    ended: dict[str, list[Terminal]] = {}
    for record in await records(stack.settings, LOG, since):
        decoded = request_log.decode(record.value or b"")
        if isinstance(decoded, Terminal):
            ended.setdefault(decoded.request_id, []).append(decoded)
    rows = await usage_rows(stack, [one.request_id for one in seen])
    for one in seen:
        [terminal] = ended[one.request_id]
        assert not one.broken, one.request_id
        assert one.done == (one.error is None) == (terminal.status == "completed"), (one.error, terminal.status)
        if one.error is not None:
            assert one.error["code"] == "provider_error" and "'victim'" in one.error["message"], one.error
            assert one.status in (200, 502)
        said = [choice["message"]["content"] or "" for choice in msgspec.json.decode(terminal.choices or b"[]")]
        assert "".join(said) == one.text
        row = rows[one.request_id]
        assert row["status"] == terminal.status
        assert int(str(row["completion_tokens"])) == terminal.usage.completion_tokens
        assert (terminal.usage.completion_tokens > 0) == bool(one.text)
    assert (await settled(stack))["in_flight"] == 0
    how = Counter("answered" if one.done else "cut" if one.text else "failed" for one in seen)
    # Only what two engines generated is counted here, and not reported by one of them.
    how["went_on"] = sum(terminals[0].usage.estimated for terminals in ended.values())
    return how


@pytest.mark.timeout(900)
async def test_a_killed_engine(real: Stack, moments: int, seed: int, note: Note) -> None:
    chance = random.Random(f"{seed}-engine")
    total: Counter[str] = Counter()
    async with Api(real) as api:
        await ready(real, api)
        for _ in range(moments):
            before, since = await lease(real, "victim"), await end_offsets(real.settings, LOG)
            engine = await engine_of(real, "victim")
            asked = crowd(api, chance, asyncio.Event())
            at_s = chance.uniform(0.05, BUSY_S)
            await asyncio.sleep(at_s)
            began = time.monotonic()
            engine.kill()
            # Whoever comes now is answered: it waits for the model.
            after = await api.ask(body("Hi.", model="victim", max_tokens=3))
            answered_s = time.monotonic() - began
            assert after.status_code == 200, after.text
            seen = await asyncio.gather(*asked)
            how = await accounted(real, seen, since)
            assert how["answered"] == CROWD, "what had begun goes on, what had not begins anew"
            assert await lease(real, "victim") == before, "the lease is the same"
            await engine_of(real, "victim")
            total += how
            note(part="engine killed", at_s=round(at_s, 3), again_s=round(answered_s, 2), **how)
    assert total["went_on"], "the kills were in the middle of answers"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("wakes", [False, True], ids=["for_ever", "for_a_while"])
async def test_a_hanging_engine(real: Stack, wakes: bool, moments: int, seed: int, note: Note) -> None:
    """Once where the others are killed thrice: it takes long, and CI has both kinds."""
    chance = random.Random(f"{seed}-hang-{wakes}")
    async with Api(real) as api:
        await ready(real, api)
        for _ in range(-(-moments // 3)):
            await _hangs(real, api, chance, note, wakes=wakes)


async def _hangs(real: Stack, api: Api, chance: random.Random, note: Note, *, wakes: bool) -> None:
    before, since = await lease(real, "victim"), await end_offsets(real.settings, LOG)
    engine = await engine_of(real, "victim")
    asked = crowd(api, chance, begun := asyncio.Event())
    await begun.wait()
    await asyncio.sleep(at_s := chance.uniform(0.0, BUSY_S / 2))
    began = time.monotonic()
    await freeze(engine)
    other = await api.ask(body("Hi.", model="neighbour", max_tokens=3))
    assert other.status_code == 200 and time.monotonic() - began < IDLE_S, "other models do not wait"
    if wakes:
        await asyncio.sleep(IDLE_S * 0.5)
        engine.resume()
    seen = await asyncio.gather(*asked)
    how = await accounted(real, seen, since)
    after = await api.ask(body("Hi.", model="victim", max_tokens=3))
    assert after.status_code == 200, after.text
    assert await lease(real, "victim") == before, "the lease is the same"
    successor = await engine_of(real, "victim")
    name = f"engine hangs {'for a while' if wakes else 'for ever'}"
    note(part=name, at_s=round(at_s, 3), all_answered_s=round(max(one.ended_s for one in seen) - began, 1), **how)
    assert how["answered"] == CROWD
    assert (successor.pid == engine.pid) is wakes, "one that is only slow is not killed"
    assert bool(how["went_on"]) is not wakes and engine.is_running() is wakes
