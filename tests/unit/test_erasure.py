"""Erasures and replays without I/O: what is decided, whom an erasure means, which rows lose what, and until when."""

from __future__ import annotations

import hashlib
import time

import msgspec
import pytest

from clickhouse.erasures import scrub
from clickhouse.rows import read
from clickhouse.tables import EVENTS, REQUESTS
from headrace import erasure, letters
from headrace.errors import InvalidRequest
from headrace.letters import CannotReplay, Letter, Wanted
from processors.control.decide import Accepted, Refused, decide
from processors.control.state import ControlState
from schemas.control import App, ControlCommand, Erasure, Key, Record, Replay, User
from schemas.events import DeadLetter, ErrorInfo, LifecycleEvent, Stage, Status, Terminal, Timings
from schemas.ids import PublicId
from tests.support.publishing import SEALS, sealed
from tests.support.tables import NOW_MS, log_record
from tests.support.tables import Record as Sent
from topics.catalogue import DAY_MS, DEAD_LETTERS, LOG, MAX_BODY_BYTES
from topics.catalogue import REQUESTS as ASKED
from topics.envelope import Envelope, parse

ID = "0192" + "ab" * 14
SHA = "ab" * 32


def put(state: ControlState, kind: str, key: str, record: Record, now_ms: int = NOW_MS) -> list[object] | str:
    """Decide and take in; what was written, or why it was refused."""
    sent = ControlCommand("c", kind, key, msgspec.Raw(msgspec.json.encode(record)))
    decision = decide(state, sent, now_ms=now_ms)
    if isinstance(decision, Refused):
        return decision.reason
    assert isinstance(decision, Accepted)
    for write in decision.writes:
        state.put(write)
    return [msgspec.json.decode(write.value or b"", type=type(record)) for write in decision.writes]


# --- replays --------------------------------------------------------------------------------------------------------


def test_a_letter_is_replayed_once_and_again_only_when_that_is_said() -> None:
    state = ControlState()
    claim = Replay("5/100", "new-1", "digest")
    assert put(state, "replays", "5/100", claim) == [claim]
    late = msgspec.structs.replace(claim, new_id="new-2")
    assert put(state, "replays", "5/100", late) == [], "claimed and not sent: whoever asks again goes on under its id"
    assert state.replays["5/100"].new_id == "new-1"
    sent = msgspec.structs.replace(claim, sent=True)
    assert put(state, "replays", "5/100", sent) == [sent]
    assert put(state, "replays", "5/100", late) == "letter 5 was replayed as new-1; say `again` to send it once more"
    again = msgspec.structs.replace(late, again=True)
    assert put(state, "replays", "5/100", again) == [msgspec.structs.replace(again, times=2)]


def test_a_claim_with_another_body_is_another_replay() -> None:
    state = ControlState()
    put(state, "replays", "5/100", Replay("5/100", "new-1", "digest"))
    refused = put(state, "replays", "5/100", Replay("5/100", "new-2", "other"))
    assert refused == "letter 5 is being replayed with another body as new-1; say `again` to send it once more"


def test_what_was_not_claimed_cannot_be_said_to_be_sent() -> None:
    assert "was not claimed" in str(put(ControlState(), "replays", "5/1", Replay("5/1", "n", "d", sent=True)))
    assert "of another letter" in str(put(ControlState(), "replays", "5/1", Replay("6/1", "n", "d")))


def letter(value: bytes, headers: list[tuple[str, bytes]] | None = None, source: str = ASKED.name) -> Letter:
    return Letter(7, DeadLetter(source, 1, 2, "no JSON", "router", NOW_MS, 1), None, headers or [], value)


def sent_by(tenant: str = "acme") -> Envelope:
    return Envelope(ID, "/test", NOW_MS, tenant, "key-1", 0, "0" * 64, 30.0, idempotency_key="order-1")


def test_an_edited_request_is_sent_under_the_digest_of_its_new_body() -> None:
    bad = letter(b"{bad", sealed(sent_by(), b"{bad"))
    found = letters.resend(bad, new_id="f" * 32, now_ms=NOW_MS, seals=SEALS, body=b"{}")
    envelope = parse(found.headers)
    assert (found.value, envelope.digest) == (b"{}", hashlib.sha256(b"{}").hexdigest())
    assert (envelope.request_id, envelope.replay_of, envelope.idempotency_key) == ("f" * 32, ID, None)
    same = letters.resend(bad, new_id="f" * 32, now_ms=NOW_MS, seals=SEALS)
    assert (same.value, parse(same.headers).digest) == (b"{bad", hashlib.sha256(b"{bad").hexdigest())
    with pytest.raises(CannotReplay, match="over"):
        letters.resend(
            letter(b"", sealed(sent_by(), b"")),
            new_id="f" * 32,
            now_ms=0,
            seals=SEALS,
            body=b"x" * (MAX_BODY_BYTES + 1),
        )


def test_whose_a_letter_is_and_which_are_wanted() -> None:
    assert letters.whose(letter(b"{bad", sealed(sent_by(), b"{bad"))) == ("acme", ID, "key-1", NOW_MS)
    raw = msgspec.json.encode({"tenant": "acme", "request_id": ID, "key_id": "k", "body": {}})
    assert letters.whose(letter(raw, source=LOG.name)) == ("acme", ID, "k", NOW_MS)
    assert not letters.whose(letter(b"\xff", source=LOG.name)).known
    assert Wanted("inference.requests", "router", "JSON").takes(letter(b"")) and Wanted().takes(letter(b""))
    assert not Wanted(reason="yaml").takes(letter(b"")) and not Wanted(role="sink").takes(letter(b""))


# --- erasures -------------------------------------------------------------------------------------------------------


def test_a_users_erasure_is_one_of_each_of_the_users_keys_and_of_what_it_asked_itself() -> None:
    state = ControlState()
    state.apps["a"] = App("a", "A")
    state.users["u1"] = User(id="u1", email="u@example.org")
    state.keys[SHA] = Key(id="key-1", sha256=SHA, name="n", app="a", owner_id="u1", enabled=False)
    state.keys["cd" * 32] = Key(id="key-2", sha256="cd" * 32, name="n", app="a")
    written = put(state, "erasures", "user/u1", Erasure("user/u1", asked_ms=1))
    own = Erasure("key/user:u1", NOW_MS, of="u1")
    assert written == [Erasure("user/u1", NOW_MS), Erasure("key/key-1", NOW_MS, of="u1"), own]


def test_an_erasure_is_kept_moves_on_and_is_never_taken_back() -> None:
    state = ControlState()
    put(state, "erasures", "app/a", Erasure("app/a"))
    done = Erasure("app/a", NOW_MS, applied={"clickhouse": NOW_MS + 9})
    assert put(state, "erasures", "app/a", done) == [done]
    later = msgspec.structs.replace(done, applied={"clickhouse": NOW_MS + 99})
    assert put(state, "erasures", "app/a", later) == [], "the first word counts"
    assert put(state, "erasures", "app/a", Erasure("app/a"), NOW_MS + 500) == [Erasure("app/a", NOW_MS + 500)]
    assert "not asked for" in str(put(state, "erasures", "app/a", done)), "what was done for the one before"
    refused = decide(state, ControlCommand("c", "erasures", "app/a", None), now_ms=NOW_MS)
    assert isinstance(refused, Refused) and "cannot be taken back" in refused.reason


@pytest.mark.parametrize("subject", ["key/k", "team/x", "app/", "app"])
def test_only_requests_apps_and_users_are_erased(subject: str) -> None:
    assert "is of no" in str(put(ControlState(), "erasures", subject, Erasure(subject)))


def test_an_erasure_means_what_was_accepted_before_it_was_asked_for() -> None:
    assert Erasure("app/a", NOW_MS).covers(NOW_MS - 1) and not Erasure("app/a", NOW_MS).covers(NOW_MS)
    assert Erasure(f"request/{ID}", NOW_MS).covers(NOW_MS + 1)
    assert erasure.subjects("a", ID, "") == [f"request/{ID}", "app/a"]


def test_a_request_is_named_by_any_of_its_ids() -> None:
    assert erasure.subject("request", str(PublicId(ID, 1, NOW_MS))) == f"request/{ID}"
    with pytest.raises(InvalidRequest):
        erasure.subject("request", "17")


def test_kafkas_copies_are_gone_after_retention_and_the_length_of_a_segment() -> None:
    gone = erasure.gone_ms(NOW_MS)
    assert max(gone.values()) == gone[DEAD_LETTERS.name]
    assert gone[LOG.name] - NOW_MS == 8 * DAY_MS + erasure.RUNNING_MS + erasure.SWEEP_MS
    assert erasure.longest_days() == 16


def terminal(tenant: str = "acme", key: str = "key-1", request_id: str = ID) -> Sent:
    error = ErrorInfo(400, "provider_refused", "cannot answer 'my secret'")
    times = Timings(accepted_ms=NOW_MS - 10, finished_ms=NOW_MS)
    return log_record(
        3, Terminal(request_id, tenant, 1, 0, Status.FAILED, key_id=key, error=error, timings=times)
    )  # fmt: skip


def step(tenant: str = "acme") -> Sent:
    event = LifecycleEvent(ID, tenant, Stage.ACCEPTED, NOW_MS - 10, "ingress", "i", detail={"key_id": "key-1", "n": 1})
    return Sent("inference.events", 4, msgspec.json.encode(event))


@pytest.mark.parametrize("subject", [f"request/{ID}", "app/acme", "key/key-1"])
def test_rows_that_are_erased_lose_what_may_quote_and_nothing_else(subject: str) -> None:
    items = [read(terminal()), read(step())]
    done = scrub(items, {subject: Erasure(subject, NOW_MS)})
    was, now = ([dict(zip(one.table.names, one.row, strict=True)) for one in each] for each in (items, done))
    assert now[0] == was[0] | {"error_message": ""} and was[0]["error_message"]
    assert now[1] == was[1] | {"detail": {"erased": "true"}} and was[1]["detail"]
    assert [one.table for one in done] == [REQUESTS, EVENTS]


@pytest.mark.parametrize(
    "found",
    [Erasure("app/other", NOW_MS), Erasure("key/key-2", NOW_MS), Erasure("app/acme", NOW_MS - 10)],
    ids=["another-app", "another-key", "accepted-later"],
)
def test_rows_of_others_and_of_later_are_left_alone(found: Erasure) -> None:
    items = [read(terminal()), read(step())]
    assert scrub(items, {found.subject: found}) == items


def test_many_rows_are_looked_through_quickly() -> None:
    items = [read(terminal(request_id=f"{number:032x}")) for number in range(20_000)]
    erasures = {f"request/{number:032x}": Erasure(f"request/{number:032x}", 1) for number in range(10_000)}
    began = time.process_time()
    at = REQUESTS.index("error_message")
    assert sum(not item.row[at] for item in scrub(items, erasures)) == 10_000
    assert time.process_time() - began < 5
