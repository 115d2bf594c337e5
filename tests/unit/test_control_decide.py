"""What control commands do to the control plane: pure decisions."""

from __future__ import annotations

import base64
from decimal import Decimal

import msgspec
import pytest

from processors.control.decide import Accepted, Refused, decide, decode_command
from processors.control.state import ControlState, Write
from schemas.control import App, ControlCommand, Key, Model, Price, Provider, User

NOW_MS = 1_700_000_000_000
SHA = "ab" * 32

LOCAL = Provider(name="local", kind="llama_cpp")
SMALL = Model(
    id="small",
    provider="local",
    backend_tag="s",
    aliases=("fast",),
    price=Price(0, input=Decimal("0.10"), output=Decimal("0.40"), cached=Decimal("0.10")),
)
KEY = Key(id="key-1", sha256=SHA, name="bob", app="default")
USER = User(id="u1", email="bob@example.org", apps=("default",))


def put(kind: str, key: str, record: object) -> ControlCommand:
    return ControlCommand(id="c", kind=kind, key=key, value=msgspec.Raw(msgspec.json.encode(record)))


def delete(kind: str, key: str) -> ControlCommand:
    return ControlCommand(id="c", kind=kind, key=key, value=None)


def take(state: ControlState, command: ControlCommand, now_ms: int = NOW_MS) -> tuple[Write, ...]:
    """Decide and take the result in, as the processor does."""
    decision = decide(state, command, now_ms=now_ms)
    assert isinstance(decision, Accepted), decision
    for write in decision.writes:
        state.put(write)
    return decision.writes


def refusal(state: ControlState, command: ControlCommand) -> str:
    decision = decide(state, command, now_ms=NOW_MS)
    assert isinstance(decision, Refused), decision
    return decision.reason


@pytest.fixture
def state() -> ControlState:
    """A provider, a model and an app."""
    made = ControlState()
    for command in (
        put("providers", "local", LOCAL),
        put("models", "small", SMALL),
        put("apps", "default", App("default", "D")),
    ):
        take(made, command)
    return made


def test_a_new_model_gets_its_first_price_version_and_its_time() -> None:
    state = ControlState()
    take(state, put("providers", "local", LOCAL))
    writes = take(state, put("models", "small", SMALL))
    assert [(write.kind, write.key) for write in writes] == [("prices", "small/1"), ("models", "small")]
    assert state.models["small"].price.version == 1
    assert state.models["small"].created == NOW_MS // 1000
    assert state.prices["small"] == state.models["small"].price


@pytest.mark.parametrize(("kind", "key", "record"), [("providers", "local", LOCAL), ("models", "small", SMALL)])
def test_an_unchanged_record_writes_nothing(state: ControlState, kind: str, key: str, record: object) -> None:
    assert take(state, put(kind, key, record), NOW_MS + 60_000) == ()


def test_money_is_compared_by_value_not_by_its_digits(state: ControlState) -> None:
    price = msgspec.structs.replace(SMALL.price, input=Decimal("0.1"))
    assert take(state, put("models", "small", msgspec.structs.replace(SMALL, price=price))) == ()


def test_a_changed_price_gets_the_next_version_and_the_old_one_stays(state: ControlState) -> None:
    price = msgspec.structs.replace(SMALL.price, output=Decimal("0.50"))
    writes = take(state, put("models", "small", msgspec.structs.replace(SMALL, price=price)), NOW_MS + 60_000)
    assert [(write.kind, write.key) for write in writes] == [("prices", "small/2"), ("models", "small")]
    assert state.models["small"].price.version == 2
    assert state.models["small"].created == NOW_MS // 1000


def test_a_change_that_is_not_of_the_price_keeps_its_version(state: ControlState) -> None:
    writes = take(state, put("models", "small", msgspec.structs.replace(SMALL, max_concurrency=9)))
    assert [write.kind for write in writes] == ["models"]
    assert state.models["small"].price.version == 1


def test_price_versions_go_on_when_a_model_is_deleted_and_made_again(state: ControlState) -> None:
    take(state, delete("models", "small"))
    dearer = msgspec.structs.replace(SMALL, price=msgspec.structs.replace(SMALL.price, input=Decimal(9)))
    assert take(state, put("models", "small", dearer))[0].key == "small/2"


def test_the_price_version_that_a_sender_gives_is_not_believed(state: ControlState) -> None:
    price = msgspec.structs.replace(SMALL.price, version=77)
    assert take(state, put("models", "small", msgspec.structs.replace(SMALL, price=price))) == ()


def test_a_model_needs_its_provider(state: ControlState) -> None:
    orphan = msgspec.structs.replace(SMALL, id="other", provider="gone", aliases=())
    assert refusal(state, put("models", "other", orphan)) == "model 'other': there is no provider 'gone'"


@pytest.mark.parametrize(
    ("model_id", "aliases"), [("other", ("fast",)), ("other", ("small",)), ("fast", ())], ids=["alias", "id", "as-id"]
)
def test_a_name_that_another_model_has_is_refused(state: ControlState, model_id: str, aliases: tuple[str, ...]) -> None:
    other = msgspec.structs.replace(SMALL, id=model_id, aliases=aliases)
    assert "is taken by model 'small'" in refusal(state, put("models", model_id, other))


def test_adapters_need_a_provider_that_loads_them_and_names_of_their_own(state: ControlState) -> None:
    tuned = msgspec.structs.replace(SMALL, adapters={"tone": "/a/tone"})
    take(state, put("models", "small", tuned))
    assert "'small:tone' is taken by model 'small'" in refusal(
        state, put("models", "small:tone", msgspec.structs.replace(SMALL, id="small:tone", aliases=()))
    )
    for adapters, reason in (({"a:b": "x"}, "no name of an adapter"), ({"a": ""}, "says not where it is")):
        assert reason in refusal(state, put("models", "small", msgspec.structs.replace(tuned, adapters=adapters)))
    take(state, put("providers", "far", Provider(name="far", kind="ollama")))
    assert "kind ollama loads no adapters" in refusal(
        state, put("models", "small", msgspec.structs.replace(tuned, provider="far"))
    )


def test_the_names_of_a_disabled_model_are_free_until_it_comes_back(state: ControlState) -> None:
    take(state, put("models", "small", msgspec.structs.replace(SMALL, enabled=False)))
    take(state, put("models", "other", msgspec.structs.replace(SMALL, id="other", aliases=("fast", "small"))))
    assert "is taken by model 'other'" in refusal(state, put("models", "small", SMALL))


def test_a_provider_in_use_is_not_deleted(state: ControlState) -> None:
    assert "is used by model 'small'" in refusal(state, delete("providers", "local"))
    take(state, put("models", "small", msgspec.structs.replace(SMALL, enabled=False)))
    assert take(state, delete("providers", "local")) == (Write("providers", "local", None),)
    assert take(state, delete("providers", "local")) == ()


def test_a_key_needs_an_app_known_models_and_its_own_digest(state: ControlState) -> None:
    take(state, put("keys", SHA, KEY))
    assert "no app 'gone'" in refusal(state, put("keys", SHA, msgspec.structs.replace(KEY, app="gone")))
    named = msgspec.structs.replace(KEY, allowed_models=("small", "gone"))
    assert "no model 'gone'" in refusal(state, put("keys", SHA, named))
    assert "another SHA-256" in refusal(state, put("keys", "cd" * 32, KEY))
    assert "hex digits" in refusal(state, put("keys", "ab", msgspec.structs.replace(KEY, sha256="ab")))
    assert "unknown role" in refusal(state, put("keys", SHA, msgspec.structs.replace(KEY, role="root")))
    assert "is used by key 'bob'" in refusal(state, delete("apps", "default"))


def test_a_users_address_is_its_own_and_its_apps_are_there(state: ControlState) -> None:
    take(state, put("users", "u1", USER))
    for change, reason in (
        ({"id": "u2"}, "another user has the e-mail address"),
        ({"id": "u2", "email": "Ann@example.org"}, "not in lower case"),
        ({"id": "u2", "email": "ann"}, "no e-mail address"),
        ({"role": "root"}, "unknown role"),
        ({"apps": ("gone",)}, "no app 'gone'"),
        ({"password_hash": "$2b$12$abc"}, "not argon2id"),
    ):
        changed = msgspec.structs.replace(USER, **change)
        assert reason in refusal(state, put("users", changed.id, changed))


def test_a_user_who_has_keys_is_not_deleted(state: ControlState) -> None:
    take(state, put("users", "u1", USER))
    assert "no user 'u2'" in refusal(state, put("keys", SHA, msgspec.structs.replace(KEY, owner_id="u2")))
    take(state, put("keys", SHA, msgspec.structs.replace(KEY, owner_id="u1")))
    assert "is used by key 'bob'" in refusal(state, delete("users", "u1"))
    take(state, put("keys", SHA, msgspec.structs.replace(KEY, owner_id="u1", enabled=False)))
    assert take(state, delete("users", "u1")) == (Write("users", "u1", None),)


def test_a_record_keeps_the_time_of_its_first_version(state: ControlState) -> None:
    take(state, put("keys", SHA, KEY))
    take(state, put("keys", SHA, msgspec.structs.replace(KEY, name="rob", created=7)), NOW_MS + 60_000)
    assert (state.keys[SHA].name, state.keys[SHA].created) == ("rob", NOW_MS // 1000)


@pytest.mark.parametrize("limit", ["rate_limit_rpm", "rate_limit_tpm", "concurrency_limit", "monthly_budget"])
def test_a_limit_may_be_none_or_nothing_but_not_less(state: ControlState, limit: str) -> None:
    for value in (None, Decimal(0) if limit == "monthly_budget" else 0):
        take(state, put("keys", SHA, msgspec.structs.replace(KEY, **{limit: value})))
    low = Decimal("-0.01") if limit == "monthly_budget" else -1
    assert limit in refusal(state, put("keys", SHA, msgspec.structs.replace(KEY, **{limit: low})))
    assert limit in refusal(state, put("apps", "a", App("a", "A", **{limit: low})))


@pytest.mark.parametrize("text", ["", "AAAA", "no base64", "QUJD" * 11])
def test_a_publisher_has_an_ed25519_key(state: ControlState, text: str) -> None:
    assert "no Ed25519 public key" in refusal(state, put("apps", "a", App("a", "A", publishers={"p": text})))
    take(state, put("apps", "a", App("a", "A", publishers={"p": base64.b64encode(bytes(32)).decode()})))


def test_two_keys_have_not_one_id(state: ControlState) -> None:
    take(state, put("keys", SHA, KEY))
    other = msgspec.structs.replace(KEY, sha256="cd" * 32)
    assert "is another key's" in refusal(state, put("keys", other.sha256, other))


@pytest.mark.parametrize("weight", [0.0, -1.0, 0.001, 101.0])
def test_a_weight_that_starves_or_takes_all_is_refused(state: ControlState, weight: float) -> None:
    assert "weight must be 0.01 to 100" in refusal(state, put("apps", "a", App("a", "A", weight=weight)))


def test_an_app_has_its_weight(state: ControlState) -> None:
    take(state, put("apps", "a", App("a", "A", weight=2.5)))
    assert state.apps["a"].weight == 2.5


def test_a_key_can_be_revoked_when_its_model_is_gone(state: ControlState) -> None:
    take(state, put("keys", SHA, msgspec.structs.replace(KEY, allowed_models=("small",))))
    take(state, delete("models", "small"))
    revoked = msgspec.structs.replace(KEY, allowed_models=("small",), enabled=False)
    assert len(take(state, put("keys", SHA, revoked))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context_length": 0}, "context_length"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"default_max_tokens": 4096}, "default_max_tokens"),
        ({"backend_tag": ""}, "backend_tag"),
        ({"aliases": ("x", "x")}, "an alias stands twice"),
        ({"id": "elsewhere"}, "its id is 'elsewhere'"),
        ({"bytes": -1}, "bytes, load_ms and keep_alive_ms"),
        ({"load_ms": -1}, "bytes, load_ms and keep_alive_ms"),
        ({"keep_alive_ms": -1}, "bytes, load_ms and keep_alive_ms"),
        ({"price": Price(0, input=Decimal(-1), output=Decimal(0), cached=Decimal(0))}, "a price is negative"),
    ],
)
def test_nonsense_is_refused(state: ControlState, change: dict[str, object], reason: str) -> None:
    assert reason in refusal(state, put("models", "small", msgspec.structs.replace(SMALL, **change)))


def test_a_record_of_the_wrong_shape_is_refused_with_the_field(state: ControlState) -> None:
    command = ControlCommand(id="c", kind="apps", key="a", value=msgspec.Raw(b'{"id":"a","name":5}'))
    assert "$.name" in refusal(state, command)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no value"),
        (b"\xff", "malformed"),
        (b'{"id":"c","kind":"rooms","key":"x","value":null}', "unknown kind 'rooms'"),
        (b'{"id":"c","kind":"apps","key":"","value":null}', "no key"),
        (b'{"kind":"apps"}', "id"),
    ],
)
def test_what_is_no_command_cannot_be_decoded(value: bytes | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_command(value)


@pytest.mark.parametrize("sent", [put("apps", "a", App("a", "A")), delete("apps", "a")], ids=["put", "delete"])
def test_a_command_survives_its_encoding(sent: ControlCommand) -> None:
    found = decode_command(msgspec.json.encode(sent))
    assert (found.kind, found.key) == ("apps", "a")
    assert (found.value is None) == (sent.value is None)
    assert found.value is None or bytes(found.value) == bytes(sent.value or b"")


def test_the_state_of_all_records_is_the_state_that_made_them(state: ControlState) -> None:
    take(state, put("keys", SHA, KEY))
    records: dict[str, dict[str, bytes]] = {kind: {} for kind in ("providers", "models", "apps", "users", "keys")}
    for kind, held in records.items():
        held.update({key: msgspec.json.encode(record) for key, record in getattr(state, kind).items()})
    records["prices"] = {
        f"{model}/{price.version}": msgspec.json.encode(price) for model, price in state.prices.items()
    }
    assert ControlState.of(records) == state


def test_the_newest_price_is_the_one_of_the_highest_version_whatever_the_order() -> None:
    state = ControlState()
    for version in (2, 10, 9):
        price = Price(version, input=Decimal(version), output=Decimal(0), cached=Decimal(0))
        state.put(Write("prices", f"a/b/{version}", msgspec.json.encode(price)))
    assert state.prices["a/b"].version == 10
