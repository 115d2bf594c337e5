"""The yardstick of fairness measures what it says: only while both wait, and in any interval."""

from __future__ import annotations

from dataclasses import replace

from tests.support.fairness import Served, bound, widest


def work(tenant: str, came: int, began: int, ended: int, completion: int = 10) -> Served:
    return Served(tenant, came, began, ended, prompt=5, completion=completion)


def test_service_while_nobody_else_waits_is_no_unfairness() -> None:
    alone = [work("f", at, at + 1, at + 2) for at in range(0, 100, 10)]
    assert widest(alone) == 0
    assert widest([*alone, work("g", 200, 201, 202)]) == 0


def test_one_who_is_passed_over_while_he_waits_is_seen() -> None:
    passed = [work("f", 0, at, at + 1) for at in range(10, 60, 10)]
    waits = work("g", 0, 100, 101)
    assert widest([*passed, waits]) == 4 * 25 + 5, "until the last of the others is dispatched, nobody of them waits"
    assert widest([*passed, waits]) > bound([*passed, waits], slots=1)


def test_what_is_more_urgent_goes_first_and_is_no_unfairness() -> None:
    urgent = [work("f", 0, at, at + 1) for at in range(10, 60, 10)]
    waits = work("g", 0, 100, 101)
    assert widest([*urgent, replace(waits, lane=1)]) == 0
    assert widest([*(replace(one, lane=1) for one in urgent), replace(waits, lane=1)]) == 4 * 25 + 5


def test_taking_turns_is_within_the_bound() -> None:
    turns = [work("fg"[at % 2], 0, at * 10, at * 10 + 9) for at in range(1, 20)]
    assert 0 < widest(turns) <= bound(turns, slots=1)
