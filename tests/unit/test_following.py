"""Following a request: every step once and in order, whatever the readers of frames and log do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from aiokafka.errors import KafkaConnectionError

from ingress.openai import following
from ingress.openai.following import Following
from ingress.replies import Replayed
from ingress.services import Services
from ingress.streams import DROP_BYTES
from schemas.events import NOTHING, Status, Terminal
from schemas.ids import PublicId, new_request_id
from topics.frames import Delta, Kind

RID = new_request_id()
PUBLIC = PublicId(RID, 3, 1_000_000)
Replay = Callable[[str, int, int, bytes], AsyncGenerator[Replayed, None]]


def text(seq: int) -> Delta:
    return Delta(bytes.fromhex(RID), 1, seq, Kind.TEXT, 0, f"{seq} ", 1)


def terminal(last_seq: int, choices: msgspec.Raw = NOTHING) -> Terminal:
    return Terminal(RID, "t", 1, 0, Status.COMPLETED, choices=choices, last_seq=last_seq, reply_partition=3)


def terminal_frame(last_seq: int) -> Delta:
    return Delta(
        bytes.fromhex(RID), 1, last_seq + 1, Kind.TERMINAL, 0, msgspec.json.encode(terminal(last_seq)).decode()
    )


class Log:
    """What `inference.log` says."""

    def __init__(self) -> None:
        self.found: Terminal | None = None
        self.asked = 0
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens while it is asked."""

    async def terminal(self, request_id: str, since_ms: int) -> Terminal | None:
        self.asked += 1
        self.meanwhile()
        return self.found


class Replies:
    def attach(self, stream: object) -> None:
        pass

    def detach(self, stream: object) -> None:
        pass


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def services(log: Log) -> Services:
    made = SimpleNamespace(
        lookup=log, replies=Replies(), draining=asyncio.Event(), settings=SimpleNamespace(kafka="unused")
    )
    return cast(Services, made)


async def to_the_end(follower: Following) -> list[int]:
    seen: list[int] = []
    async with asyncio.timeout(5):
        while follower.terminal is None:
            seen += [step.seq for step in await follower.next()]
    follower.detach()
    return seen


def replaying(monkeypatch: pytest.MonkeyPatch, replay: Any) -> None:
    monkeypatch.setattr(following, "replay", replay)
    monkeypatch.setattr(following, "REPLAY_AGAIN_S", 0.0)


async def test_a_replay_that_breaks_off_is_begun_again(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    async def replay(cluster: str, partition: int, since_ms: int, rid: bytes) -> AsyncGenerator[Replayed, None]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise KafkaConnectionError
        yield Replayed([text(1), text(2)], caught_up=False)
        if tries == 2:
            raise KafkaConnectionError
        yield Replayed([text(3), terminal_frame(3)], caught_up=True)
        await asyncio.Event().wait()

    replaying(monkeypatch, replay)
    follower = Following(services, PUBLIC)
    follower.replay()
    assert await to_the_end(follower) == [1, 2, 3]
    assert tries == 3


async def test_a_past_that_is_longer_than_the_buffer_waits_for_its_caller(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, count = 50_000, 2 * DROP_BYTES // 50_000
    long = [Delta(bytes.fromhex(RID), 1, seq, Kind.TEXT, 0, "x" * size, 1) for seq in range(1, count + 1)]

    async def replay(cluster: str, partition: int, since_ms: int, rid: bytes) -> AsyncGenerator[Replayed, None]:
        yield Replayed([*long, terminal_frame(count)], caught_up=True)
        await asyncio.Event().wait()

    replaying(monkeypatch, replay)
    follower = Following(services, PUBLIC)
    follower.replay()
    told = 0
    async with asyncio.timeout(5):
        while follower.terminal is None:
            await asyncio.sleep(0)  # As long as a write takes, in which the reader goes on.
            await asyncio.sleep(0)
            told += sum(len(step.data) for step in await follower.next())
    follower.detach()
    assert told == count * size and not follower.stream.dropped


async def test_frames_that_the_end_overtook_are_read_first(
    services: Services, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    async def replay(cluster: str, partition: int, since_ms: int, rid: bytes) -> AsyncGenerator[Replayed, None]:
        asked.append((partition, since_ms))
        yield Replayed([text(seq) for seq in range(1, 5)], caught_up=False)
        yield Replayed([text(5), terminal_frame(5)], caught_up=True)
        await asyncio.Event().wait()

    replaying(monkeypatch, replay)
    follower = Following(services, PUBLIC)
    follower.attach()
    for seq in (1, 2):
        follower.stream.push(text(seq))
    assert [step.seq for step in await follower.next()] == [1, 2]
    log.found = terminal(5)
    ending = asyncio.create_task(to_the_end(follower))
    await asyncio.sleep(0)
    follower.stream.wake()  # As the sweep does after a silence.
    assert await ending == [3, 4, 5]
    assert asked == [(3, 995_000)]
    assert follower.terminal is not None and follower.terminal.status is Status.COMPLETED


async def test_frames_are_lost_only_when_all_that_is_kept_was_read(
    services: Services, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = asyncio.Event()

    async def replay(cluster: str, partition: int, since_ms: int, rid: bytes) -> AsyncGenerator[Replayed, None]:
        yield Replayed([], caught_up=False)
        await read.wait()
        yield Replayed([], caught_up=True)
        await asyncio.Event().wait()

    replaying(monkeypatch, replay)
    follower = Following(services, PUBLIC, seen=2)
    follower.attach()
    log.found = terminal(5)
    ending = asyncio.create_task(to_the_end(follower))
    for _ in range(50):  # However long it takes.
        follower.stream.wake()
        await asyncio.sleep(0)
    assert not ending.done()
    read.set()
    while not ending.done():
        follower.stream.wake()
        await asyncio.sleep(0)
    assert await ending == []
    assert follower.terminal is not None and follower.terminal.error is not None
    assert follower.terminal.status is Status.FAILED and "is lost" in follower.terminal.error.message


async def test_an_end_that_frames_and_log_tell_at_once_is_told_once(services: Services, log: Log) -> None:
    follower = Following(services, PUBLIC)
    follower.attach()
    follower.stream.push(text(1))
    assert [step.seq for step in await follower.next()] == [1]
    log.found = terminal(1)
    log.meanwhile = lambda: follower.stream.push(terminal_frame(1))
    ending = asyncio.create_task(to_the_end(follower))
    await asyncio.sleep(0)
    follower.stream.wake()
    assert await ending == []


async def test_whoever_left_asks_nothing_any_more(services: Services, log: Log) -> None:
    follower = Following(services, PUBLIC)
    follower.attach()
    waiting = asyncio.create_task(follower.next())
    await asyncio.sleep(0)
    follower.leave()
    assert await waiting == [] and log.asked == 0
