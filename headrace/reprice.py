"""Prices a month of usage anew: a new revision of each line, never a changed one.

What is read and written is `usage.events`: of the events of one usage id the highest revision counts. So a run that
died is run again, two runs that meet are one of them, and what was billed before stays in the event that replaces it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import msgspec
import structlog
from aiokafka import TopicPartition

from headrace import audit
from headrace.settings import Settings
from schemas.control import ControlCommand, Price
from schemas.events import PricedBefore, UsageEvent
from topics.catalogue import USAGE
from topics.clients import LogReader, Producer

log = structlog.get_logger(__name__)

CLOCK_SKEW_MS = 60_000
WRITES_AT_ONCE = 500
_usage = msgspec.json.Decoder(UsageEvent)


class BadPrices(ValueError):
    """The month or the prices cannot be used; the message says what would be right."""


class NewPrice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A price as a file gives it: decimal strings for a million tokens."""

    version: int
    input: Decimal
    output: Decimal
    cached: Decimal | None = None
    """None for that of `input`."""
    currency: str = "USD"

    def price(self) -> Price:
        """The price. Raises `BadPrices` when a number is negative or none."""
        numbers = (self.input, self.output, self.cached if self.cached is not None else self.input)
        if self.version < 0 or not self.currency or not all(n.is_finite() and n >= 0 for n in numbers):
            raise BadPrices("a price needs a version of at least 0, a currency, and numbers that are not negative")
        return Price(self.version, numbers[0], numbers[1], numbers[2], self.currency)


def load_prices(path: Path) -> dict[str, Price]:
    """Prices by model, of a TOML or JSON file: `[models."id"]` with the fields of `NewPrice`. Raises `BadPrices`."""
    decode = msgspec.json.decode if path.suffix == ".json" else msgspec.toml.decode
    try:
        found = decode(path.read_bytes(), type=dict[str, dict[str, NewPrice]])
    except (msgspec.MsgspecError, OSError, ValueError) as error:
        raise BadPrices(f"{path}: {error}") from None
    if set(found) != {"models"} or not found["models"]:
        raise BadPrices(f'{path}: expected tables named [models."<id>"]')
    return {model: price.price() for model, price in found["models"].items()}


def month(text: str) -> tuple[int, int]:
    """Begin and end of a month `YYYY-MM` in UTC, Unix ms. Raises `BadPrices`."""
    try:
        begin = datetime.strptime(text, "%Y-%m").replace(tzinfo=UTC)
    except ValueError:
        raise BadPrices(f"{text!r} is no month of the form 2026-11") from None
    end = begin.replace(year=begin.year + begin.month // 12, month=begin.month % 12 + 1)
    return int(begin.timestamp() * 1000), int(end.timestamp() * 1000)


def repriced(event: UsageEvent, price: Price) -> UsageEvent | None:
    """The next revision of a line at a price; None where neither version, currency nor cost would change."""
    cost = price.cost(event.prompt_tokens, event.cached_tokens, event.completion_tokens)
    if (price.version, price.currency, cost) == (event.price_version, event.currency, event.cost):
        return None
    before = PricedBefore(event.revision, event.price_version, event.currency, event.cost)
    return msgspec.structs.replace(
        event,
        revision=event.revision + 1,
        price_version=price.version,
        currency=price.currency,
        cost=cost,
        repriced_of=[*event.repriced_of, before],
    )


def counting(events: Iterable[UsageEvent]) -> dict[str, UsageEvent]:
    """Of each usage id the event that counts; events come in the order of their offsets."""
    best: dict[str, UsageEvent] = {}
    for event in events:
        known = best.get(event.usage_id)
        if known is None or event.revision > known.revision:
            best[event.usage_id] = event
    return best


@dataclass(slots=True)
class Difference:
    """What pricing anew changes for one tenant."""

    lines: int = 0
    before: dict[str, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    """Cost by currency, of the lines that change."""
    after: dict[str, Decimal] = field(default_factory=lambda: defaultdict(Decimal))

    def add(self, old: UsageEvent, new: UsageEvent) -> None:
        """Count a line."""
        self.lines += 1
        self.before[old.currency] += old.cost
        self.after[new.currency] += new.cost


def changes(
    counted: Mapping[str, UsageEvent], prices: Mapping[str, Price], span: tuple[int, int]
) -> Iterator[tuple[UsageEvent, UsageEvent]]:
    """(line, its next revision) of those that were accepted in the span and whose model has a new price."""
    for event in counted.values():
        price = prices.get(event.model)
        if price is not None and span[0] <= event.accepted_ms < span[1]:
            new = repriced(event, price)
            if new is not None:
                yield event, new


async def reprice(
    conf: Settings, span: tuple[int, int], prices: Mapping[str, Price], *, write: bool, actor: str, reason: str = ""
) -> dict[str, Difference]:
    """What changes, by tenant; with `write` the new revisions are durable when this returns, and in the audit trail.

    Raises `KafkaError`, and `Unavailable` when it cannot be written into the trail.
    """
    found: dict[str, Difference] = defaultdict(Difference)
    async with LogReader(conf.kafka, "reprice", max_wait_ms=100) as reader, Producer(conf.kafka, "reprice") as producer:
        if write:
            await audit.record(producer, _note(span, prices, actor, reason))
        # A partition at a time, which bounds what is in memory: usage ids of one tenant lie on one.
        for partition in reader.assign([USAGE]):
            counted = counting([event async for event in _events(reader, partition, span[0])])
            waits = []
            for old, new in changes(counted, prices, span):
                found[new.tenant].add(old, new)
                if write:
                    waits.append(await producer.post(USAGE.name, msgspec.json.encode(new), key=new.tenant))
                if len(waits) >= WRITES_AT_ONCE:
                    await asyncio.gather(*waits)
                    waits.clear()
            await asyncio.gather(*waits)
    return dict(sorted(found.items()))


def _note(span: tuple[int, int], prices: Mapping[str, Price], actor: str, reason: str) -> ControlCommand:
    of = datetime.fromtimestamp(span[0] / 1000, UTC).strftime("%Y-%m")
    detail = {
        f"model {model}": f"v{one.version}: {one.input} in, {one.cached} cached, {one.output} out, {one.currency}"
        for model, one in prices.items()
    }
    return audit.note("reprice", "usage", of, actor=actor, reason=reason, **detail)


async def _events(reader: LogReader, partition: TopicPartition, since_ms: int) -> AsyncIterator[UsageEvent]:
    """The usage of a partition from shortly before a moment on: a line is written after its request was accepted."""
    await reader.seek_to_time([partition], since_ms - CLOCK_SKEW_MS)
    async for record in reader.read_to_end([partition]):
        try:
            yield _usage.decode(record.value or b"")
        except msgspec.MsgspecError as error:
            log.warning("reprice_unreadable", topic=USAGE.name, offset=record.offset, error=str(error))
