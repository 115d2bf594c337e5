"""What a deciding terminal comes to for those who pay. Pure."""

from __future__ import annotations

from decimal import Decimal

from headrace.limits.amounts import pico
from headrace.limits.limiter import Settled, kept_ms, ref_of
from headrace.limits.months import month_of
from headrace.limits.scopes import APP, KEY, scope_name
from schemas.events import Terminal


def charge(terminal: Terminal, offset: int, at_ms: int) -> Settled:
    """The charge of a terminal at an offset of its partition; `at_ms` is the time of its record."""
    usage, price = terminal.usage, terminal.price
    prompt, cached, completion = usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
    cost = price.cost(prompt, cached, completion) if price is not None else Decimal(0)
    return Settled(
        offset=offset,
        ref=ref_of(terminal.tenant, terminal.request_id),
        tokens=prompt + completion,
        units=pico(cost),
        month=month_of(terminal.timings.accepted_ms or at_ms),
        payers=payers(terminal.key_id, terminal.tenant),
        kept_ms=kept_ms(terminal.request_id),
    )


def payers(key_id: str, tenant: str) -> tuple[str, ...]:
    """The scopes that pay for a request."""
    names = (scope_name(KEY, key_id) if key_id else "", scope_name(APP, tenant) if tenant else "")
    return tuple(name for name in names if name)
