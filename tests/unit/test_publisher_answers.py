"""What direct publishers are told, from frames and terminals in any order: chunks once, in order, then the result."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import Unavailable
from headrace.published_answers import CHUNK_TYPE, RESULT_TYPE
from processors.answers.delivery import LATE_MS, Delivery, Told
from schemas.events import Status, Terminal, Timings, Usage
from schemas.ids import new_published_id
from topics.catalogue import published_partition
from topics.frames import Delta, Kind, Opened

ID = new_published_id("shop")
RID = bytes.fromhex(ID)
OPENED = Delta(RID, 0, 0, Kind.OPENED, 0, msgspec.json.encode(Opened("shop", 1_800_000_000_000, "m")).decode())
TEXTS = [Delta(RID, 1, seq, Kind.TEXT, 0, f"t{seq} ") for seq in (1, 2, 3)]
FINISH = Delta(RID, 1, 4, Kind.FINISH, 0, "stop")
FRAMES = [OPENED, *TEXTS, FINISH]
CHOICES = b'[{"index":0,"message":{"role":"assistant","content":"t1 t2 t3 "},"finish_reason":"stop","logprobs":null}]'


def terminal(**changes: Any) -> Terminal:
    made = Terminal(
        ID, "shop", 1, 0, Status.COMPLETED, model="m", alias="nick", stream=True, last_seq=4,
        reply_partition=published_partition(ID), usage=Usage(3, 4), choices=msgspec.Raw(CHOICES),
        timings=Timings(accepted_ms=1_800_000_000_000, finished_ms=1_800_000_001_000),
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def kinds(told: list[Told]) -> list[str]:
    """`1:2` for a chunk, the status of a result."""
    found = []
    for one in told:
        headers = dict(one.answer.headers)
        assert one.app == "shop" and one.answer.request_id == ID == headers["hr-request-id"].decode()
        if headers["ce_type"] == CHUNK_TYPE.encode():
            found.append(f"{headers['hr-attempt'].decode()}:{headers['hr-seq'].decode()}")
        else:
            assert headers["ce_type"] == RESULT_TYPE.encode()
            found.append(headers["hr-status"].decode())
    return found


WHOLE = ["1:1", "1:2", "1:3", "1:4", "completed"]


@given(st.integers(0, len(FRAMES)))
def test_the_result_comes_after_the_last_chunk_wherever_the_log_is(at: int) -> None:
    delivery, told, decided = Delivery(), [], False
    for place, delta in enumerate([*FRAMES, None]):
        if place == at:
            told += delivery.ended(terminal(), 7, 0)
            decided = True
        if delta is not None:
            told += delivery.frame(delta, place, decided=decided)
    assert kinds(told) == WHOLE and not told[-1].missed
    assert delivery.needed(8, 9) == (8, 9)


@given(st.integers(0, len(FRAMES) - 1), st.booleans())
def test_a_successor_reads_from_what_is_needed_and_says_the_same_again(died_after: int, log_first: bool) -> None:
    first, told = Delivery(), []
    if log_first:
        told += first.ended(terminal(), 7, 0)
    for place, delta in enumerate(FRAMES[: died_after + 1]):
        told += first.frame(delta, 100 + place, decided=log_first)
    log_from, frames_from = first.needed(8 if log_first else 7, 100 + died_after + 1)
    if "completed" in kinds(told):
        assert (log_from, frames_from) == (8, 105)
        return
    assert (log_from, frames_from) == (7, 100)
    second = Delivery()
    again = [one for place, delta in enumerate(FRAMES) for one in second.frame(delta, 100 + place, decided=False)]
    again += second.ended(terminal(), 7, 0)
    assert kinds(again) == WHOLE
    assert [one.answer for one in again][: len(told)] == [one.answer for one in told], "byte for byte"


def test_chunks_are_openais_and_the_role_is_named_once() -> None:
    delivery = Delivery()
    chunks = [json.loads(one.answer.value) for delta in FRAMES for one in delivery.frame(delta, 0, decided=False)]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and {c["model"] for c in chunks} == {"m"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": "t1 "}, {"content": "t2 "}, {"content": "t3 "}, {}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    [last] = delivery.ended(terminal(), 0, 0)
    result = json.loads(last.answer.value)
    assert (result["id"], result["object"]) == (chunks[0]["id"], "chat.completion")
    assert result["usage"]["total_tokens"] == 7 and result["choices"] == json.loads(CHOICES)


def test_frames_of_a_fenced_attempt_are_void() -> None:
    delivery = Delivery()
    fence = Delta(RID, 2, 0, Kind.FENCE, 0, "")
    ours = [Delta(RID, 2, 2, Kind.TEXT, 0, "new "), Delta(RID, 2, 3, Kind.FINISH, 0, "stop")]
    frames = [OPENED, TEXTS[0], fence, TEXTS[1], *ours, TEXTS[2]]
    told = [one for delta in frames for one in delivery.frame(delta, 0, decided=False)]
    told += delivery.ended(terminal(attempt=2, last_seq=3), 0, 0)
    assert kinds(told) == ["1:1", "2:2", "2:3", "completed"]


def test_who_asked_for_no_chunks_gets_the_result_alone_and_a_refusal_waits_for_none() -> None:
    assert kinds(Delivery().ended(terminal(stream=False), 0, 0)) == ["completed"]
    quiet = Delivery()
    assert [one for delta in FRAMES[1:] for one in quiet.frame(delta, 0, decided=False)] == []
    error = Unavailable("Busy.", retry_after_s=3).info()
    [told] = Delivery().ended(terminal(status=Status.REJECTED, error=error, last_seq=0), 0, 0)
    headers = dict(told.answer.headers)
    assert (headers["hr-status"], headers["hr-http-status"], headers["hr-retry-after"]) == (b"rejected", b"503", b"3")
    assert json.loads(told.answer.value)["error"]["code"] == "service_unavailable"


def test_an_opening_that_comes_again_after_the_end_holds_nothing_up() -> None:
    delivery = Delivery()
    for delta in FRAMES:
        delivery.frame(delta, 5, decided=False)
    delivery.ended(terminal(), 7, 0)
    assert delivery.frame(OPENED, 50, decided=True) == []
    assert delivery.needed(8, 51) == (8, 51)


def test_chunks_that_never_come_delay_the_result_only_while_frames_are_unread_and_a_little_more() -> None:
    delivery = Delivery()
    for delta in FRAMES[:3]:
        delivery.frame(delta, 5, decided=False)
    assert delivery.ended(terminal(), 7, 0) == []
    assert delivery.late(LATE_MS * 9, caught_up=False) == []
    assert delivery.late(LATE_MS * 10, caught_up=True) == []
    [told] = delivery.late(LATE_MS * 10 + 1, caught_up=True)
    assert told.missed and kinds([told]) == ["completed"]
    assert delivery.needed(8, 9) == (8, 9)
