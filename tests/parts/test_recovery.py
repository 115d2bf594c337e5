"""Recovery of lost attempts on a real broker: what was sent decides, fences hold, and every end is told once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from headrace.settings import Settings
from processors.scheduler.messages import Recover
from processors.scheduler.recovery import Again, Recovery
from processors.scheduler.state import Request, Running
from processors.scheduler.tails import Tails
from schemas.control import Provider
from schemas.events import BodyRef, Routed, Status, Terminal
from schemas.ids import new_request_id
from tests.support.kafka import end_offsets, records
from topics import frames, request_log
from topics.catalogue import LOG, REPLIES
from topics.clients import Producer
from topics.frames import Delta, Kind, StreamView
from topics.outcomes import Outcomes, now_ms

PARTITION = 3
PROVIDERS = {"can": Provider("can", "llama_cpp"), "cannot": Provider("cannot", "ollama")}


class Lost:
    """Requests whose worker was lost, the frames that it wrote, and what readers of the topics make of them."""

    def __init__(
        self, conf: Settings, producer: Producer, recovery: Recovery, since: dict[str, dict[int, int]]
    ) -> None:
        self.conf = conf
        self.producer = producer
        self.recovery = recovery
        self.since = since

    async def request(self, text: str, *, model: str = "can", finish: str = "", **fields: object) -> Routed:
        """A request under attempt 1, of which each letter of `text` was sent."""
        known = {"choices": 1, "continuable": True, "prompt_tokens_estimate": 7, "accepted_ms": now_ms() - 1000}
        routed = Routed(
            new_request_id(), "t", "k", model, model, "default", PARTITION, BodyRef(0, 0), **(known | fields)  # type: ignore[arg-type]
        )  # fmt: skip
        await self.write(routed, 1, 1, text, finish=finish)
        return routed

    async def write(self, routed: Routed, attempt: int, first: int, text: str, *, finish: str = "") -> None:
        """Frames of an attempt, from `seq` `first` on."""
        rid = bytes.fromhex(routed.request_id)
        deltas = [Delta(rid, attempt, seq, Kind.TEXT, 0, letter, 1) for seq, letter in enumerate(text, start=first)]
        if finish:
            deltas.append(Delta(rid, attempt, first + len(text), Kind.FINISH, 0, finish))
        if deltas:
            await self.producer.send(REPLIES.name, frames.encode(deltas), partition=PARTITION)

    async def settle(self, *requests: Routed, attempt: int = 1, may_retry: bool = True) -> dict[str, Again]:
        lost = []
        for routed in requests:
            request = Request(routed.request_id, "t", routed.model, 0, 1, attempt=attempt)
            lost.append((Recover(Running(request, "w", "b", 5), may_retry), routed))
        async with asyncio.timeout(20):
            return {again.request_id: again for again in await self.recovery.settle(lost)}

    async def end(self, routed: Routed) -> Terminal | None:
        """The terminal that decides."""
        found = [request_log.decode(one.value or b"") for one in await records(self.conf, LOG, self.since[LOG.name])]
        return request_log.deciding_terminal(one for one in found if one.request_id == routed.request_id)

    async def heard(self, routed: Routed) -> list[Delta]:
        """What a caller's stream takes of the frames."""
        view, rid = StreamView(), bytes.fromhex(routed.request_id)
        read = await records(self.conf, REPLIES, self.since[REPLIES.name])
        return [
            delta for one in read for delta in frames.decode(one.value or b"")
            if delta.rid == rid and view.accept(delta)
        ]  # fmt: skip


@pytest.fixture
async def lost(infra: Settings) -> AsyncIterator[Lost]:
    async def nothing(*_: object) -> None:
        pass

    tails = Tails(
        infra.kafka,
        on_terminal=nothing,
        on_opened=nothing,
        on_cancellation=nothing,
        on_heartbeat=nothing,
        on_ingress=lambda status: None,
        on_unreadable=nothing,
        on_term=nothing,
        on_wish=nothing,
    )
    since = {topic.name: await end_offsets(infra, topic) for topic in (LOG, REPLIES)}
    await tails.start(now_ms(), wishes_since_ms=now_ms())
    reading = asyncio.create_task(tails.run())
    async with Producer(infra.kafka, "test") as producer:
        outcomes = Outcomes(producer, "scheduler", "test")
        yield Lost(infra, producer, Recovery(infra.kafka, producer, outcomes, tails, PROVIDERS.get, nothing), since)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await tails.stop()


def told(deltas: list[Delta]) -> str:
    return "".join(delta.data for delta in deltas if delta.kind == Kind.TEXT)


async def test_each_request_has_the_fate_of_what_was_sent(lost: Lost) -> None:
    fresh = await lost.request("", model="cannot")
    going = await lost.request("abc")
    failing = await lost.request("abc", model="cannot")
    ended = await lost.request("abc", model="cannot", finish="stop")
    capped = await lost.request("abc", max_tokens=3)
    done = await lost.request("abc")
    await lost.producer.send(
        LOG.name, msgspec.json.encode(Terminal(done.request_id, "t", 1, 5, Status.COMPLETED)), key=done.request_id
    )
    again = await lost.settle(fresh, going, failing, ended, capped, done)

    assert set(again) == {fresh.request_id, going.request_id}
    assert again[fresh.request_id].attempt == 2 and again[fresh.request_id].sent.empty
    sent = again[going.request_id].sent
    assert (sent.answer.content(), sent.tokens, sent.last_seq) == ("abc", 3, 3)
    assert abs(now_ms() - sent.first_ms) < 60_000
    assert await lost.end(fresh) is await lost.end(going) is None

    for routed, status, finish, code in (
        (failing, Status.FAILED, None, "worker_lost"),
        (ended, Status.COMPLETED, "stop", None),
        (capped, Status.COMPLETED, "length", None),
    ):
        terminal = await lost.end(routed)
        assert terminal is not None and (terminal.status, terminal.attempt) == (status, 2)
        assert (terminal.error.code if terminal.error is not None else None) == code
        [choice] = msgspec.json.decode(terminal.choices)
        assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", finish)
        assert (terminal.usage.prompt_tokens, terminal.usage.completion_tokens) == (7, 3)
        heard = await lost.heard(routed)
        assert told(heard) == "abc"
        assert [one.seq for one in heard] == list(range(1, len(heard) + 1))
        assert [one.data for one in heard if one.kind == Kind.FINISH] == ([finish] if finish else [])
        assert heard[-1].kind == Kind.TERMINAL and heard[-1].seq == terminal.last_seq + 1
    decided = await lost.end(done)
    assert decided is not None and decided.attempt == 1


async def test_what_a_zombie_writes_is_void_for_callers_and_for_the_next_recovery(lost: Lost) -> None:
    routed = await lost.request("abc")
    await lost.settle(routed)
    # Its successor and the zombie write at the same time.
    await lost.write(routed, 1, 4, "XYZ", finish="stop")
    await lost.write(routed, 2, 4, "d")
    await lost.write(routed, 1, 4, "XYZ", finish="stop")
    zombie = Terminal(routed.request_id, "t", 1, 5, Status.COMPLETED, last_seq=7)
    await lost.producer.send(LOG.name, msgspec.json.encode(zombie), key=routed.request_id)
    await lost.write(routed, 2, 5, "e")

    again = await lost.settle(routed, attempt=2)
    found = again[routed.request_id]
    assert found.attempt == 3
    assert (found.sent.answer.content(), found.sent.tokens, found.sent.last_seq) == ("abcde", 5, 5)
    assert await lost.end(routed) is None
    await lost.write(routed, 2, 6, "X")
    await lost.write(routed, 3, 6, "f", finish="stop")
    assert told(await lost.heard(routed)) == "abcdef"

    last = await lost.settle(routed, attempt=3, may_retry=False)
    assert not last
    terminal = await lost.end(routed)
    assert terminal is not None and (terminal.status, terminal.attempt, terminal.last_seq) == (Status.COMPLETED, 4, 7)
    assert terminal.usage.completion_tokens == 6
