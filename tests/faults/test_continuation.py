"""Two workers, one lost in the middle of answers: they go on elsewhere, token-exact, as one answer and one bill.

What cannot go on from its text begins anew where nothing was sent, else its caller is told.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import defaultdict
from dataclasses import dataclass

import msgspec
import pytest

from bench.gateway.spec import Spec
from bench.gateway.tally import Entry, Try
from schemas.events import Terminal
from tests.faults.conftest import Note
from tests.faults.test_second_worker import LEFT, LOST, both_hold_the_model
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, Seen, body, fresh, numbers
from tests.support.kafka import end_offsets, records
from tests.support.stacks import Stack
from tests.support.waiting import until
from topics import request_log
from topics.catalogue import LOG

GRAMMARS = 8
STREAMS = 16
TOKENS = 250
INTERVAL_MS = 100.0
CAP = 150
MISSED_S = 10.0
"""Seconds until every answer goes on: 3 until the worker is missed, or 5 in which it lets answers end, and the rest for
busy machines."""
STOPPED_S = 15.0
"""How long a worker is silent: it is missed after 3 s, and answers go on elsewhere for as long again."""

SHAPES: dict[str, dict[str, object]] = {
    "choices": {"n": 2},
    "logprobs": {"logprobs": True, "top_logprobs": 1},
    "json": {"response_format": {"type": "json_object"}},
    "calls": {"tools": [{"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}]},
}
"""What is asked of answers that are not one plain text, by what they are then."""
EACH = 4
"""Requests of a shape and a stage, half of them on each worker."""
SILENT_MS = 6_000.0
"""Nothing is sent before: longer than it takes until all requests are at the upstream and the worker is killed."""

Row = dict[str, object]


def number(row: Row, name: str) -> int:
    return int(str(row[name]))


def billed(row: Row) -> dict[str, int]:
    prompt, completion = number(row, "prompt_tokens"), number(row, "completion_tokens")
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def shown(usage: dict[str, object]) -> dict[str, object]:
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=["killed", "silent", "stopped"])
async def test_answers_go_on_elsewhere(pair: Stack, how: signal.Signals, seed: int, note: Note) -> None:
    await pair.ready()
    chance = random.Random(f"{seed}-{how}")
    specs = [Spec(tokens=TOKENS, interval_ms=INTERVAL_MS, seq=1_000 * at, id=fresh("on")) for at in range(STREAMS)]
    capped, whole, grammar = (
        Spec(tokens=TOKENS, interval_ms=INTERVAL_MS, id=fresh(name)) for name in ("capped", "whole", "grammar")
    )
    streamed = {"stream_options": {"include_usage": True}}
    since = await end_offsets(pair.settings, LOG)
    async with Api(pair) as api:
        await both_hold_the_model(pair, api)
        streams = [asyncio.create_task(api.stream(body(spec, **streamed))) for spec in specs]
        limited = [asyncio.create_task(api.stream(body(capped, max_tokens=CAP, **streamed))) for _ in range(2)]
        answers = [asyncio.create_task(api.ask(body(whole))) for _ in range(2)]
        json_mode = {"response_format": {"type": "json_object"}}
        strict = [asyncio.create_task(api.stream(body(grammar, **json_mode))) for _ in range(GRAMMARS)]

        async def all_begun() -> bool:
            seen = await pair.all_seen()
            tries = [one for spec in (*specs, capped, whole, grammar) for one in seen.get(spec.id, Entry()).tries]
            return len(tries) == STREAMS + 4 + GRAMMARS and all(one.tokens for one in tries)

        await until(all_begun, "every answer has begun", 20)
        await asyncio.sleep(chance.uniform(0.5, 4.0))
        pair.signal("worker-1", how)
        gone_s = time.time()
        if how == signal.SIGSTOP:
            try:
                await asyncio.sleep(STOPPED_S)
                assert not any(task.done() for task in streams), "the zombie has nothing left to disturb"
            finally:
                pair.signal("worker-1", signal.SIGCONT)
        seen = await asyncio.gather(*streams)
        short = await asyncio.gather(*limited)
        told = [answer.json() for answer in await asyncio.gather(*answers)]
        broken = await asyncio.gather(*strict)
        resumed = [await api.resume(one.completion_id, "1:7") for one in seen[:4]]
        lives = [(await api.get(f"/v1/requests/{one.request_id}")).json() for one in seen]

    # One unbroken text, one finish, one end.
    for spec, one in zip(specs, seen, strict=True):
        assert one.done and one.tokens == list(range(spec.seq, spec.seq + TOKENS)), (one.error, one.tokens)
        assert [reason for reason in finishes(one) if reason] == ["stop"]
        assert [chunk["choices"][0]["delta"].get("role") for chunk in one.chunks if chunk["choices"]].count(
            "assistant"
        ) == 1
    for one in short:
        assert one.done and one.finish == "length" and one.tokens == list(range(CAP)), (one.error, one.tokens)
    for answer in told:
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"].count("@") == TOKENS
    for spec, one in zip(specs, resumed, strict=False):
        assert one.done and one.tokens == list(range(spec.seq + 7, spec.seq + TOKENS)), (one.error, one.tokens)

    # What has a grammar is not continued: its caller is told, after a gapless beginning.
    failed = [one for one in broken if not one.done]
    assert failed, "none ran on the worker that was lost"
    for one in failed:
        assert (one.error or {})["code"] == "worker_lost"
        assert one.tokens == list(range(len(one.tokens)))

    # One bill: the prompt once, every token that was shown, the same to the caller and in the books.
    rows = await usage_rows(pair, [one.request_id for one in (*seen, *short, *broken)])
    assert {one.request_id for one in failed} == {
        one.request_id for one in broken if rows[one.request_id]["worker"] == LOST
    }
    went_on = [one for one in seen if number(rows[one.request_id], "attempts") > 1]
    assert len(went_on) >= STREAMS // 4, "nothing was lost in the middle"
    for spec, one in zip(specs, seen, strict=True):
        words = len(body(spec)["messages"][0]["content"].split())
        assert number(rows[one.request_id], "prompt_tokens") == words, "however often it was read"
    for one in (*seen, *short):
        row = rows[one.request_id]
        assert row["status"] == "completed" and number(row, "completion_tokens") == len(one.tokens)
        assert shown(one.chunks[-1]["usage"]) == billed(row), one.request_id
    for one in failed:
        assert number(rows[one.request_id], "completion_tokens") == len(one.tokens)
    assert {number(row, "attempts") for row in rows.values()} == {1, 2}
    for life, one in zip(lives, seen, strict=True):
        attempts = number(rows[one.request_id], "attempts")
        assert (life["attempts"], life["status"]) == (attempts, "completed")
        stages = [step["stage"] for step in life["steps"]]
        assert stages.count("started") == attempts and stages.count("first_token") == 1
        assert ("attempt_lost" in stages) == (attempts == 2)
    workers = {str(rows[one.request_id]["worker"]) for one in went_on}
    assert LEFT in workers and (how != signal.SIGSTOP or workers == {LEFT})

    # Nothing was generated again that had been told; and of the dead nothing is heard.
    generated = await pair.all_seen()
    for spec, one in zip(specs, seen, strict=True):
        tries = generated[spec.id].tries
        assert len(tries) == number(rows[one.request_id], "attempts")
        if len(tries) == 2:
            assert tries[-1].tokens < TOKENS
    if how == signal.SIGSTOP:
        await until(lambda: spoke(pair, since, {one.request_id for one in went_on}), "the zombie has spoken", 30)
        assert await usage_rows(pair, list(rows)) == rows
    missed_s = sorted(await missed(pair, [one.request_id for one in went_on]))
    heard_s = sorted(one.began[2] for one in went_on)
    assert gone_s < missed_s[0] and missed_s[-1] <= heard_s[-1] < gone_s + MISSED_S, (gone_s, missed_s, heard_s)
    note(
        part=f"answers of one of two workers {how.name}", continued=len(went_on), callers=STREAMS, worker=LOST,
        missed_s=round(missed_s[-1] - gone_s, 2), first_heard_s=round(heard_s[0] - gone_s, 2),
        last_heard_s=round(heard_s[-1] - gone_s, 2),
    )  # fmt: skip
    await settled(pair)


async def missed(stack: Stack, request_ids: list[str]) -> list[float]:
    """When each of these attempts was taken for lost, in Unix seconds."""
    wanted = ", ".join(f"'{one}'" for one in request_ids)
    query = (
        "SELECT toUnixTimestamp64Milli(at) AS at_ms FROM request_events"  # noqa: S608
        f" WHERE stage = 'attempt_lost' AND request_id IN ({wanted})"
    )
    rows = await asyncio.to_thread(stack.rows, query)
    assert len(rows) == len(request_ids)
    return [number(row, "at_ms") / 1000 for row in rows]


def finishes(one: Seen) -> list[str | None]:
    return [choice["finish_reason"] for chunk in one.chunks for choice in chunk["choices"]]


async def spoke(stack: Stack, since: dict[int, int], wanted: set[str]) -> bool:
    """Whether the log has a terminal of the first attempt of each: what the zombie wrote, which decides nothing."""
    found: dict[str, list[request_log.LogRecord]] = {}
    for record in await records(stack.settings, LOG, since):
        decoded = request_log.decode(record.value or b"")
        found.setdefault(decoded.request_id, []).append(decoded)
    for request_id in wanted:
        decides = request_log.deciding_terminal(found[request_id])
        assert decides is not None and decides.attempt == 2
    late = {one.request_id for log in found.values() for one in log if isinstance(one, Terminal) and one.attempt == 1}
    return wanted <= late


@dataclass
class Asked:
    """A request that is not one plain text, and what became of it."""

    shape: str
    begun: bool
    """Whether something of it had been sent when the worker was killed."""
    spec: Spec
    seen: Seen
    row: Row
    tries: list[Try]
    terminals: list[Terminal]

    @property
    def choices(self) -> int:
        return 2 if self.shape == "choices" else 1

    @property
    def lost(self) -> bool:
        """Whether it was on the worker that was killed."""
        return number(self.row, "attempts") == 2


async def read(api: Api, question: dict[str, object], into: list[Seen]) -> Seen:
    """A stream read to its end; what comes of it is to be seen in `into` meanwhile."""
    async with api.open(question) as reader:
        into.append(reader.seen)
        return await reader.rest()


@pytest.fixture(scope="module")
async def asked(pair: Stack, note: Note) -> list[Asked]:
    """Answers of each shape, half of them not begun, half in the middle, when one of two workers is killed."""
    await pair.ready()
    since = await end_offsets(pair.settings, LOG)
    sent: list[tuple[str, bool, Spec]] = []
    reading: list[asyncio.Task[Seen]] = []
    begun: list[Seen] = []
    async with Api(pair) as api:
        await both_hold_the_model(pair, api)
        for late in (False, True):
            for shape, fields in SHAPES.items():
                calls, pace = shape == "calls", {"ttft_ms": SILENT_MS, "interval_ms": 10.0} if late else {}
                group = [Spec(tokens=150, seq=1_000 * at, calls=calls, id=fresh(shape), **pace) for at in range(EACH)]
                questions = [body(spec, stream_options={"include_usage": True}, **fields) for spec in group]
                reading += [asyncio.create_task(read(api, one, [] if late else begun)) for one in questions]
                sent += [(shape, not late, spec) for spec in group]
                # One group after the other, so that each is spread over both workers.
                await until(lambda group=group: there(pair, group), f"the upstream has all requests: {shape}", 10)
        await until(
            lambda: len(begun) == EACH * len(SHAPES) and all(map(told, begun)), "callers have been told some", 5
        )
        pair.signal("worker-1", signal.SIGKILL)
        gone_s = time.time()
        seen = await asyncio.gather(*reading)
    rows = await usage_rows(pair, [one.request_id for one in seen])
    generated = await pair.all_seen()
    ended: dict[str, list[Terminal]] = defaultdict(list)
    for record in await records(pair.settings, LOG, since):
        if isinstance(decoded := request_log.decode(record.value or b""), Terminal):
            ended[decoded.request_id].append(decoded)
    await settled(pair)
    found = [
        Asked(shape, was, spec, one, rows[one.request_id], generated[spec.id].tries, ended[one.request_id])
        for (shape, was, spec), one in zip(sent, seen, strict=True)
    ]
    lost = [one for one in found if one.lost]
    missed_s = await missed(pair, [one.seen.request_id for one in lost])
    note(
        part="answers that cannot go on from their text", began_anew=sum(not one.begun for one in lost),
        told=sum(one.begun for one in lost), callers=len(found), worker=LOST,
        missed_s=round(max(missed_s) - gone_s, 2),
    )  # fmt: skip
    return found


async def there(stack: Stack, specs: list[Spec]) -> bool:
    seen = await stack.all_seen()
    return all(seen.get(spec.id, Entry()).requests == 1 for spec in specs)


def said(one: Seen) -> dict[int, str]:
    """The text of each choice, or the name and arguments of its call."""
    texts: dict[int, str] = defaultdict(str)
    for choice in (choice for chunk in one.chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls") or ():
            texts[choice["index"]] += call["function"].get("name", "") + call["function"]["arguments"]
    return texts


def told(one: Seen) -> int:
    """The tokens of all choices, and a call's name as one."""
    return sum(len(numbers(text)) + text.startswith("count") for text in said(one).values())


def written(terminal: Terminal) -> dict[int, str]:
    """What a terminal keeps of the answer, as `said` gives it."""
    texts = {}
    for choice in msgspec.json.decode(terminal.choices or b"[]"):
        calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
        called = "".join(call["name"] + call["arguments"] for call in calls)
        texts[choice["index"]] = (choice["message"]["content"] or "") + called
    return texts


def is_whole(one: Asked) -> None:
    """Each choice has one role, all its tokens once, one finish and, where asked for, log probabilities."""
    seen, first = one.seen, one.spec.seq
    assert seen.done and seen.error is None, (one.shape, seen.error)
    assert sorted(said(seen)) == list(range(one.choices))
    for index, text in said(seen).items():
        assert numbers(text) == list(range(first, first + one.spec.tokens)), (one.shape, text)
        mine = [choice for chunk in seen.chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [choice["delta"].get("role") for choice in mine].count("assistant") == 1
        reason = "tool_calls" if one.shape == "calls" else "stop"
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == [reason]
        logprobs = [entry for choice in mine for entry in (choice["logprobs"] or {}).get("content", ())]
        assert len(logprobs) == (one.spec.tokens if one.shape == "logprobs" else 0)
        assert text.startswith("count t") == (one.shape == "calls")
    [terminal] = one.terminals
    assert (terminal.status, written(terminal)) == ("completed", said(seen))
    assert one.row["status"] == "completed"
    assert number(one.row, "completion_tokens") == one.spec.tokens * one.choices
    assert shown(seen.chunks[-1]["usage"]) == billed(one.row)
    assert len(one.tries) == number(one.row, "attempts")
    assert one.tries[-1].tokens == one.spec.tokens


@pytest.mark.timeout(200)
@pytest.mark.parametrize("shape", SHAPES)
async def test_what_cannot_go_on_begins_anew_where_nothing_was_sent(asked: list[Asked], shape: str) -> None:
    group = [one for one in asked if one.shape == shape and not one.begun]
    assert sum(one.lost for one in group) == EACH // 2
    for one in group:
        is_whole(one)
        assert not one.lost or (one.tries[0].tokens, one.tries[0].outcome) == (0, "disconnected")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("shape", SHAPES)
async def test_what_cannot_go_on_fails_clearly_where_something_was_sent(asked: list[Asked], shape: str) -> None:
    group = [one for one in asked if one.shape == shape and one.begun]
    assert sum(one.lost for one in group) == EACH // 2
    for one in group:
        if one.lost:
            is_told(one)
        else:
            is_whole(one)


def is_told(one: Asked) -> None:
    """A gapless beginning, an error, and a bill of what was sent; nothing is generated again."""
    seen, error = one.seen, one.seen.error or {}
    assert (seen.status, error.get("code"), seen.done, seen.broken) == (200, "worker_lost", False, False), one.shape
    assert "Send the request again" in error["message"]
    assert finishes(seen).count(None) == len(finishes(seen))
    assert sorted(said(seen)) == list(range(one.choices))
    for text in said(seen).values():
        found = numbers(text)
        assert 0 < len(found) < one.spec.tokens
        assert found == list(range(one.spec.seq, one.spec.seq + len(found))), (one.shape, text)
    [terminal] = one.terminals
    assert (terminal.status, terminal.attempt, written(terminal)) == ("failed", 2, said(seen))
    assert terminal.error is not None and terminal.error.code == "worker_lost"
    assert (one.row["status"], one.row["worker"]) == ("failed", LOST)
    assert number(one.row, "completion_tokens") == told(seen)
    assert number(one.row, "prompt_tokens") > 0
    assert len(one.tries) == 1
