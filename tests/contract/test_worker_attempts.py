"""A worker between attempts of one request: the newest runs, and only who is named is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from bench.gateway.spec import Spec
from headrace.settings import Settings
from processors.generation.bodies import Bodies
from processors.generation.frames_out import FrameWriter
from processors.generation.memory import Memory
from processors.generation.providers.factory import make_provider
from processors.generation.worker import Worker
from schemas.control import Model, Provider
from schemas.events import BodyRef, CancelCommand, GenerateCommand, LoadCommand, Routed, Status, TermCommand
from tests.support.chat import body, numbers
from tests.support.recorder import Recorder
from tests.support.waiting import until
from topics.cluster import Cluster
from topics.frames import Kind
from topics.outcomes import Outcomes

RID = "0" * 32
TOKENS = 40
TERM, EPOCH = 1, 3
BODY = msgspec.json.encode(body(Spec(tokens=TOKENS, interval_ms=20)))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


class SlowBodies(Bodies):
    """Bodies that lie in Kafka, and take until `come` to read."""

    def __init__(self) -> None:
        super().__init__(Cluster("nowhere"))
        self.come = asyncio.Event()

    async def fetch(self, ref: BodyRef, *, timeout_s: float = 20.0) -> bytes:
        await self.come.wait()
        return BODY


@pytest.fixture
def bodies() -> SlowBodies:
    return SlowBodies()


@pytest.fixture
async def worker(upstream_url: str, recorder: Recorder, bodies: SlowBodies) -> AsyncIterator[Worker]:
    """A worker that holds a model of the numbered upstream."""

    def fail(error: BaseException) -> None:
        raise error

    made = Worker(
        "w", "default", "boot", make_provider, Memory(Settings()), FrameWriter(recorder, fail),
        Outcomes(recorder, "worker", "w"), bodies, fail,
    )  # fmt: skip
    provider = Provider("p", "openai", upstream_url, options={"continues": "prefill"})
    await made.obey(LoadCommand(TERM, "boot", EPOCH, Model("m", "p", "bench"), provider))
    await until(lambda: [one.state for one in made.status().resident] == ["active"], "the model is there")
    yield made
    await made.drain(5)


def command(attempt: int, emitted: str = "", *, inline: bool = True) -> GenerateCommand:
    """To generate; the body lies in Kafka unless it is `inline`."""
    asked = msgspec.Raw(BODY if inline else b"")
    routed = Routed(RID, "t", "k", "m", "m", "default", 0, BodyRef(0, 0), asked, stream=True)
    said = len(numbers(emitted))
    return GenerateCommand(TERM, "boot", attempt, EPOCH, 0, routed, after_seq=said, emitted=emitted, tokens=said)


def running(worker: Worker) -> list[int]:
    return [one.attempt for one in worker.status().running]


async def test_a_later_attempt_ends_the_earlier_and_is_not_meant_by_its_cancel(
    worker: Worker, recorder: Recorder
) -> None:
    await worker.obey(command(1))
    await until(lambda: len(recorder.told()) > 4, "the first attempt has begun")
    await worker.obey(CancelCommand(TERM, RID, "superseded", attempt=2))
    emitted = "".join(one.data for one in recorder.told()[:3])
    await worker.obey(command(2, emitted))
    assert running(worker) == [2]
    await worker.obey(command(1))
    await worker.obey(CancelCommand(TERM, RID, "superseded", attempt=1))
    assert running(worker) == [2]
    await until(lambda: not running(worker), "the answer is complete")

    first, second = recorder.terminals()
    assert (first.attempt, first.status, second.attempt, second.status) == (1, Status.CANCELLED, 2, Status.COMPLETED)
    assert first.usage.completion_tokens < TOKENS
    assert second.usage.completion_tokens == TOKENS
    told = [one.data for one in recorder.told() if one.attempt == 2 and one.kind == Kind.TEXT]
    assert numbers(emitted + "".join(told)) == list(range(TOKENS))


async def test_a_cancel_that_names_no_attempt_ends_what_runs(worker: Worker, recorder: Recorder) -> None:
    await worker.obey(command(2, " t0@1 t1@2"))
    await until(lambda: len(recorder.told()) > 2, "it goes on")
    await worker.obey(CancelCommand(TERM, RID, "left"))
    await until(lambda: not running(worker), "it has ended")
    terminal = recorder.terminal()
    assert terminal.status is Status.CANCELLED
    assert 2 < terminal.usage.completion_tokens < TOKENS
    [choice] = msgspec.json.decode(terminal.choices)
    assert numbers(choice["message"]["content"]) == list(range(terminal.usage.completion_tokens))


async def test_a_cancel_while_the_body_is_read_is_not_missed(
    worker: Worker, recorder: Recorder, bodies: SlowBodies
) -> None:
    await worker.obey(command(1, inline=False))
    await until(lambda: running(worker), "it reads its body")
    await worker.obey(CancelCommand(TERM, RID, "left"))
    bodies.come.set()
    await until(lambda: not running(worker), "it has ended")
    terminal = recorder.terminal()
    assert (terminal.status, terminal.usage.completion_tokens) == (Status.CANCELLED, 0)
    assert not [one for one in recorder.told() if one.kind == Kind.TEXT]


async def test_a_worker_that_leaves_leaves_its_answers_to_others(worker: Worker, recorder: Recorder) -> None:
    await worker.obey(command(1))
    await until(lambda: len(recorder.told()) > 4, "the answer has begun")
    worker.begin_stop()
    assert (worker.status().stopping, worker.status().left) == (True, False)
    await worker.drain(0.1)
    assert not worker.status().running and not worker.status().left, "its role says so when it obeys nobody any more"
    await worker.obey(command(2, "".join(one.data for one in recorder.told())))
    assert not worker.status().running, "what comes now is for others too"
    assert not recorder.terminals(), "whoever goes on ends it"
    told = [one for one in recorder.told() if one.kind == Kind.TEXT]
    assert numbers("".join(one.data for one in told)) == list(range(len(told))), "all that was generated was written"
    assert len(told) < TOKENS


async def test_a_worker_lets_its_answers_end_before_it_leaves(worker: Worker, recorder: Recorder) -> None:
    await worker.obey(command(1))
    await until(lambda: len(recorder.told()) > 4, "the answer has begun")
    await worker.drain(10)
    assert recorder.terminal().status is Status.COMPLETED


async def test_a_worker_shows_the_newest_fence_of_its_term(worker: Worker) -> None:
    shown = []
    for term, fence in ((5, 0), (5, 2), (5, 1), (6, 0), (5, 9)):
        await worker.obey(TermCommand(term, "default", fence))
        shown.append((worker.status().term, worker.status().fence))
    assert shown == [(5, 0), (5, 2), (5, 2), (6, 0), (6, 0)], "a scheduler that lost its pool is not listened to"
