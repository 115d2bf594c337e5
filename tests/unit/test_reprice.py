"""A month priced anew, without I/O: which lines change, what counts, and what is refused."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from clickhouse.rows import Unreadable, read
from clickhouse.tables import USAGE
from headrace.reprice import BadPrices, Difference, changes, counting, load_prices, month, repriced
from schemas.control import Price
from schemas.events import PricedBefore
from tests.support.tables import NOW_MS, Record, usage_event

SPAN = month("2026-09")
PRICE = Price(9, Decimal(2), Decimal(4), Decimal(1), "EUR")


def test_a_month_is_the_calendars_in_utc() -> None:
    assert month("2026-12") == (1796083200000, 1798761600000)
    assert SPAN[0] <= NOW_MS < SPAN[1]
    for text in ("2026-13", "2026", "11-2026"):
        with pytest.raises(BadPrices, match="no month"):
            month(text)


def test_a_line_keeps_what_it_cost_in_every_revision_before() -> None:
    line = usage_event(1)
    once = repriced(line, PRICE)
    assert once is not None
    assert (once.revision, once.price_version, once.currency, once.cost) == (1, 9, "EUR", Decimal("0.000038"))
    assert once.repriced_of == [PricedBefore(0, 3, "USD", line.cost)]
    assert repriced(once, PRICE) is None, "a run that is run again changes nothing"
    twice = repriced(once, msgspec.structs.replace(PRICE, version=10))
    assert twice is not None and [before.revision for before in twice.repriced_of] == [0, 1]
    assert msgspec.json.decode(msgspec.json.encode(twice), type=type(twice)) == twice


def test_the_highest_revision_counts_and_of_that_the_first_event() -> None:
    line = usage_event(1)
    one = msgspec.structs.replace(line, revision=1, cost=Decimal(1))
    other = msgspec.structs.replace(line, revision=1, cost=Decimal(2))
    assert counting([line, one, other, line])["u1"] is one


def test_only_lines_of_the_month_and_of_models_with_a_price_change() -> None:
    early = usage_event(2, accepted_ms=SPAN[0] - 1)
    late = usage_event(3, accepted_ms=SPAN[1])
    other = usage_event(4, model="other")
    counted = counting([usage_event(1), early, late, other])
    found = list(changes(counted, {"m": PRICE}, SPAN))
    assert [old.usage_id for old, _ in found] == ["u1"]
    difference = Difference()
    difference.add(*found[0])
    assert (difference.before["USD"], difference.after["EUR"]) == (usage_event(1).cost, Decimal("0.000038"))


def test_a_row_of_a_higher_revision_replaces_every_lower_one() -> None:
    precedence = USAGE.index("precedence")

    def rank(revision: int, offset: int) -> object:
        event = usage_event(1, revision=revision)
        return read(Record("usage.events", offset, msgspec.json.encode(event))).row[precedence]

    ranks = [rank(0, 2**40), rank(0, 0), rank(1, 2**40), rank(1, 5), rank(32767, 0)]
    assert ranks == sorted(ranks, key=lambda value: int(str(value)))
    assert all(0 <= int(str(value)) < 2**64 for value in ranks)
    with pytest.raises(Unreadable, match="revision"):
        rank(32768, 0)


def test_prices_of_a_file_are_exact_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text('[models."m"]\nversion = 9\ninput = "0.1"\noutput = "0.3"\n')
    assert load_prices(file) == {"m": Price(9, Decimal("0.1"), Decimal("0.3"), Decimal("0.1"))}
    for text in ('[models."m"]\nversion = 9\ninput = "-1"\noutput = "0.3"\n', '[models."m"]\ninput = "1"\n', "x = ["):
        file.write_text(text)
        with pytest.raises(BadPrices):
            load_prices(file)
