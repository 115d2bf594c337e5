"""Leases that ended while nobody looked are told as lost, each once, and no other is."""

from __future__ import annotations

import msgspec

from headrace.leases import LeaseBook
from processors.scheduler.orphans import REASON
from processors.scheduler.orphans import ends as ends_of
from processors.scheduler.state import Lease, LeaseState, Pool
from schemas.events import LeaseEvent

TERM = 9


def event(model: str, state: str, at_ms: int = 100, **fields: object) -> LeaseEvent:
    made = LeaseEvent(f"w1:{model}", "p", 4, "w1", model, state, at_ms, epoch=-1, boot="b1", bytes=5, device="d")
    return msgspec.structs.replace(made, **fields)


def book(*events: LeaseEvent) -> LeaseBook:
    made = LeaseBook()
    for offset, found in enumerate(events, start=20):
        made.take(found, offset)
    return made


def ends(found: LeaseBook, pool: Pool, seen_ms: dict[tuple[str, str], int]) -> list[LeaseEvent]:
    return ends_of(found, "p", pool, seen_ms)


def test_what_nobody_holds_ended_when_its_worker_was_last_heard() -> None:
    held = book(event("one", "granted"), event("one", "active", 300, epoch=20))
    [lost] = ends(held, Pool(term=TERM), {("w1", "b1"): 7_000, ("w1", "b2"): 9_000})
    expected = event("one", "lost", 7_000, epoch=20, term=TERM, reason=REASON)
    assert lost == expected


def test_without_a_heartbeat_it_ended_when_it_was_last_told_of() -> None:
    [lost] = ends(book(event("one", "granted", 300)), Pool(term=TERM), {})
    assert (lost.at_ms, lost.epoch) == (300, 20), "a grant's epoch is its own offset"


def test_what_is_held_has_ended_or_is_of_this_term_is_left_alone() -> None:
    pool = Pool(term=TERM)
    pool.leases["w1", "held"] = Lease("w1", "b1", "held", "d", 5, 20, LeaseState.ACTIVE)
    found = book(
        event("held", "granted"),
        event("freed", "granted"), event("freed", "free", epoch=21),
        event("mine", "granted", term=TERM),
        event("elsewhere", "granted", pool="q"),
    )  # fmt: skip
    assert ends(found, pool, {}) == []


def test_a_lease_that_came_again_does_not_hide_the_one_before() -> None:
    pool = Pool(term=TERM)
    pool.leases["w1", "one"] = Lease("w1", "b2", "one", "d", 5, 21, LeaseState.ACTIVE)
    again = [event("one", "granted", boot="b2", term=TERM), event("one", "active", epoch=21, boot="b2", term=TERM)]
    [lost] = ends(book(event("one", "granted"), *again), pool, {})
    assert (lost.epoch, lost.boot) == (20, "b1")


def test_a_late_record_of_an_earlier_scheduler_does_not_count() -> None:
    found = book(event("one", "free", term=6, epoch=5), event("one", "active", term=5, epoch=5))
    assert ends(found, Pool(term=TERM), {}) == []


def test_the_book_forgets_leases_that_ended_before_the_newest_and_their_late_records() -> None:
    found = book(event("one", "granted"), event("one", "free", epoch=20), event("one", "granted"))
    found.take(event("one", "active", term=3, epoch=20), 23)
    assert [held.epoch for held in found.held()] == [22]
