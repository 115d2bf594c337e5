"""Which prices a model has: in force, to come, and of minutes ago. Pure."""

from __future__ import annotations

import msgspec

from processors.control.checks import check
from schemas.control import API, Model, Price

KEPT_MS = 900_000
"""How long a price that was replaced stays in its model's record: longer than a request may wait to be routed."""
MAX_TO_COME = 100
"""Prices of one model that may wait for their time."""
SLACK_MS = 60_000
"""A price from a moment so little ago is one from now on: clocks differ, and requests take time."""


def priced(model: Model, before: Model | None, newest: Price | None, now_ms: int) -> tuple[Model, Price | None]:
    """A model that is put, with the prices that its record has, and the price that is new with it, if one is.

    `newest` is the one of the highest version that the model ever had. What the sender says of versions and times is
    not believed, but for a price that the record has: whoever changed something else may have read it before another
    one came into force. A model that was put without another price keeps those to come.
    """
    held = _all(before)
    now = before.price_at(now_ms) if before is not None else newest
    read = any(one.version == model.price.version and one.same_amounts(model.price) for one in held)
    if now is not None and (read or now.same_amounts(model.price)):
        made, prices = None, held or [now]
    else:
        made = _made(model.price, newest, now_ms, origin="")
        prices = [*held, made]
    return _with(model, prices, now_ms), made


def scheduled(model: Model, price: Price, newest: Price | None, now_ms: int) -> tuple[Model, Price | None]:
    """A model with a price from `price.effective_from_ms` on (0: now), and that price; None if it has it then anyway.

    Raises `Refusal` for a time that has passed: requests that were accepted since have their price.
    """
    wanted = price.effective_from_ms or now_ms
    check(wanted >= now_ms - SLACK_MS, f"price of {model.id!r}: effective_from has passed; prices are not backdated")
    start_ms = max(wanted, now_ms)
    prices = _all(model)
    if model.price_at(start_ms).same_amounts(price):
        return model, None
    made = _made(price, newest, start_ms, origin=API)
    to_come = sum(held.effective_from_ms > now_ms for held in prices)
    check(to_come < MAX_TO_COME, f"price of {model.id!r}: {to_come} prices are to come already")
    return _with(model, [*prices, made], now_ms), made


def _all(model: Model | None) -> list[Price]:
    return [*model.prices, model.price] if model is not None else []


def _made(price: Price, newest: Price | None, start_ms: int, *, origin: str) -> Price:
    version = newest.version + 1 if newest is not None else 1
    return msgspec.structs.replace(price, version=version, effective_from_ms=start_ms, origin=origin)


def _with(model: Model, prices: list[Price], now_ms: int) -> Model:
    """The model with those of its prices that a request may still have, the one in force first."""
    ordered = sorted(prices, key=lambda price: (price.effective_from_ms, price.version))
    ends = [later.effective_from_ms for later in ordered[1:]]
    past = [
        price
        for price, end_ms in zip(ordered, ends, strict=False)
        if now_ms - KEPT_MS < end_ms <= now_ms and price.effective_from_ms < end_ms
    ]
    begun = [price for price in ordered if price.effective_from_ms <= now_ms]
    to_come = ordered[len(begun) :]
    return msgspec.structs.replace(model, price=begun[-1] if begun else ordered[0], prices=(*past, *to_come))
