"""From pieces to the answer and its frames, and from the answer to money. Pure."""

from __future__ import annotations

from decimal import Decimal

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from processors.generation.answer import Answer
from processors.generation.providers.base import Choices, Done, Finish, Piece, Text
from processors.metering.meter import usage_of
from schemas.control import Price
from schemas.events import Status, Terminal, Timings, Usage
from topics.frames import Kind

RID = "0" * 32


def folded(*pieces: Piece) -> Answer:
    answer = Answer(RID, 1, 0)
    for piece in pieces:
        answer.add(piece)
    return answer


def choices(answer: Answer) -> list[dict[str, object]]:
    found: list[dict[str, object]] = msgspec.json.decode(answer.choices())
    return found


def raw(**choice: object) -> Choices:
    return Choices(msgspec.json.encode([{"index": 0, "delta": {}, "finish_reason": None, **choice}]), 1)


def test_each_piece_is_a_frame_with_the_next_seq() -> None:
    answer = Answer(RID, 2, 5)
    deltas = [answer.add(piece) for piece in (Text(0, "a"), Text(1, "b"), Finish(0, "stop"), Done(None, None))]
    assert [(d.attempt, d.seq, d.kind, d.index, d.data) for d in deltas if d is not None] == [
        (2, 6, Kind.TEXT, 0, "a"), (2, 7, Kind.TEXT, 1, "b"), (2, 8, Kind.FINISH, 0, "stop"),
    ]  # fmt: skip
    assert deltas[-1] is None and answer.seq == 8


@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=5)), min_size=1, max_size=30))
def test_texts_are_joined_by_choice(pieces: list[tuple[int, str]]) -> None:
    answer = folded(*(Text(index, text) for index, text in pieces))
    shown = {choice["index"]: choice["message"]["content"] for choice in choices(answer)}  # type: ignore[index]
    assert shown == {
        index: "".join(text for found, text in pieces if found == index) for index in {index for index, _ in pieces}
    }
    assert answer.tokens == len(pieces)


def test_tool_calls_are_joined_by_their_index() -> None:
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a'}}
    answer = folded(
        raw(delta={"role": "assistant", "content": None, "tool_calls": [first]}),
        raw(delta={"tool_calls": [{"index": 0, "function": {"arguments": '":1}'}}]}),
        raw(delta={"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "go", "arguments": "{}"}}]}),
        Finish(0, "tool_calls"),
    )
    [choice] = choices(answer)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert isinstance(message, dict) and message["content"] is None
    assert [(call["id"], call["function"]) for call in message["tool_calls"]] == [
        ("c1", {"name": "look", "arguments": '{"a":1}'}),
        ("c2", {"name": "go", "arguments": "{}"}),
    ]


def test_logprobs_are_gathered() -> None:
    answer = folded(
        raw(delta={"content": "a"}, logprobs={"content": [{"token": "a"}]}),
        raw(delta={"content": "b"}, logprobs={"content": [{"token": "b"}]}),
    )
    [choice] = choices(answer)
    assert choice["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}], "refusal": None}
    assert choice["message"]["content"] == "ab"  # type: ignore[index]


def test_nothing_generated_is_no_answer() -> None:
    assert not folded().choices() and not folded().started


def test_usage_is_the_providers_or_counted_and_marked() -> None:
    counted = folded(Text(0, "a"), Text(0, "b")).usage(9)
    assert (counted.prompt_tokens, counted.completion_tokens, counted.estimated) == (9, 2, True)
    said = Usage(prompt_tokens=3, completion_tokens=5)
    assert folded(Text(0, "a"), Done(said, None)).usage(9) is said


def terminal(**fields: object) -> Terminal:
    return Terminal(RID, "t", 2, 1, Status.COMPLETED, **fields)  # type: ignore[arg-type]


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7))
def test_the_cost_is_exact(uncached: int, cached: int, completion: int) -> None:
    price = Price(4, input=Decimal("0.10"), output=Decimal("0.40"), cached=Decimal("0.03"))
    usage = usage_of(
        terminal(
            usage=Usage(prompt_tokens=uncached + cached, cached_tokens=cached, completion_tokens=completion),
            price=price,
        )
    )
    assert usage.cost * 100_000_000 == uncached * 10 + cached * 3 + completion * 40
    assert usage.price_version == 4


def test_a_request_without_a_price_is_free() -> None:
    usage = usage_of(terminal(usage=Usage(prompt_tokens=5)))
    assert (usage.cost, usage.price_version) == (Decimal(0), 0)


def test_times_of_hops_that_were_not_reached_are_zero() -> None:
    usage = usage_of(terminal(timings=Timings(accepted_ms=100, finished_ms=400)))
    assert (usage.queue_ms, usage.ttft_ms, usage.generation_ms) == (0, 0, 0)
    reached = Timings(accepted_ms=100, started_ms=130, first_token_ms=150, finished_ms=400)
    usage = usage_of(terminal(timings=reached))
    assert (usage.queue_ms, usage.ttft_ms, usage.generation_ms) == (30, 50, 270)


def test_the_usage_id_does_not_depend_on_the_attempt() -> None:
    assert usage_of(terminal()).usage_id == usage_of(msgspec.structs.replace(terminal(), attempt=1)).usage_id
