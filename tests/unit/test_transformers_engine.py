"""The parts of the transformers engine that need no PyTorch: what a step computes, and what text may be sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import UnsupportedParameter
from processors.generation.providers import transformers_body
from processors.generation.providers.hf.batching import plan
from processors.generation.providers.hf.text import REPLACEMENT, Detokenizer, Stops
from schemas.control import Model

MODEL = Model(id="m", provider="p", backend_tag="t")


@dataclass
class Counted:
    length: int
    computed: int


# --- what a step computes -----------------------------------------------------------------------------------------


def test_answers_come_first_and_prompts_share_the_rest() -> None:
    long, answer, short = Counted(100, 10), Counted(20, 19), Counted(5, 0)
    spans = [span for _, span in plan([(0, long), (1, answer), (2, short)], budget=50)]
    assert spans == [(1, 19, 1), (0, 10, 49)]
    spans = [span for _, span in plan([(0, long), (1, answer), (2, short)], budget=95)]
    assert spans == [(1, 19, 1), (0, 10, 90), (2, 0, 4)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 16))
def test_every_prompt_is_computed_once_in_order_within_the_budget(prompts: list[int], budget: int) -> None:
    sequences = [(slot, Counted(length, 0)) for slot, length in enumerate(prompts)]
    steps = 0
    while any(one.computed < one.length for _, one in sequences):
        planned = plan([(slot, one) for slot, one in sequences if one.computed < one.length], budget)
        assert sum(span.size for _, span in planned) > 0
        assert sum(span.size for _, span in planned if span.size > 1) <= budget
        for one, span in planned:
            assert span.start == one.computed
            one.computed = span.end
            assert one.computed <= one.length
        steps += 1
    assert steps <= sum(prompts)


def test_many_answers_do_not_starve_a_prompt() -> None:
    answers = [(slot, Counted(9, 8)) for slot in range(8)]
    assert [span for _, span in plan([*answers, (8, Counted(30, 0))], budget=4)][-1] == (8, 0, 1)


# --- text ---------------------------------------------------------------------------------------------------------


def decode(tokens: Sequence[int]) -> str:
    """Tokens that are single bytes: the hardest case."""
    return bytes(tokens).decode("utf-8", "replace")


@given(st.text(max_size=40))
def test_text_comes_in_whole_characters_and_is_complete(text: str) -> None:
    reader = Detokenizer(decode)
    pieces = [reader.add(byte) for byte in text.encode()]
    assert "".join([*pieces, reader.rest()]) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    reader = Detokenizer(decode)
    assert [reader.add(byte) for byte in "a🌊".encode()[:3]] == ["a", "", ""]
    assert reader.rest() == REPLACEMENT


def test_words_that_a_decoder_joins_keep_their_spaces() -> None:
    words = ["the", "wide", "sea"]
    reader = Detokenizer(lambda tokens: " ".join(words[token] for token in tokens))
    assert [reader.add(token) for token in range(3)] == ["the", " wide", " sea"]


@given(st.text("ab", max_size=24), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_text_cuts_wherever_the_pieces_are_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    reader, sent, at = Stops(stops), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, len(text) - at))
        piece, stopped = reader.add(text[at : at + size])
        sent += piece
        at += size
        assert not any(stop in sent for stop in stops)
        if stopped:
            assert any((sent + stop) == text[: len(sent) + len(stop)] for stop in stops)
            return
    assert not any(stop in text for stop in stops)
    assert sent + reader.rest() == text


# --- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tools", "reasoning_effort", "typical_p", "messages"])
def test_what_the_engine_would_ignore_is_refused_by_name(name: str) -> None:
    fields: dict[str, object] = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "reasoning_effort": "high",
        "typical_p": 0.5,
        "messages": [{"role": "user", "content": [{"type": "image_url"}]}],
    }
    with pytest.raises(UnsupportedParameter) as caught:
        transformers_body.prepare(MODEL, {"messages": [], name: fields[name]})
    assert caught.value.param == name


def test_seeds_are_folded_and_caps_have_one_name() -> None:
    prepared = transformers_body.prepare(MODEL, {"messages": [], "seed": -5, "max_completion_tokens": 7, "user": "u"})
    assert prepared == {"messages": [], "seed": 2**32 - 6, "max_tokens": 7}
