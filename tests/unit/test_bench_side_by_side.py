"""The side-by-side benchmark's pure parts: the workload, what a caller reads, and how requests are told apart."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from bench.side_by_side.client import Seen, take
from bench.side_by_side.figures import Machine, Outcome, outcome, summarise
from bench.side_by_side.watch import is_engine
from bench.side_by_side.weights import renamed
from bench.side_by_side.workload import CONTEXT, GREEDY, MODELS, QUIET, TENANTS, body_of, generate
from tests.support.gguf_files import gguf

WHOLE = Seen(status=200, first_s=0.5, end_s=1.0, finish="stop", done=True, prompt_tokens=100, completion_tokens=7)


def test_the_same_seed_gives_the_same_requests() -> None:
    asks = generate(1, 60.0)
    assert asks == generate(1, 60.0) != generate(2, 60.0)
    assert [ask.at_s for ask in asks] == sorted(ask.at_s for ask in asks)
    assert {ask.model for ask in asks} == set(MODELS) and {ask.tenant for ask in asks} == set(TENANTS)
    counts = Counter(ask.tenant for ask in asks)
    assert counts[GREEDY] > counts[QUIET] and len({ask.prompt for ask in asks}) == len(asks)
    assert any(ask.leaves_s for ask in asks) and not all(ask.leaves_s for ask in asks)
    assert body_of(asks[0])["messages"] == asks[0].messages()


def test_a_stream_is_noted_line_by_line() -> None:
    seen = Seen()
    for at, line in enumerate(
        (
            'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}',
            "",
            ": a comment",
            'data: {"choices":[{"delta":{"content":"Hi"}}]}',
            'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}',
            'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}}',
            "data: [DONE]",
        )
    ):
        take(seen, line, float(at))
    assert (seen.first_s, seen.finish, seen.done) == (3.0, "stop", True)
    assert (seen.prompt_tokens, seen.completion_tokens) == (9, 4)
    take(seen, 'data: {"error":{"message":"no","code":"context_length_exceeded"}}', 9.0)
    assert "context_length_exceeded" in seen.error


@pytest.mark.parametrize(
    ("changes", "prompt", "expected"),
    [
        ({}, 100, Outcome.ANSWERED),
        ({"prompt_tokens": 96}, 100, Outcome.ANSWERED),
        ({"prompt_tokens": 94}, 100, Outcome.TRUNCATED),
        ({"prompt_tokens": None}, 100, Outcome.ANSWERED),
        ({"finish": ""}, 100, Outcome.CUT),
        ({"done": False}, 100, Outcome.CUT),
        ({"left": True, "finish": ""}, 100, Outcome.LEFT),
        ({"broken": "ReadTimeout()"}, 100, Outcome.FAILED),
        ({"status": 0, "finish": ""}, 100, Outcome.FAILED),
        ({"status": 400, "error": "exceeds the context"}, CONTEXT, Outcome.REFUSED_LONG),
        ({"status": 400, "error": "exceeds the context"}, CONTEXT - 1, Outcome.REFUSED),
        ({"status": 503, "error": "busy"}, CONTEXT, Outcome.REFUSED),
    ],
)
def test_requests_are_told_apart(changes: dict[str, object], prompt: int, expected: Outcome) -> None:
    assert outcome(msgspec.structs.replace(WHOLE, **changes), prompt) is expected


def test_figures_are_those_of_each_tenant() -> None:
    asks = generate(1, 20.0)
    saw = [msgspec.structs.replace(WHOLE, first_s=2.0 if ask.tenant == GREEDY else 1.0) for ask in asks]
    saw[0] = msgspec.structs.replace(saw[0], prompt_tokens=50)
    machine = Machine(loads=3, engines_peak=1, all_peak=2)
    found = summarise("x", asks, [100] * len(asks), saw, machine)
    assert found.outcomes["answered"] == len(asks) - 1 and found.outcomes["silently truncated"] == 1
    first = {tenant.tenant: tenant.first.p50 for tenant in found.tenants}
    assert first[GREEDY] == 2000 and {first[name] for name in TENANTS if name != GREEDY} == {1000}
    assert sum(tenant.tokens for tenant in found.tenants) == 7 * len(asks)


def test_a_copy_differs_in_its_name_alone() -> None:
    data = gguf({"general.architecture": "llama", "general.name": "Some Model"}, {})
    copy = renamed(data, "ash")
    assert copy == data.replace(b"Some Model", b"ash       ") and len(copy) == len(data)
    assert len(renamed(data, "a name that is too long")) == len(data)


def test_engines_are_known_by_their_command_line() -> None:
    assert is_engine(["/usr/bin/ollama", "runner", "--model", "x"])
    assert is_engine(["python", "-m", "processors.generation.providers.llama_child"])
    assert not is_engine(["/usr/bin/ollama", "serve"])
