"""Prices from a moment on, and changes on a condition: pure decisions of the control processor."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest

from headrace.projection import EXISTS, PRECONDITION
from processors.control.decide import Accepted, Refused, decide
from processors.control.pricing import KEPT_MS, MAX_TO_COME
from processors.control.state import ControlState
from schemas.control import ABSENT, API, App, ControlCommand, Model, Price, Provider, Record, digest

NOW = 1_700_000_000_000
DAY = 86_400_000
SMALL = Model(id="small", provider="local", backend_tag="s", price=Price(0, Decimal(1), Decimal(2), Decimal(1)))


def put(kind: str, key: str, record: Record | Price, if_match: str | None = None) -> ControlCommand:
    return ControlCommand("c", kind, key, msgspec.Raw(msgspec.json.encode(record)), if_match=if_match)


def price(output: int, from_ms: int = 0) -> Price:
    return Price(0, Decimal(1), Decimal(output), Decimal(1), effective_from_ms=from_ms)


def take(state: ControlState, command: ControlCommand, now_ms: int = NOW) -> list[str]:
    """Decide and take in; the keys that were written."""
    decision = decide(state, command, now_ms=now_ms)
    assert isinstance(decision, Accepted), decision
    for write in decision.writes:
        state.put(write)
    return [f"{write.kind}/{write.key}" for write in decision.writes]


def refused(state: ControlState, command: ControlCommand, now_ms: int = NOW) -> Refused:
    decision = decide(state, command, now_ms=now_ms)
    assert isinstance(decision, Refused), decision
    return decision


@pytest.fixture
def state() -> ControlState:
    made = ControlState()
    take(made, put("providers", "local", Provider("local", "llama_cpp")), NOW - DAY)
    take(made, put("models", "small", SMALL), NOW - DAY)
    return made


def test_a_price_to_come_waits_in_the_models_record(state: ControlState) -> None:
    start = NOW + DAY
    assert take(state, put("prices", "small", price(5, start))) == ["prices/small/2", "models/small"]
    model = state.models["small"]
    assert [model.price_at(at).output for at in (NOW, start - 1, start, start + DAY)] == [2, 2, 5, 5]
    assert model.price_at(start) == state.prices["small"]
    assert (model.price_at(start).version, model.price_at(start).origin) == (2, API)


def test_a_price_from_now_on_leaves_requests_of_before_theirs(state: ControlState) -> None:
    take(state, put("prices", "small", price(5)))
    model = state.models["small"]
    assert [model.price_at(at).version for at in (NOW - 1, NOW)] == [1, 2]
    take(state, put("models", "small", msgspec.structs.replace(model, max_concurrency=9)), NOW + KEPT_MS)
    assert state.models["small"].prices == (), "nobody waits that long to be routed"
    assert state.models["small"].price.version == 2


def test_the_same_price_again_is_the_same_price(state: ControlState) -> None:
    wanted = put("prices", "small", price(5, NOW + DAY))
    take(state, wanted)
    assert take(state, wanted) == []
    at_once = put("prices", "small", price(6))
    take(state, at_once)
    assert take(state, at_once) == [], "a command that comes twice has the same time"
    assert state.prices["small"].version == 3


def test_a_price_is_not_backdated(state: ControlState) -> None:
    assert "has passed" in refused(state, put("prices", "small", price(5, NOW - DAY))).reason
    take(state, put("prices", "small", price(5, NOW - 1_000)))
    assert state.models["small"].price.effective_from_ms == NOW
    assert "negative" in refused(state, put("prices", "small", price(-5))).reason
    assert refused(state, put("prices", "gone", price(5))).reason == "price: there is no model 'gone'"


def test_prices_to_come_survive_a_change_of_the_model_and_of_its_price(state: ControlState) -> None:
    take(state, put("prices", "small", price(5, NOW + DAY)))
    take(state, put("models", "small", msgspec.structs.replace(SMALL, price=price(3))))
    model = state.models["small"]
    assert [model.price_at(at).output for at in (NOW, NOW + DAY)] == [3, 5]
    assert model.price.version == 3


def test_who_changes_a_model_and_read_it_before_its_price_changed_changes_no_price(state: ControlState) -> None:
    take(state, put("prices", "small", price(5, NOW + DAY)))
    read = state.models["small"]
    later = put("models", "small", msgspec.structs.replace(read, max_concurrency=9))
    assert take(state, later, NOW + DAY) == ["models/small"]
    assert state.models["small"].price.output == 5


def test_a_model_has_so_many_prices_to_come(state: ControlState) -> None:
    for number in range(MAX_TO_COME):
        take(state, put("prices", "small", price(5 + number, NOW + DAY + number)))
    assert "are to come already" in refused(state, put("prices", "small", price(1, NOW + 2 * DAY))).reason


# --- conditions ---------------------------------------------------------------------------------------------------


def test_a_change_of_a_record_that_was_changed_meanwhile_is_refused(state: ControlState) -> None:
    take(state, put("apps", "a", App("a", "A")))
    seen = digest(state.apps["a"])
    second = put("apps", "a", App("a", "Second"), seen)
    assert take(state, second) == ["apps/a"]
    assert take(state, second) == [], "it came twice"
    assert refused(state, put("apps", "a", App("a", "Third"), seen)).code == PRECONDITION
    assert refused(state, ControlCommand("c", "apps", "a", None, if_match=seen)).code == PRECONDITION
    assert take(state, ControlCommand("c", "apps", "a", None, if_match=digest(state.apps["a"]))) == ["apps/a"]
    assert refused(state, put("apps", "a", App("a", "Fourth"), seen)).code == PRECONDITION, "it is gone"


def test_what_must_be_new_is_refused_where_there_is_another(state: ControlState) -> None:
    made = put("apps", "a", App("a", "A"), ABSENT)
    assert take(state, made) == ["apps/a"]
    assert take(state, made) == []
    assert refused(state, put("apps", "a", App("a", "B"), ABSENT)).code == EXISTS
    assert refused(state, put("models", "small", msgspec.structs.replace(SMALL, pool="x"), ABSENT)).code == EXISTS


def test_a_price_too_is_set_on_a_condition(state: ControlState) -> None:
    seen = digest(state.models["small"])
    take(state, put("prices", "small", price(5), seen))
    assert refused(state, put("prices", "small", price(6), seen)).code == PRECONDITION


def test_prices_are_not_deleted(state: ControlState) -> None:
    assert "stay for ever" in refused(state, ControlCommand("c", "prices", "small", None)).reason
