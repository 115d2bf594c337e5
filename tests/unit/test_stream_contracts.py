"""What every reader of the stream agrees on: the log's rule, the frames' rule, the envelope and the ids. Pure."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingress.streams import merged
from schemas.events import AttemptOpened, LogRecord, Status, Terminal
from schemas.ids import (
    PublicId,
    created_ms,
    idempotent_request_id,
    is_idempotent,
    new_request_id,
    normalise_request_id,
    usage_id,
)
from topics import envelope, frames
from topics.envelope import Envelope, EnvelopeError
from topics.frames import Delta, Kind, StreamView
from topics.request_log import LogView, deciding_terminal

RID = bytes(range(16))


def opened(attempt: int) -> AttemptOpened:
    return AttemptOpened("r", "t", attempt, 1, "w", "lost", 0)


def ended(attempt: int, status: Status = Status.COMPLETED) -> Terminal:
    return Terminal("r", "t", attempt, 1, status)


def text(seq: int, data: str = "x", *, attempt: int = 1, index: int = 0, kind: Kind = Kind.TEXT) -> Delta:
    return Delta(RID, attempt, seq, kind, index, data, 1)


# --- the request log ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "decides"),
    [
        ([ended(1)], 0),
        ([ended(1), ended(1, Status.FAILED)], 0),
        ([opened(2), ended(1), ended(2)], 2),
        ([ended(1), opened(2), ended(2)], 0),
        ([opened(2), opened(3), ended(2), ended(3)], 3),
        ([opened(3), opened(2), ended(2), ended(3)], 3),
        ([opened(2), ended(3)], 1),
        ([opened(2), ended(1)], None),
        ([], None),
    ],
)
def test_the_first_terminal_that_no_higher_attempt_precedes_decides(
    records: list[LogRecord], decides: int | None
) -> None:
    assert deciding_terminal(records) is (None if decides is None else records[decides])


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=12))
def test_one_terminal_decides_at_most_and_a_later_reader_agrees(steps: list[tuple[bool, int]]) -> None:
    records = [opened(attempt) if opening else ended(attempt) for opening, attempt in steps]
    view = LogView()
    decided = [found for record in records if (found := view.apply(record)) is not None]
    assert len(decided) <= 1
    assert deciding_terminal(records) is (decided[0] if decided else None)
    assert view.decided("r") is bool(decided)


def test_what_is_forgotten_may_decide_again() -> None:
    view = LogView()
    assert view.ended("r", 1) and not view.ended("r", 1)
    view.forget("r")
    assert view.ended("r", 1)


# --- frames -------------------------------------------------------------------------------------------------------


def test_a_view_drops_repeats_and_what_a_fence_voids() -> None:
    view = StreamView()
    fence = text(0, attempt=2, kind=Kind.FENCE)
    deltas = [text(1), text(2), text(2), fence, text(3), text(3, attempt=2), text(4, attempt=2)]
    assert [(d.attempt, d.seq) for d in deltas if view.accept(d)] == [(1, 1), (1, 2), (2, 3), (2, 4)]


def test_nothing_counts_after_the_end() -> None:
    view = StreamView()
    assert view.accept(text(1, kind=Kind.TERMINAL)) and view.done
    assert not view.accept(text(2))


def test_a_view_that_resumes_skips_what_was_seen() -> None:
    view = StreamView(seq=5)
    assert [view.accept(text(seq)) for seq in (4, 5, 6)] == [False, False, True]


def test_frames_read_back_as_they_were_written() -> None:
    deltas = [text(1, "é😀"), text(2, kind=Kind.FINISH), text(3, '[{"a":1}]', kind=Kind.CHOICES)]
    assert frames.decode(frames.encode(deltas)) == deltas


@given(
    st.lists(
        st.tuples(st.sampled_from([Kind.TEXT, Kind.CHOICES, Kind.FINISH]), st.integers(0, 1), st.integers(1, 2)),
        max_size=30,
    )
)
def test_merging_keeps_texts_tokens_order_and_the_last_seq(shape: list[tuple[Kind, int, int]]) -> None:
    deltas = [
        text(seq, f"<{seq}>", attempt=attempt, index=index, kind=kind)
        for seq, (kind, index, attempt) in enumerate(shape, start=1)
    ]
    joined = merged(deltas)
    assert sum(delta.tokens for delta in joined) == len(deltas)
    assert "".join(delta.data for delta in joined) == "".join(delta.data for delta in deltas)
    assert [delta.seq for delta in joined] == sorted(delta.seq for delta in joined)
    assert [d for d in joined if d.kind != Kind.TEXT] == [d for d in deltas if d.kind != Kind.TEXT]
    assert (joined[-1].seq if joined else 0) == len(deltas)
    for one, following in pairwise(joined):
        alike = (one.kind, one.index, one.attempt) == (following.kind, following.index, following.attempt)
        assert not (alike and one.kind == Kind.TEXT), "neighbours that could be joined were not"


# --- the envelope -------------------------------------------------------------------------------------------------

FULL = Envelope(
    request_id="0" * 31 + "a", source="/s", time_ms=1_700_000_000_123, tenant="mandant-ü", key_id="k",
    reply_partition=3, digest="d" * 64, deadline_s=12.5, resume_s=30, priority="batch",
    idempotency_key="käse", traceparent="00-1", replay_of="b" * 32, start_within_s=2.5,
)  # fmt: skip


def test_an_envelope_reads_back_as_it_was_written() -> None:
    assert envelope.parse(FULL.headers()) == FULL
    assert dict(FULL.headers())["ce_time"] == b"2023-11-14T22:13:20.123Z"


def test_unknown_headers_are_let_through() -> None:
    assert envelope.parse([*FULL.headers(), ("x-new", b"1"), ("empty", None)]) == FULL  # type: ignore[list-item]


REQUIRED = ["ce_id", "ce_type", "ce_source", "ce_time", "hr-tenant", "hr-key-id", "hr-reply-partition", "hr-digest"]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_header_is_named(name: str) -> None:
    with pytest.raises(EnvelopeError, match=name):
        envelope.parse([(found, value) for found, value in FULL.headers() if found != name])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ce_id", b"A" * 32), ("ce_id", b"0" * 31), ("ce_type", b"other"), ("ce_time", b"yesterday"),
        ("hr-reply-partition", b"three"), ("hr-deadline", b"soon"), ("hr-resume", b"1.5"), ("hr-tenant", b"\xff"),
        ("hr-deadline", b"nan"), ("hr-deadline", b"inf"), ("hr-deadline", b"0"), ("hr-deadline", b"-1"),
        ("hr-start-within", b"soon"), ("hr-start-within", b"0"), ("hr-start-within", b"nan"),
        ("hr-priority", b"urgent"), ("hr-priority", b"BATCH"),
    ],
)  # fmt: skip
def test_a_wrong_header_is_an_envelope_error(name: str, value: bytes) -> None:
    with pytest.raises(EnvelopeError):
        envelope.parse([(found, value if found == name else held) for found, held in FULL.headers()])


# --- ids ----------------------------------------------------------------------------------------------------------


def test_public_ids_read_back() -> None:
    public = PublicId(new_request_id(), 7, 1_700_000_000_123)
    assert PublicId.parse(str(public)) == public
    assert normalise_request_id(str(public)) == public.request_id
    for wrong in ("", "chatcmpl-", str(public)[:-1], str(public) + "0", str(public).upper(), str(public) + "\n"):
        assert PublicId.parse(wrong) is None


def test_request_ids_tell_their_kind_and_time() -> None:
    plain, hashed = new_request_id(), idempotent_request_id("t", "k")
    assert not is_idempotent(plain) and is_idempotent(hashed)
    assert created_ms(hashed) is None
    assert created_ms(plain) == int(plain[:12], 16)
    assert normalise_request_id(f"{plain[:8]}-{plain[8:12]}-{plain[12:]}".upper()) == plain
    assert normalise_request_id("x" * 32) is None


def test_an_idempotent_id_is_the_tenants_own() -> None:
    assert idempotent_request_id("a", "k") == idempotent_request_id("a", "k")
    pairs = [("a", "bc"), ("ab", "c"), ("a", "b")]
    assert len({idempotent_request_id(tenant, key) for tenant, key in pairs}) == 3


def test_a_usage_id_is_the_same_however_often_it_is_made() -> None:
    assert usage_id("t", "r") == usage_id("t", "r") != usage_id("u", "r")
