"""Answers that survive their worker: who may go on, what is left to generate, stop texts across the seam. Pure."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.errors import ProviderError
from processors.generation.answer import Answer
from processors.generation.attempt import unable
from processors.generation.continuation import Seam, remaining, stops_of
from processors.generation.providers.base import Done, Finish, Piece, Text
from processors.generation.providers.factory import make_provider
from processors.router.continuable import Asked, choices, continuable
from processors.scheduler.fate import Fate, capped, fate
from processors.scheduler.messages import Recover
from processors.scheduler.sent import Sent
from processors.scheduler.state import Request, Running
from schemas.control import Provider
from schemas.events import MAX_EMITTED_BYTES, BodyRef, GenerateCommand, Routed, Status, Usage
from topics.frames import Delta, Kind, StreamView

RID = "0" * 32
CAN = Provider("p", "llama_cpp")
CANNOT = Provider("p", "openai", "http://h/v1")


def routed(**fields: object) -> Routed:
    known = {"max_tokens": 10, "prompt_tokens_estimate": 7, "choices": 1, "continuable": True, **fields}
    return Routed(RID, "t", "k", "m", "m", "default", 0, BodyRef(0, 0), **known)  # type: ignore[arg-type]


def delta(seq: int, data: str, kind: Kind = Kind.TEXT, *, attempt: int = 1, tokens: int = 1, index: int = 0) -> Delta:
    return Delta(bytes(16), attempt, seq, kind, index, data, tokens)


def sent(*deltas: Delta) -> Sent:
    found = Sent()
    for one in deltas:
        found.add(one, 1_000 + one.seq)
    return found


def lost(*, may_retry: bool = True, cancel_asked: bool = False) -> Recover:
    request = Request(RID, "t", "m", 0, 1)
    return Recover(Running(request, "w", "b", 1, cancel_asked=cancel_asked), may_retry)


# --- who may go on ------------------------------------------------------------------------------------------------

TWO = sent(delta(1, "a"), delta(2, "b"))
ENDED = sent(delta(1, "a"), delta(2, "stop", Kind.FINISH, tokens=0))
CALLS = sent(delta(1, '[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]', Kind.CHOICES))
LONG = sent(delta(1, "a" * MAX_EMITTED_BYTES))


@pytest.mark.parametrize(
    ("asked", "seen", "provider", "how", "decided"),
    [
        ({}, Sent(), CANNOT, {}, Fate.RETRIED),
        ({}, Sent(), None, {"may_retry": False}, Fate.FAILED),
        ({}, TWO, CAN, {}, Fate.CONTINUED),
        ({}, TWO, CANNOT, {}, Fate.FAILED),
        ({}, TWO, None, {}, Fate.FAILED),
        ({}, TWO, CAN, {"may_retry": False}, Fate.FAILED),
        ({}, TWO, CAN, {"cancel_asked": True}, Fate.FAILED),
        ({"continuable": False}, TWO, CAN, {}, Fate.FAILED),
        ({}, CALLS, CAN, {}, Fate.FAILED),
        ({"max_tokens": None}, LONG, CAN, {}, Fate.FAILED),
        ({}, ENDED, None, {"may_retry": False, "cancel_asked": True}, Fate.COMPLETED),
        ({"choices": 2, "continuable": False}, ENDED, CAN, {}, Fate.FAILED),
        ({"choices": 0}, ENDED, CAN, {"may_retry": False}, Fate.FAILED),
        ({"max_tokens": 2}, TWO, CANNOT, {}, Fate.COMPLETED),
        ({"max_tokens": 2, "choices": 2, "continuable": False}, TWO, CAN, {}, Fate.FAILED),
        ({"max_tokens": 3}, TWO, CAN, {}, Fate.CONTINUED),
    ],
)
def test_what_becomes_of_a_request_whose_worker_was_lost(
    asked: dict[str, object], seen: Sent, provider: Provider | None, how: dict[str, bool], decided: Fate
) -> None:
    assert fate(lost(**how), routed(**asked), seen, provider) is decided


def test_only_what_the_cap_ended_still_needs_its_finish() -> None:
    assert capped(routed(max_tokens=2), TWO)
    assert not capped(routed(max_tokens=1), ENDED)


PLAIN = {"model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "seed": 3, "stop": "x"}, True),
        ({"n": None, "logprobs": None, "tools": None, "response_format": None, "reasoning_effort": "none"}, True),
        ({"tools": TOOLS, "tool_choice": "none"}, True),
        ({"n": 2}, False),
        ({"logprobs": True}, False),
        ({"tools": TOOLS}, False),
        ({"tools": TOOLS, "tool_choice": "auto"}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, False),
        ({"reasoning_effort": "high"}, False),
        ({"messages": [*PLAIN["messages"], {"role": "assistant", "content": "I"}]}, False),
        ({"messages": []}, False),
        ({"messages": "hi"}, False),
    ],
)
def test_an_answer_may_be_continued_if_it_is_one_text(fields: dict[str, object], may: bool) -> None:
    asked = msgspec.json.decode(msgspec.json.encode({**PLAIN, **fields}), type=Asked)
    assert continuable(asked) is may


@pytest.mark.parametrize(("n", "count"), [(None, 1), (1, 1), (4, 4), ("x", 0), (-2, 0)])
def test_choices_are_counted_or_unknown(n: object, count: int) -> None:
    assert choices(msgspec.json.decode(msgspec.json.encode({**PLAIN, "n": n}), type=Asked)) == count


@pytest.mark.parametrize(
    ("record", "can"),
    [
        (Provider("p", "llama_cpp"), True),
        (Provider("p", "ollama"), False),
        (Provider("p", "openai", "http://h/v1"), False),
        (Provider("p", "openai", "http://h/v1", options={"continues": "prefill"}), True),
        (Provider("p", "openai", "http://h/v1", options={"continues": "vllm"}), True),
    ],
)
async def test_record_and_provider_agree_on_who_can_continue(record: Provider, can: bool) -> None:
    assert record.can_continue is make_provider(record).can_continue is can


# --- the answer over the seam -------------------------------------------------------------------------------------


def test_an_answer_goes_on_from_what_was_emitted() -> None:
    answer = Answer(RID, 2, 5, emitted="one two", tokens=3)
    assert answer.started and answer.tokens == 3
    first = answer.add(Text(0, " three"))
    assert first is not None and (first.attempt, first.seq, first.data) == (2, 6, " three")
    answer.add(Finish(0, "stop"))
    [choice] = msgspec.json.decode(answer.choices())
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one two three", "stop")


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 500), st.integers(0, 900), st.booleans())
def test_the_prompt_is_billed_once_and_every_token_that_was_shown(
    prompt: int, emitted: int, new: int, cached: int, counted: bool
) -> None:
    answer = Answer(RID, 2, 5, emitted="x", tokens=emitted)
    said = Usage(prompt_tokens=prompt + emitted, completion_tokens=new, cached_tokens=min(cached, prompt + emitted))
    answer.add(Done(said))
    usage = answer.usage(prompt if counted else 0)
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, emitted + new)
    assert usage.cached_tokens <= prompt and usage.estimated


def test_an_attempt_that_could_not_begin_ends_with_what_was_emitted() -> None:
    command = GenerateCommand(1, "b", 2, 1, 0, routed(), after_seq=5, emitted="one two", tokens=3, first_token_ms=40)
    terminal = unable(command, "w", make_error())
    assert terminal.status is Status.FAILED and terminal.last_seq == 5
    assert (terminal.usage.prompt_tokens, terminal.usage.completion_tokens) == (7, 3)
    assert msgspec.json.decode(terminal.choices)[0]["message"]["content"] == "one two"
    fresh = unable(GenerateCommand(1, "b", 1, 1, 0, routed()), "w", make_error())
    assert fresh.usage == Usage(estimated=True) and not fresh.choices and fresh.last_seq == 0


def make_error() -> ProviderError:
    return ProviderError("full")


def test_a_body_asks_for_what_is_left() -> None:
    body = {"max_tokens": 10, "max_completion_tokens": 10, "seed": 1}
    assert remaining(body, 4) == {"max_tokens": 6, "max_completion_tokens": 6, "seed": 1}
    assert remaining({"seed": 1, "max_tokens": None}, 4) == {"seed": 1, "max_tokens": None}
    assert remaining(body, 10) is None


@pytest.mark.parametrize(("stop", "found"), [(None, []), ("x", ["x"]), (["x", "yz"], ["x", "yz"]), (3, []), ([""], [])])
def test_stop_texts_of_a_body(stop: object, found: list[str]) -> None:
    assert stops_of({"stop": stop}) == found


# --- stop texts across the seam -----------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Where the first stop text to be complete begins and ends."""
    ends = [
        (end, max(len(stop) for stop in stops if text[:end].endswith(stop)))
        for end in range(1, len(text) + 1)
        if any(text[:end].endswith(stop) for stop in stops)
    ]
    return (ends[0][0] - ends[0][1], ends[0][0]) if ends else None


def engine(new: str, stops: list[str]) -> list[list[Piece]]:
    """What an engine that sees only `new` gives: a piece a letter up to its own stop text, then its end."""
    own = first_stop(new, stops)
    shown = new if own is None else new[: own[0]]
    letters: list[list[Piece]] = [[Text(0, letter)] for letter in shown]
    return [*letters, [Finish(0, "length" if own is None else "stop"), Done(Usage())]]


@given(
    st.text("ab", max_size=8),
    st.text("ab", max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
@example("xa", "bc", ["abc"])
@example("a", "ab", ["aab", "ba"])
@example("a", "baabaa", ["abaa"])
def test_a_stop_text_across_the_seam_ends_the_answer(emitted: str, new: str, stops: list[str]) -> None:
    if first_stop(emitted, stops) is not None:
        return  # the first engine would have ended there
    seam, shown, reason = Seam(emitted, stops), "", None
    for batch in engine(new, stops):
        for piece in seam.feed(batch):
            assert reason is None or isinstance(piece, Done)
            if isinstance(piece, Text):
                shown += piece.text
            elif isinstance(piece, Finish):
                reason = piece.reason
        if reason is not None:
            break
    whole = first_stop(emitted + new, stops)
    if whole is None:
        assert (shown, reason) == (new, "length")
    elif whole[0] >= len(emitted):
        assert (shown, reason) == (new[: whole[0] - len(emitted)], "stop")
    else:
        own = first_stop(new, stops)
        overlaps = own is not None and own[0] < whole[1] - len(emitted)
        assert reason == "stop" and first_stop(emitted + shown, stops) is None
        assert shown == "" or overlaps, "what was seen of it stays, nothing more comes"


def test_without_a_beginning_in_the_text_nothing_is_held_back() -> None:
    batch: list[Piece] = [Text(0, "b")]
    assert Seam("xx", ["ab"]).feed(batch) is batch
    seam = Seam("xa", ["abc"])
    assert seam.feed([Text(0, "b")]) == []
    assert [piece.text for piece in seam.feed([Text(0, "x"), Text(0, "y")]) if isinstance(piece, Text)] == [*"bxy"]


# --- frames over the seam -----------------------------------------------------------------------------------------


def test_a_stream_goes_on_over_the_fence_and_a_zombie_is_not_heard() -> None:
    fence = delta(0, "", Kind.FENCE, attempt=2)
    written = [
        delta(1, "a"), delta(2, "b"), fence, delta(3, "zombie"), delta(3, "c", attempt=2),
        delta(4, "zombie"), delta(4, "d", attempt=2), delta(5, "zombie", Kind.TERMINAL),
    ]  # fmt: skip
    for seen in range(5):
        view = StreamView(seq=seen)  # as one that resumes after `1:seen` or `2:seen`
        assert "".join(one.data for one in written if view.accept(one)) == "abcd"[seen:]
        assert not view.done
