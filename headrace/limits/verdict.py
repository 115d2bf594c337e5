"""What an admission comes to, as its caller is told: errors and headers in OpenAI's form. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from headrace.errors import (
    ConcurrencyLimited,
    InsufficientQuota,
    LimitExceeded,
    RequestsLimited,
    TokensLimited,
)
from headrace.limits.amounts import PICO, amount
from headrace.limits.months import next_month_ms
from headrace.limits.scopes import Scope

NEVER, NEXT_MONTH = -1, -2
_US = 1_000_000


class Window(NamedTuple):
    """What one scope has used of the last 60 seconds."""

    requests: int
    tokens: int
    reset_us: int
    """Until it is empty."""


class Refusal(NamedTuple):
    """The limit that is in the way for longest."""

    limit: str
    """`requests`, `tokens`, `concurrency` or `budget`."""
    scope: str
    """`key:…`, `app:…` or `model:…`."""
    most: str
    left: str
    retry_us: int
    """Until it would let the request through if nobody else came; `NEVER` or `NEXT_MONTH`."""


class Verdict(NamedTuple):
    """The answer of `lua.ADMIT`."""

    kind: str
    """`admitted`; `held`: it was before, and is not charged again; `known`: it has its terminal; `refused`;
    `incomplete`: Redis must be filled first."""
    now_us: int
    month: str
    state: str
    """Of its reservation, as `headrace.limits.lua` says."""
    model: str
    """The model for which it holds."""
    completion: int
    refusal: Refusal | None
    windows: tuple[Window, ...]
    """One a scope."""


def read(told: Sequence[bytes | str | int]) -> Verdict:
    """A verdict as the script tells it."""
    words = [item.decode() if isinstance(item, bytes) else str(item) for item in told]
    if words == ["incomplete"]:
        return Verdict("incomplete", 0, "", "", "", 0, None, ())
    kind, now, month, state, model, completion = words[:6]
    refusal = Refusal(words[6], words[7], words[8], words[9], int(words[10])) if kind == "refused" else None
    numbers = [int(word) for word in words[11:]]
    windows = tuple(Window(*numbers[at : at + 3]) for at in range(0, len(numbers), 3))
    return Verdict(kind, int(now), month, state, model, int(completion), refusal, windows)


def refused(verdict: Verdict, found: Refusal, tokens: int, units: int) -> LimitExceeded:
    """The error for a refusal of a request that could come to so many tokens, and so much money."""
    kind, _, identity = found.scope.partition(":")
    whose = f"the {kind} {identity!r}"
    param = f"{kind}.{_FIELDS[found.limit]}"
    after_s = max(1, math.ceil(found.retry_us / _US)) if found.retry_us >= 0 else None
    when = f"Try again in {_span(found.retry_us)}" if after_s is not None else ""
    if found.limit == "budget":
        if found.retry_us == NEXT_MONTH:
            after_s = max(1, math.ceil((next_month_ms(verdict.month) * 1000 - verdict.now_us) / _US))
            when = "Ask for fewer tokens, have the budget raised, or wait for the next month (UTC)"
        else:
            when += ", when requests that are running have shown what they cost"
        most, left = _money(found.most), _money(found.left)
        cost = f"{amount(units).normalize():f}"
        message = f"The monthly budget of {whose}, {most}, has {left} left, and the request may cost {cost}. {when}."
        return InsufficientQuota(message, param=param, retry_after_s=after_s, waits=found.retry_us == NEXT_MONTH)
    if found.limit == "concurrency":
        when = when or "It admits none"
        message = f"Limit of requests at once for {whose}: {found.most}, and all are running. {when}, or wait for one."
        return ConcurrencyLimited(message, param=param, retry_after_s=after_s)
    if found.limit == "tokens":
        when = when or "It can never be admitted: shorten it, or ask for fewer tokens"
        message = (
            f"Limit of tokens a minute (TPM) for {whose}: {found.most}, {found.left} left, and the request may come to"
            f" {tokens}. {when}."
        )
        return TokensLimited(message, param=param, retry_after_s=after_s)
    when = when or "It admits none"
    message = f"Limit of requests a minute (RPM) for {whose}: {found.most}, all used. {when}."
    return RequestsLimited(message, param=param, retry_after_s=after_s)


_FIELDS = {
    "requests": "rate_limit_rpm",
    "tokens": "rate_limit_tpm",
    "concurrency": "concurrency_limit",
    "budget": "monthly_budget",
}


def headers(scopes: Sequence[Scope], windows: Sequence[Window]) -> Mapping[str, str]:
    """`x-ratelimit-*` as OpenAI sends them: of the scope that has least left. Empty without a rate limit.

    `reset` is when the limit would be back whole if nobody asked any more, as OpenAI means it; when to try again after
    a refusal is in Retry-After.
    """
    told: dict[str, str] = {}
    pairs = list(zip(scopes, windows, strict=False))
    requests = [(scope.rpm - window.requests, scope.rpm, window) for scope, window in pairs if scope.rpm is not None]
    tokens = [(scope.tpm - window.tokens, scope.tpm, window) for scope, window in pairs if scope.tpm is not None]
    for unit, options in (("requests", requests), ("tokens", tokens)):
        if options:
            left, most, window = min(options)
            told[f"x-ratelimit-limit-{unit}"] = str(most)
            told[f"x-ratelimit-remaining-{unit}"] = str(max(0, left))
            told[f"x-ratelimit-reset-{unit}"] = _span(window.reset_us)
    return told


def _span(microseconds: int) -> str:
    """A duration as OpenAI writes it: `1m0s`, `6.2s`, `20ms`, `0s`."""
    ms = math.ceil(microseconds / 1000)
    if ms <= 0:
        return "0s"
    if ms < 1000:
        return f"{ms}ms"
    hours, rest = divmod(ms, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{seconds}s"


def units_of(text: str) -> int:
    """Units of 10⁻¹² of an amount as Redis holds it, `whole pico`."""
    whole, rest = text.split(" ")
    return int(whole) * PICO + int(rest)


def _money(text: str) -> str:
    return f"{amount(units_of(text)).normalize():f}"
