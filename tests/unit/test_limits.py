"""What limits come to without Redis: amounts, months, who is limited, what callers are told, what is used."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from decimal import Decimal

import msgspec
import pytest

from headrace.asked import Asked, read
from headrace.errors import ConcurrencyLimited, InsufficientQuota, RequestsLimited, TokensLimited
from headrace.limits.amounts import MAX_AMOUNT, PICO, TEMPLATE_TOKENS, amount, pico, worst_case
from headrace.limits.charge import charge
from headrace.limits.limiter import KEPT_IDEMPOTENT_MS, KEPT_MS
from headrace.limits.months import month_of, month_start_ms, next_month_ms
from headrace.limits.scopes import Scope, counts_output, scopes_of
from headrace.limits.standing import Used, standing
from headrace.limits.verdict import NEVER, NEXT_MONTH, Refusal, Verdict, Window, headers, refused
from headrace.limits.verdict import read as read_verdict
from schemas.control import App, Key, Model, Price
from schemas.events import Status, Terminal, Timings, Usage
from schemas.ids import idempotent_request_id, new_request_id

PRICE = Price(1, Decimal("1.00"), Decimal("10.00"), Decimal("0.25"))
MODEL = Model(id="m", provider="p", backend_tag="b", context_length=100_000, price=PRICE)


def asked(**fields: object) -> tuple[Asked, int]:
    raw = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}).encode()
    return read(raw), len(raw)


# --- amounts ------------------------------------------------------------------------------------------------------


def test_money_is_exact_to_a_millionth_of_a_millionth() -> None:
    assert pico(Decimal("0.1")) + pico(Decimal("0.2")) == pico(Decimal("0.3"))
    assert pico(Decimal("0.0000000000001")) == 1, "rounded up: never less than it costs"
    assert amount(pico(Decimal("123456789012.000000000001"))) == Decimal("123456789012.000000000001")
    assert pico(Decimal("1e40")) == MAX_AMOUNT


def test_the_unit_fits_the_doubles_of_lua() -> None:
    """Both parts of an amount, and every sum of two, are whole numbers that a double holds."""
    whole = MAX_AMOUNT // PICO
    assert 2 * whole + 1 < 2**53
    assert 2 * (PICO - 1) < 2**53
    chance = random.Random(3)
    for _ in range(1000):
        price = Price(1, Decimal(chance.randrange(10**9)) / 10**6, Decimal(chance.randrange(10**9)) / 10**6, Decimal(0))
        cost = price.cost(chance.randrange(10**6), 0, chance.randrange(10**6))
        assert amount(pico(cost)) == cost, "prices of six decimals cost whole units"


def test_the_worst_case_is_every_byte_of_the_prompt_and_all_of_each_choice() -> None:
    body, size = asked(max_tokens=100, n=3)
    worst = worst_case(body, size, MODEL, 4096)
    prompt = size + TEMPLATE_TOKENS
    assert worst.tokens == prompt + 300
    assert worst.completion == 100
    assert amount(worst.units) == Decimal(prompt) / 10**6 + Decimal(300) * 10 / 10**6


@pytest.mark.parametrize(
    ("fields", "model", "cap", "completion"),
    [
        ({}, {}, 4096, 4096),
        ({}, {"default_max_tokens": 50}, 50, 50),
        ({"max_completion_tokens": 7}, {"default_max_tokens": 50}, 7, 7),
        ({}, {"context_length": 2048}, 0, 2048),
        ({"max_tokens": 9000}, {"context_length": 2048}, 9000, 2048),
    ],
)
def test_what_caps_a_choice(fields: dict[str, object], model: dict[str, int], cap: int, completion: int) -> None:
    body, size = asked(**fields)
    worst = worst_case(body, size, msgspec.structs.replace(MODEL, **model), 4096)
    assert worst.completion == cap
    assert worst.tokens == size + TEMPLATE_TOKENS + completion


def test_a_picture_may_come_to_the_whole_context() -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    body, size = asked(messages=[{"role": "user", "content": [part]}], max_tokens=1)
    assert worst_case(body, size, MODEL, 4096).tokens == 100_001


@pytest.mark.parametrize("count", [0, -1, 10_000, "three", 1.5, None])
def test_a_wrong_number_of_choices_is_for_others_to_refuse(count: object) -> None:
    body, size = asked(n=count, max_tokens=10)
    assert worst_case(body, size, MODEL, 4096).tokens == size + TEMPLATE_TOKENS + 10


def test_cached_tokens_that_cost_more_are_the_worst_case() -> None:
    dear = msgspec.structs.replace(MODEL, price=Price(1, Decimal(1), Decimal(0), Decimal(3)))
    body, size = asked(max_tokens=1)
    assert amount(worst_case(body, size, dear, 1).units) == Decimal(3 * (size + TEMPLATE_TOKENS)) / 10**6


# --- months and charges -------------------------------------------------------------------------------------------


def test_months_are_of_utc() -> None:
    edge = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp() * 1000)
    assert (month_of(edge - 1), month_of(edge)) == ("202602", "202603")
    assert month_start_ms("202603") == edge
    assert next_month_ms("202602") == edge
    assert month_of(next_month_ms("202612")) == "202701"


def test_a_terminal_is_charged_to_the_month_of_its_acceptance() -> None:
    usage = Usage(prompt_tokens=100, completion_tokens=10, cached_tokens=40)
    accepted = next_month_ms("202601") - 1
    ended = Terminal(
        new_request_id(), "acme", 1, 0, Status.CANCELLED, key_id="k1", usage=usage, price=PRICE,
        timings=Timings(accepted_ms=accepted),
    )  # fmt: skip
    found = charge(ended, 7, accepted + 5000)
    assert (found.offset, found.tokens, found.month) == (7, 110, "202601")
    assert found.payers == ("key:k1", "app:acme")
    assert amount(found.units) == Decimal("0.00017")
    assert found.kept_ms == KEPT_MS
    refused_one = Terminal(idempotent_request_id("acme", "x"), "acme", 1, 0, Status.REJECTED)
    assert charge(refused_one, 8, accepted)[2:] == (0, 0, "202601", ("app:acme",), KEPT_IDEMPOTENT_MS)


# --- who is limited -----------------------------------------------------------------------------------------------


def test_only_what_has_a_limit_is_asked_about() -> None:
    key = Key(id="k", sha256="a", name="n", app="acme")
    assert scopes_of(key, App("acme", "Acme"), MODEL) == ()
    found = scopes_of(
        msgspec.structs.replace(key, rate_limit_rpm=0),
        App("acme", "Acme", monthly_budget=Decimal(5)),
        msgspec.structs.replace(MODEL, concurrency_limit=2),
    )
    assert [scope.name for scope in found] == ["key:k", "app:acme", "model:m"]
    assert (found[0].rpm, found[1].budget, found[2].concurrency) == (0, Decimal(5), 2)
    assert scopes_of(None, None, MODEL) == ()


def test_output_needs_a_cap_only_where_it_counts() -> None:
    assert not counts_output([Scope("key", "k", rpm=1), Scope("app", "a", concurrency=1)])
    assert counts_output([Scope("key", "k", rpm=1), Scope("app", "a", tpm=1)])
    assert counts_output([Scope("key", "k", budget=Decimal(1))])


# --- what is told -------------------------------------------------------------------------------------------------


def told(limit: str, retry_us: int, most: str = "5", left: str = "0", scope: str = "key:k1") -> tuple[Verdict, Refusal]:
    refusal = Refusal(limit, scope, most, left, retry_us)
    now = (next_month_ms("202601") - 86_400_000) * 1000
    return Verdict("refused", now, "202601", "", "", 0, refusal, ()), refusal


def test_refusals_say_whose_limit_it_is_and_what_to_do() -> None:
    rate = refused(*told("requests", 1_500_001), 10, 0)
    assert isinstance(rate, RequestsLimited)
    assert (rate.status, rate.code, rate.type, rate.param) == (
        429,
        "rate_limit_exceeded",
        "requests",
        "key.rate_limit_rpm",
    )
    assert rate.retry_after_s == 2
    assert "'k1'" in rate.message
    assert "Try again in 1.501s" in rate.message
    tokens = refused(*told("tokens", NEVER, scope="model:m:x"), 10, 0)
    assert isinstance(tokens, TokensLimited)
    assert (tokens.retry_after_s, tokens.param) == (None, "model.rate_limit_tpm")
    assert "'m:x'" in tokens.message
    assert "ask for fewer tokens" in tokens.message
    assert isinstance(refused(*told("concurrency", 1_000_000), 10, 0), ConcurrencyLimited)


def test_a_spent_budget_waits_for_the_next_month_and_a_reserved_one_for_a_second() -> None:
    spent = refused(*told("budget", NEXT_MONTH, "5 0", "0 250000000000", scope="app:acme"), 10, PICO)
    assert isinstance(spent, InsufficientQuota)
    assert (spent.code, spent.type, spent.param) == ("insufficient_quota", "insufficient_quota", "app.monthly_budget")
    assert (spent.waits, spent.retry_after_s) == (True, 86_400)
    assert "5, has 0.25 left, and the request may cost 1." in spent.message
    held = refused(*told("budget", 1_000_000, "5 0", "0 0"), 10, PICO)
    assert (held.waits, held.retry_after_s) == (False, 1)


def test_headers_are_of_the_scope_that_has_least_left() -> None:
    scopes = [Scope("key", "k", rpm=10, tpm=1000), Scope("app", "a", rpm=8), Scope("model", "m", concurrency=3)]
    windows = [Window(3, 500, 42_000_000), Window(5, 0, 60_000_000), Window(0, 0, 0)]
    assert headers(scopes, windows) == {
        "x-ratelimit-limit-requests": "8",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "42s",
    }
    assert headers(scopes[2:], windows[2:]) == {}


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0, "0s"), (1, "1ms"), (20_000, "20ms"), (6_200_000, "6.2s"), (59_999_001, "1m0s"), (3_723_000_000, "1h2m3s")],
)
def test_spans_are_written_as_openai_writes_them(microseconds: int, text: str) -> None:
    scope = Scope("key", "k", rpm=1)
    assert headers([scope], [Window(0, 0, microseconds)])["x-ratelimit-reset-requests"] == text


def test_a_verdict_reads_back() -> None:
    found = read_verdict([b"admitted", b"5", b"202601", b"p", b"m", 7, b"", b"", b"", b"", b"", 1, b"20", b"30"])
    assert found == Verdict("admitted", 5, "202601", "p", "m", 7, None, (Window(1, 20, 30),))
    assert read_verdict([b"incomplete"]).kind == "incomplete"


def test_standing_compares_use_and_limit() -> None:
    found = standing(Scope("key", "k", rpm=5, budget=Decimal(1)), Used(7, 0, 2, PICO // 4, PICO // 2))
    assert found.rate_limit_rpm.left == 0
    assert found.rate_limit_tpm.left is None
    assert (found.monthly_budget.used, found.monthly_budget.left, found.spent) == tuple(
        map(Decimal, ("0.75", "0.25", "0.25"))
    )
    assert found.concurrency_limit.used == 2
