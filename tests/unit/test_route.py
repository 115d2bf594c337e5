"""The router's decisions on one record: which model, at whose price, for which key; or a terminal, or a dead letter."""

from __future__ import annotations

import json
from decimal import Decimal

import msgspec
import pytest

from headrace.choice import Choice, Standing
from headrace.errors import Unavailable
from headrace.registry import Snapshot, snapshot_of
from headrace.senders import Sent
from processors.router.route import MAX_AGE_MS, Request, Unreadable, decode, route, routed
from schemas.control import App, Key, Model, Price
from schemas.events import INLINE_BODY_BYTES, BodyRef, Status, Terminal
from topics.catalogue import REPLIES
from topics.envelope import Envelope

DEAR = Price(3, input=Decimal(9), output=Decimal(9), cached=Decimal(9))
MODELS = [
    Model("a", "p", "t", aliases=("nick",), fallbacks=("b",), default_max_tokens=7),
    Model("b", "q", "t", price=DEAR, pool="gpu"),
]
KEY = Key("k", "0" * 64, "k", "t")
NOW = 1_000_000


def snapshot() -> Snapshot:
    return snapshot_of([msgspec.json.encode(model) for model in MODELS], [], [msgspec.json.encode(App("t", "T"))], 1)


def request(
    model: str = "a",
    *,
    accepted_ms: int = NOW,
    priority: str = "standard",
    start_within_s: float | None = None,
    **fields: object,
) -> Request:
    envelope = Envelope(
        request_id="0" * 32, source="/t", time_ms=0, tenant="t", key_id="k", reply_partition=3, digest="d",
        deadline_s=60, priority=priority, start_within_s=start_within_s,
    )  # fmt: skip
    raw = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    return decode(Sent(envelope, None), raw, partition=4, offset=5, accepted_ms=accepted_ms)


def decided(
    asked: Request, *, key: Key | None = KEY, down: tuple[str, ...] = (), now_ms: int = NOW
) -> Choice | Terminal:
    away = Unavailable("away")
    return route(
        asked, now_ms=now_ms, snapshot=snapshot(), key=key,
        standing_of=lambda model: Standing(down=away if model.id in down else None),
    )  # fmt: skip


def test_the_model_that_serves_gives_pool_and_price_and_the_caller_its_alias() -> None:
    asked = request("nick", priority="batch", stream=True)
    for down, model in (((), MODELS[0]), (("a",), MODELS[1])):
        found = decided(asked, down=down)
        assert isinstance(found, Choice) and found.model == model
        record = routed(asked, found.model, NOW)
        assert (record.model, record.pool, record.price) == (model.id, model.pool, model.price)
        assert (record.alias, record.priority, record.stream) == ("nick", "batch", True)
        assert (record.ref, record.deadline_ms) == (BodyRef(4, 5), NOW + 60_000)
        assert record.max_tokens == model.default_max_tokens


def test_a_large_body_is_left_where_it_is() -> None:
    small, large = request(), request(user="x" * INLINE_BODY_BYTES)
    assert bytes(routed(small, MODELS[0], NOW).body) == small.value
    assert not routed(large, MODELS[0], NOW).body


@pytest.mark.parametrize("key", [None, msgspec.structs.replace(KEY, app="other")], ids=["unknown", "of another tenant"])
def test_a_key_that_does_not_count_has_no_choice_and_no_fallback(key: Key | None) -> None:
    refused = decided(request("auto"), key=key)
    assert isinstance(refused, Terminal) and refused.error is not None
    assert (refused.status, refused.error.code, refused.alias) == (Status.REJECTED, "model_not_found", "auto")
    named = decided(request("a"), key=key, down=("a",))
    assert isinstance(named, Choice) and named.model.id == "a", "what it named is still its own"
    assert isinstance(decided(request("auto")), Choice)


def test_what_was_accepted_under_a_key_that_was_revoked_since_is_refused() -> None:
    refused = decided(request("a"), key=msgspec.structs.replace(KEY, enabled=False))
    assert isinstance(refused, Terminal) and refused.error is not None
    assert (refused.status, refused.error.code) == (Status.REJECTED, "invalid_api_key")
    gone = decided(request("a"), key=msgspec.structs.replace(KEY, expires_at=1.0))
    assert isinstance(gone, Choice), "it was accepted before the key expired"


def test_the_price_is_that_of_the_moment_of_acceptance() -> None:
    later = msgspec.structs.replace(DEAR, version=4, effective_from_ms=NOW)
    model = msgspec.structs.replace(MODELS[1], prices=(later,))
    stamped = [routed(request("b", accepted_ms=at), model, NOW + 9).price for at in (NOW - 1, NOW)]
    assert [price.version for price in stamped if price is not None] == [3, 4]


def test_what_is_too_old_expires_before_anything_is_chosen() -> None:
    for asked, late_ms in ((request(), 60_000), (request("no-such"), 60_000)):
        ended = decided(asked, now_ms=NOW + late_ms + 1)
        assert isinstance(ended, Terminal) and ended.status is Status.EXPIRED
    patient = Request(msgspec.structs.replace(request().envelope, deadline_s=3_600), *request()[1:])
    assert isinstance(decided(patient, now_ms=NOW + MAX_AGE_MS), Choice)
    ended = decided(patient, now_ms=NOW + MAX_AGE_MS + 1)
    assert isinstance(ended, Terminal) and ended.status is Status.EXPIRED


def test_what_need_not_begin_any_more_is_not_routed_and_its_deadline_stays() -> None:
    for within_s, until_ms, start_by_ms in ((5.0, 5_000, NOW + 5_000), (None, 60_000, 0), (90.0, 60_000, NOW + 60_000)):
        asked = request(start_within_s=within_s)
        found = decided(asked, now_ms=NOW + until_ms)
        assert isinstance(found, Choice)
        record = routed(asked, found.model, NOW)
        assert (record.start_by_ms, record.deadline_ms) == (start_by_ms, NOW + 60_000)
        ended = decided(asked, now_ms=NOW + until_ms + 1)
        assert isinstance(ended, Terminal) and ended.status is Status.EXPIRED


def test_whether_the_key_must_be_known() -> None:
    assert [request(name).may_lead_elsewhere(snapshot()) for name in ("a", "nick", "auto", "b", "none")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_what_cannot_be_read_is_a_dead_letter_with_its_envelope_if_that_can() -> None:
    envelope = request().envelope
    with pytest.raises(Unreadable) as bad:
        decode(Sent(envelope, None), b"{", partition=0, offset=0, accepted_ms=0)
    assert bad.value.envelope == envelope
    elsewhere = msgspec.structs.replace(envelope, reply_partition=REPLIES.partitions)
    with pytest.raises(Unreadable) as bad:
        decode(Sent(elsewhere, None), request().value, partition=0, offset=0, accepted_ms=0)
    assert bad.value.envelope is None
