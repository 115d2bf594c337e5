"""What a worker tells of memory while it loads, and when a load has failed, with a server that keeps what it has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec
import pytest

from headrace.settings import Settings
from processors.generation.bodies import Bodies
from processors.generation.frames_out import FrameWriter
from processors.generation.memory import Memory
from processors.generation.providers.factory import make_provider
from processors.generation.providers.llama_models import resolve
from processors.generation.providers.ollama import Ollama
from processors.generation.worker import Worker
from schemas import control
from schemas.control import Model
from schemas.events import LoadCommand
from tests.support.backends import SMALL_CONTEXT, WEIGHTS, ollama_server
from tests.support.recorder import Recorder
from tests.support.waiting import until
from topics.cluster import Cluster
from topics.outcomes import Outcomes

TAG = "headrace-contract"
GOOD = Model("good", "box", TAG, context_length=SMALL_CONTEXT, bytes=5)
LONG = Model("long", "box", TAG, context_length=10**6, bytes=5)
"""Longer than it was trained for: its load fails."""


class Beside(NamedTuple):
    """A worker, and somebody else who uses the same server."""

    worker: Worker
    record: control.Provider
    other: Ollama

    async def load(self, model: Model) -> None:
        await self.worker.obey(LoadCommand(1, "boot", 3, model, self.record, device="box"))


@pytest.fixture
async def beside() -> AsyncIterator[Beside]:
    recorder = Recorder()

    def fail(error: BaseException) -> None:
        raise error

    with ollama_server() as (url, _, _):
        record = control.Provider("box", "ollama", url, options={"idle_timeout_s": 60, "memory_bytes": 2**30})
        other = make_provider(record)
        assert isinstance(other, Ollama)
        await other.create(TAG, resolve(WEIGHTS, None), lambda *_: None)
        worker = Worker(
            "w", "default", "boot", make_provider, Memory(Settings()), FrameWriter(recorder, fail),
            Outcomes(recorder, "worker", "w"), Bodies(Cluster("nowhere")), fail,
        )  # fmt: skip
        await worker.follow([record], [GOOD, LONG])
        try:
            yield Beside(worker, record, other)
        finally:
            await worker.drain(5)
            await other.unload(GOOD)
            await other.close()


async def test_what_is_being_loaded_takes_what_it_is_expected_to(beside: Beside) -> None:
    """A scheduler that knows nothing of the load counts it, also when the model's record is gone."""
    await beside.load(GOOD)
    [shown] = beside.worker.status().resident
    assert (shown.state, shown.bytes) == ("loading", 5)
    await until(lambda: [one.state for one in beside.worker.status().resident] == ["active"], "it is loaded")
    [shown] = beside.worker.status().resident
    assert shown.bytes > 2**20, "as it is seen to take"


async def test_who_tells_that_a_load_failed_has_looked_at_what_the_server_holds(beside: Beside) -> None:
    assert [device.held for device in beside.worker.status().devices if device.shared] == [[]]
    await beside.other.load(msgspec.structs.replace(GOOD, id="theirs"))
    await beside.load(LONG)
    await until(lambda: [one.state for one in beside.worker.status().resident] == ["failed"], "its load has failed")
    [held] = [device.held for device in beside.worker.status().devices if device.shared]
    assert [one.models for one in held] == [["good", "long"]]
