"""Two workers, one lost in the middle of answers: they go on elsewhere, token-exact, as one answer and one bill."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import pytest

from bench.gateway.spec import Spec
from bench.gateway.tally import Entry
from schemas.events import Terminal
from tests.faults.conftest import Note
from tests.faults.test_second_worker import LEFT, LOST, both_hold_the_model
from tests.support.accounts import settled, usage_rows
from tests.support.chat import Api, Seen, body, fresh
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
