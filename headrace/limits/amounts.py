"""What a request may come to at most, in tokens and money, before it runs. Pure.

Money is counted in whole units of 10⁻¹² of the currency (`PICO`), as an integer. Prices are for a million tokens, so
that one with up to six decimals costs a whole number of them a token; finer ones are rounded up, once a request.
Redis computes in doubles, exact for integers up to 2⁵³: amounts travel as (whole, pico) with pico below 10¹², so that
no sum of two leaves that range.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal
from typing import NamedTuple

import msgspec

from headrace.asked import Asked
from schemas.control import Model, Price

PICO = 10**12
MAX_AMOUNT = 10**15 * PICO
"""Amounts above it are counted as this one: a million times a million prices of 1,000 for a million tokens."""
TEMPLATE_TOKENS = 256
"""What a chat template adds beyond what the JSON of the messages is longer than their text."""
MAX_CHOICES = 128

_EXACT = Context(prec=60)
_choices = msgspec.json.Decoder(int)


def pico(amount: Decimal) -> int:
    """An amount of money in units of 10⁻¹², rounded up."""
    units = _EXACT.multiply(amount, Decimal(PICO)).to_integral_value(ROUND_CEILING)
    return min(int(units), MAX_AMOUNT)


def amount(units: int) -> Decimal:
    """The amount of money that so many units of 10⁻¹² are."""
    return _EXACT.divide(Decimal(units), Decimal(PICO))


class Worst(NamedTuple):
    """The most that a request may come to."""

    tokens: int
    """Of the prompt and all choices together."""
    units: int
    """Money, in units of 10⁻¹²."""
    completion: int
    """Cap on one choice that makes the rest true; 0 where only the model's context bounds it."""


def choices(asked: Asked) -> int:
    """How many choices a body asks for; 1 where what it says is for others to refuse."""
    try:
        count = _choices.decode(asked.n) if bytes(asked.n) else 1
    except msgspec.MsgspecError:
        return 1
    return count if 1 <= count <= MAX_CHOICES else 1


AHEAD_MS = 60_000
"""Longest time from the reservation of a request to its acceptance, and by how much clocks may differ."""


def worst_case(asked: Asked, body_bytes: int, model: Model, default_output: int, *, at_ms: int = 0) -> Worst:
    """The most that a request may come to on a model; `default_output` caps a choice that names no cap.

    The price is the dearest that it may have: it is accepted at `at_ms` (Unix ms) or within `AHEAD_MS` of it.

    No tokenizer makes more tokens of a text than it has bytes, and a body is longer than its texts by more than a
    template adds to them. What a picture comes to is not known; nothing is longer than the model's context. A default
    cap that would fill what is left of the context is not used: some engines refuse what might not fit.
    """
    context = model.context_length
    prompt = min(body_bytes + TEMPLATE_TOKENS, context)
    if b'"image' in bytes(asked.messages):
        prompt = context
    cap = asked.limit or model.default_max_tokens or 0
    if not cap and 2 * default_output <= context - asked.prompt_tokens:
        cap = default_output
    count = choices(asked)
    completion = min(cap or context, context) * count
    soon = (price for price in model.prices if at_ms < price.effective_from_ms <= at_ms + AHEAD_MS)
    possible = [model.price_at(at_ms), *soon]
    dearest = max(max(price.input, price.cached) for price in possible)
    price = Price(0, dearest, max(price.output for price in possible), dearest)
    return Worst(prompt + completion, pico(price.cost(prompt, 0, completion)), cap)
