"""The audit trail without I/O: what an event says, how the chain is sealed, and which tampering a check finds."""

from __future__ import annotations

import hashlib
import json
from decimal import Decimal

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace import audit
from headrace.audit_chain import Check, Place, Verdict, digest
from headrace.audit_trail import Filter, noted
from processors.control.audit import MAX_VALUE_CHARS, changes, described, held
from processors.control.decide import Accepted, Refused, decide, decode_command
from processors.control.state import ControlState, Write
from processors.control.trail import REMEMBERED, Trail
from schemas.audit import GENESIS, AuditEvent, AuditHead, Change
from schemas.control import App, ControlCommand, Key, Model, Price, Provider, User

DAY_MS = 86_400_000
NOW_MS = 1_790_000_000_000
SHA = "ab" * 32
RETENTION_MS = 400 * DAY_MS


def event(number: int, at_ms: int = NOW_MS) -> AuditEvent:
    return AuditEvent(0, "", at_ms, f"c{number}", "ann", "update", "apps", f"app-{number}", "applied")


def trail(count: int, *, first_ms: int = NOW_MS, step_ms: int = 0) -> tuple[list[bytes], list[AuditHead]]:
    """A trail of one transaction an event, and the heads that are kept of it: the last of each day."""
    made, values, heads = Trail(Place()), [], {}
    for number in range(1, count + 1):
        values.append(made.add(event(number, first_ms + number * step_ms)).value or b"")
        head = made.head()
        heads[head.key] = msgspec.json.decode(head.value or b"", type=AuditHead)
    return values, list(heads.values())


def check(values: list[bytes], heads: list[AuditHead], *, after: list[AuditHead] | None = None) -> Verdict:
    made = Check(heads, now_ms=NOW_MS, retention_ms=RETENTION_MS)
    for value in values:
        made.take(value)
    return made.end(heads if after is None else after)


def reseal(values: list[bytes], first: int, **changed: object) -> list[bytes]:
    """The trail rewritten from event `first` on, with right hashes, as somebody who knows the rules would."""
    events = [msgspec.json.decode(value, type=AuditEvent) for value in values]
    end = Place(first - 1, events[first - 2].hash) if first > 1 else Place()
    made, forged = Trail(end), list(values[: first - 1])
    for number, found in enumerate(events[first - 1 :], first):
        forged.append(made.add(msgspec.structs.replace(found, **changed) if number == first else found).value or b"")
    return forged


def edited(value: bytes, **changed: object) -> bytes:
    return json.dumps({**json.loads(value), **changed}).encode()


def test_a_trail_that_nobody_touched_is_whole() -> None:
    values, heads = trail(5)
    verdict = check(values, heads)
    assert (verdict.broken, verdict.first, verdict.head.seq, verdict.anchors, verdict.events) == (None, 1, 5, 1, 5)
    assert msgspec.json.decode(values[0])["previous"] == GENESIS
    assert check([], []).events == 0


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example('ü "quoted" \\ \n\t\b\f\x00\x7f / \u2028 😀')
def test_the_hash_can_be_made_by_any_language(text: str) -> None:
    """As the docs say it: the event without `hash`, keys sorted, no white space, UTF-8."""
    made = msgspec.structs.replace(event(1), key=text, changes={"b": Change("1", text), "a": Change("", "{}")})
    fields = json.loads(Trail(Place()).add(made).value or b"")
    said = fields.pop("hash")
    plain = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert said == hashlib.sha256(plain.encode()).hexdigest()


@pytest.mark.parametrize(
    ("tamper", "seq", "why"),
    [
        (lambda v: [*v[:2], edited(v[2], actor="bob"), *v[3:]], 3, "changed"),
        (lambda v: [*v[:2], edited(v[2], outcome="refused", later_field=1), *v[3:]], 3, "changed"),
        (lambda v: [*v[:2], *v[3:]], 3, "event 4 stands in its place"),
        (lambda v: [*v[:2], v[3], v[2], *v[4:]], 3, "event 4 stands in its place"),
        (lambda v: [*v[:3], v[2], *v[3:]], 4, "event 3 stands in its place"),
        (lambda v: v[:4], 5, "ends before it"),
        (lambda v: [*v[:2], b"garbage", *v[3:]], 3, "no audit event"),
        (lambda v: v[2:], 2, "gone, though it is younger"),
        (lambda v: [], 2, "gone, though it is younger"),
        (lambda v: reseal(v, 2, actor="bob"), 2, "rewritten"),
        (lambda v: [*v, Trail(Place(5, json.loads(v[4])["hash"])).add(event(6)).value], 6, "behind the anchored head"),
    ],
    ids=["changed", "changed-with-a-new-field", "one-removed", "swapped", "repeated", "tail-cut", "garbage",
         "beginning-cut", "all-cut", "rewritten", "appended"],
)  # fmt: skip
def test_tampering_is_found_and_the_first_broken_event_named(tamper, seq: int, why: str) -> None:  # type: ignore[no-untyped-def]
    values, _ = trail(5)
    heads = [AuditHead(number, json.loads(values[number - 1])["hash"], NOW_MS - DAY_MS) for number in (2, 5)]
    assert check(values, heads).broken is None
    broken = check(tamper(values), heads).broken
    assert broken is not None
    assert broken.seq == seq
    assert why in broken.why


def test_who_rewrites_trail_and_heads_is_found_only_by_a_head_that_was_noted_elsewhere() -> None:
    values, _ = trail(5)
    forged = reseal(values, 2, actor="bob")
    heads = [AuditHead(5, json.loads(forged[4])["hash"], NOW_MS)]
    assert check(forged, heads).broken is None
    [witness] = noted([f"3 {json.loads(values[2])['hash']}\n"])
    broken = check(forged, [*heads, AuditHead(witness.seq, witness.hash, 0)]).broken
    assert broken is not None and broken.seq == 3


def test_retention_may_cut_the_beginning_and_only_what_is_old() -> None:
    values, heads = trail(10, first_ms=NOW_MS - 405 * DAY_MS, step_ms=DAY_MS)
    assert check(values[3:], heads).broken is None, "events 1 to 3 are older than 400 days"
    assert check(values[4:], heads).broken is None, "event 4 is 401 days old"
    broken = check(values[6:], heads).broken
    assert broken is not None and broken.seq == 6
    moved = reseal(values, 5, actor="bob")[4:]
    assert check(moved, heads).broken == (5, "it is not the event that was anchored: the trail was rewritten")


def test_events_that_come_while_it_is_read_are_no_fault() -> None:
    values, heads = trail(6)
    early = [AuditHead(4, json.loads(values[3])["hash"], NOW_MS)]
    assert check(values, early, after=heads).broken is None


def test_noted_heads_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="SEQ HASH"):
        noted(["12 not-a-hash"])


# --- what an event says ---------------------------------------------------------------------------------------------


def say(state: ControlState, command: ControlCommand) -> AuditEvent:
    before = getattr(state, command.kind, {}).get(command.key)
    return described(command, before, decide(state, command, now_ms=NOW_MS), at_ms=NOW_MS)


def put(kind: str, key: str, record: object) -> ControlCommand:
    value = msgspec.Raw(msgspec.json.encode(record))
    return ControlCommand(id="c", kind=kind, key=key, value=value, actor="ann", reason="asked to")


@pytest.fixture
def state() -> ControlState:
    made = ControlState()
    made.apps["default"] = App("default", "D")
    made.users["u1"] = User(id="u1", email="u@example.org", password_hash="$argon2id$old-hash")
    made.keys[SHA] = Key(id="key-1", sha256=SHA, name="bob", app="default")
    return made


def test_a_key_goes_by_its_id_and_neither_its_hash_nor_a_password_is_told(state: ControlState) -> None:
    other = Key(id="key-2", sha256="cd" * 32, name="eve", app="default", monthly_budget=Decimal("12.50"))
    user = User(id="u1", email="u@example.org", password_hash="$argon2id$new-hash", name="Uma")
    said = [
        say(state, put("keys", other.sha256, other)),
        say(state, put("keys", SHA, msgspec.structs.replace(state.keys[SHA], enabled=False))),
        say(state, ControlCommand("c", "keys", SHA, None)),
        say(state, put("keys", SHA, other)),
        say(state, put("users", "u1", user)),
    ]
    text = msgspec.json.encode(said).decode()
    assert SHA not in text and "cd" * 32 not in text and "argon2id" not in text and "-hash" not in text
    assert [(one.action, one.key, one.outcome) for one in said] == [
        ("create", "key-2", "applied"),
        ("update", "key-1", "applied"),
        ("delete", "key-1", "applied"),
        ("update", "key-1", "refused"),
        ("update", "u1", "applied"),
    ]
    assert said[0].changes["sha256"] == Change("", '"redacted"')
    assert said[0].changes["monthly_budget"] == Change("", '"12.50"')
    assert said[1].changes == {"enabled": Change("true", "false")}
    assert said[4].changes["password_hash"] == Change('"redacted"', '"redacted"')
    assert (said[0].actor, said[0].reason, said[0].at_ms) == ("ann", "asked to", NOW_MS)


def test_credentials_in_urls_and_options_are_not_told() -> None:
    before = Provider(name="p", kind="openai", base_url="https://me:hunter2@h/v1", options={"api_token": "t0p", "n": 3})
    after = msgspec.structs.replace(before, base_url="https://me:hunter3@h/v2", options={"api_token": "t1p", "n": 4})
    text = msgspec.json.encode(changes(before, after)).decode()
    assert "hunter" not in text and "t0p" not in text and "t1p" not in text
    assert changes(before, after)["base_url"].after == '"https://redacted@h/v2"'


def test_an_event_is_bounded_whatever_the_command(state: ControlState) -> None:
    big = App("big", "x" * 900_000)
    said = say(state, put("apps", "big", big))
    assert len(said.changes["name"].after) < MAX_VALUE_CHARS + 50
    assert len(msgspec.json.encode(said)) < 10_000


def test_a_refused_command_says_why_and_a_model_tells_its_new_price() -> None:
    state = ControlState(providers={"local": Provider("local", "llama_cpp")})
    model = Model("m", "gone", "tag")
    assert say(state, put("models", "m", model)).refusal == "model 'm': there is no provider 'gone'"
    price = Price(0, Decimal(1), Decimal(2), Decimal(0))
    said = say(state, put("models", "m", msgspec.structs.replace(model, provider="local", price=price)))
    assert '"input":"1"' in said.changes["price"].after


def test_a_note_is_taken_as_it_is_and_one_that_is_none_is_refused(state: ControlState) -> None:
    sent = audit.note("read", "requests", "r1", actor="key k", reason="a complaint", tenant="other")
    command = decode_command(msgspec.json.encode(sent))
    assert decide(state, command, now_ms=NOW_MS) == Accepted(())
    said = say(state, command)
    assert (said.action, said.kind, said.key, said.actor, said.detail, said.outcome, said.reason) == (
        "read", "requests", "r1", "key k", {"tenant": "other"}, "done", "a complaint",
    )  # fmt: skip
    bad = msgspec.structs.replace(command, value=msgspec.Raw(b'{"action": 1}'))
    assert isinstance(decide(state, bad, now_ms=NOW_MS), Refused)
    assert say(state, bad).outcome == "refused"


# --- the writer's end of it -----------------------------------------------------------------------------------------


def test_a_successor_goes_on_with_the_chain_and_knows_what_was_handled() -> None:
    first = Trail(Place())
    values = [first.add(event(number)).value or b"" for number in (1, 2)]
    head = msgspec.json.decode(first.head().value or b"", type=AuditHead)
    events = [msgspec.json.decode(value, type=AuditEvent) for value in values]
    second = Trail(Place(head.seq, head.hash), events)
    assert second.outcome("c2") is not None and second.outcome("c3") is None
    values.append(second.add(event(3)).value or b"")
    assert check(values, [msgspec.json.decode(second.head().value or b"", type=AuditHead)]).broken is None


def test_a_command_without_an_id_is_always_new_and_memory_is_bounded() -> None:
    made = Trail(Place())
    made.add(msgspec.structs.replace(event(0), command=""))
    assert made.outcome("") is None
    for number in range(REMEMBERED + 1):
        made.add(event(number))
    assert made.outcome("c0") is None and made.outcome("c1") is not None


def test_the_head_is_filed_under_its_day() -> None:
    made = Trail(Place())
    made.add(event(1, at_ms=0))
    assert made.head() == Write("audit_heads", "1970-01-01", made.head().value)


def test_a_filter_takes_what_fits_all_of_it() -> None:
    said = event(7)
    assert Filter().takes(said) and Filter(actor="ann", kind="apps", since_ms=NOW_MS).takes(said)
    looked = audit.note("read", "audit", "events", actor="bob", **Filter(actor="ann", kind="apps").said())
    assert b'"only_actor":"ann"' in bytes(looked.value or b"")
    assert not Filter(actor="ann", kind="keys").takes(said)
    assert not Filter(since_ms=NOW_MS + 1).takes(said) and not Filter(until_ms=NOW_MS).takes(said)


def test_digest_covers_everything_but_the_hash() -> None:
    assert digest({"a": 1, "hash": "x"}) == digest({"a": 1}) != digest({"a": 2})


def test_a_price_is_written_down_with_what_it_was_and_its_refusals_keep_their_code() -> None:
    state = ControlState()
    for kind, key, record in (
        ("providers", "p", Provider("p", "llama_cpp")),
        ("models", "m", Model("m", "p", "t", price=Price(0, Decimal(1), Decimal(2), Decimal(1)))),
    ):
        made = decide(state, ControlCommand("c", kind, key, msgspec.Raw(msgspec.json.encode(record))), now_ms=NOW_MS)
        assert isinstance(made, Accepted)
        for write in made.writes:
            state.put(write)
    price = msgspec.Raw(msgspec.json.encode(Price(0, Decimal(1), Decimal(3), Decimal(1))))
    command = ControlCommand("set", "prices", "m", price, actor="ann")
    said = described(command, held(state, command), decide(state, command, now_ms=NOW_MS + 1), at_ms=NOW_MS)
    assert (said.action, said.kind, said.key, said.outcome) == ("update", "prices", "m", "applied")
    assert said.changes["output"] == Change('"2"', '"3"') and "input" not in said.changes
    stale = msgspec.structs.replace(command, id="stale", if_match="another")
    event = described(stale, held(state, stale), decide(state, stale, now_ms=NOW_MS + 1), at_ms=NOW_MS)
    trail = Trail(Place())
    trail.add(event)
    known = Trail(Place(), [event]).outcome("stale")
    assert known == trail.outcome("stale") and known is not None
    assert (known.status, known.code) == ("refused", "precondition")
