"""A library that repeats itself is heard once in a while, with a count, and others beside it are heard at once."""

from __future__ import annotations

import logging

from headrace.logs import Repeats


def _record(text: str, name: str = "aiokafka.client") -> logging.LogRecord:
    return logging.LogRecord(name, logging.ERROR, __file__, 1, text, None, None)


def test_repeats_are_held_back_and_counted() -> None:
    now = 0.0
    repeats = Repeats(every_s=5.0, clock=lambda: now)
    assert repeats.filter(_record("Unable connect"))
    for _ in range(7):
        now += 0.5
        assert not repeats.filter(_record("Unable connect"))
    now = 5.0
    again = _record("Unable connect")
    assert repeats.filter(again)
    assert again.getMessage() == "Unable connect (and 7 times more since)"


def test_other_messages_pass_at_once() -> None:
    repeats = Repeats(every_s=5.0, clock=lambda: 0.0)
    assert repeats.filter(_record("one"))
    assert repeats.filter(_record("two"))
    assert repeats.filter(_record("one", name="faust.app"))


def test_what_is_remembered_is_bounded() -> None:
    repeats = Repeats(every_s=5.0, clock=lambda: 0.0)
    for number in range(5000):
        assert repeats.filter(_record(f"message {number}"))
    assert len(repeats._seen) <= 1001
