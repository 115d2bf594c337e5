"""Whose ingress is gone, and for how long a request outlives it."""

from __future__ import annotations

from processors.scheduler.abandoned import GONE_MS, GRACE_S, Ingresses
from schemas.events import BodyRef, IngressStatus, Routed

GRACE_MS = GRACE_S * 1000


def asked(ingress: str, resume_s: int = 0) -> Routed:
    return Routed("1" * 32, "t", "k", "m", "m", "default", 0, BodyRef(0, 0), ingress=ingress, resume_s=resume_s)


def heard(*names: str, at_ms: int = 0, since: Ingresses | None = None) -> Ingresses:
    known = since or Ingresses()
    for name in names:
        instance, _, boot = name.partition("/")
        known.heard(IngressStatus(instance, boot, at_ms))
    return known


def test_what_an_ingress_that_is_there_was_asked_for_goes_on() -> None:
    known = heard("one/a", "two/b")
    assert known.abandoned([asked("one/a"), asked("two/b"), asked("")], GONE_MS - 1) == []


def test_an_ingress_of_an_earlier_version_is_not_missed() -> None:
    known, held = heard("one/a"), [asked("two")]
    assert known.abandoned(held, 0) == []
    heard("one/a", at_ms=GRACE_MS, since=known)
    assert known.abandoned(held, GRACE_MS) == []


def test_a_request_outlives_its_ingress_by_its_grace() -> None:
    known, held = heard("one/a", "two/b"), [asked("one/a"), asked("one/a", resume_s=3), asked("two/b")]
    heard("two/b", at_ms=GONE_MS, since=known)
    assert known.abandoned(held, GONE_MS) == []
    heard("two/b", at_ms=GONE_MS + 3_000, since=known)
    assert known.abandoned(held, GONE_MS + 3_000) == [held[1]], "as long as its caller said"
    heard("two/b", at_ms=GONE_MS + GRACE_MS, since=known)
    assert known.abandoned(held, GONE_MS + GRACE_MS) == held[:2]


def test_a_process_that_took_the_place_of_another_does_not_answer_for_it() -> None:
    known, held = heard("one/a"), [asked("one/a")]
    heard("one/b", at_ms=2_000, since=known)
    assert known.abandoned(held, 2_000) == []
    heard("one/b", at_ms=2_000 + GRACE_MS, since=known)
    assert known.abandoned(held, 2_000 + GRACE_MS) == held


def test_one_that_was_only_not_heard_begins_anew() -> None:
    known, held = heard("one/a", "two/b"), [asked("one/a")]
    heard("two/b", at_ms=GONE_MS, since=known)
    assert known.abandoned(held, GONE_MS) == []
    heard("one/a", "two/b", at_ms=GRACE_MS, since=known)
    assert known.abandoned(held, GRACE_MS) == []
    heard("two/b", at_ms=GRACE_MS + GONE_MS, since=known)
    assert known.abandoned(held, GRACE_MS + GONE_MS) == [], "its grace begins when it is gone again"


def test_who_hears_nobody_ends_nothing() -> None:
    known, held = heard("one/a"), [asked("one/a")]
    assert known.abandoned(held, 10 * GRACE_MS) == []
    assert Ingresses().abandoned(held, 10 * GRACE_MS) == []
