"""From the control plane in force to the one that `headrace.toml` wants: which commands, in which order."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest
from pydantic import SecretStr

from headrace.api_keys import admin_record, sha256
from headrace.apply import first_owner, plan
from headrace.config import DEFAULT_APP, Config, default_config, parse_config
from headrace.control_client import ControlPlane
from headrace.errors import InvalidRequest
from headrace.settings import Settings
from processors.control.decide import Accepted, decide
from processors.control.state import ControlState
from schemas.control import API, ControlCommand, Model, Price, Record, User

ADMIN = "hr-admin"


def apply(
    state: ControlState, config: Config, admin_key: str = ADMIN, owner: User | None = None
) -> list[ControlCommand]:
    """Plan, and let every command through the processor's rules; none may be refused."""
    plane = ControlPlane(
        dict(state.providers), dict(state.models), dict(state.apps), dict(state.users), dict(state.keys)
    )
    commands = plan(plane, config, admin_key, owner)
    for command in commands:
        decision = decide(state, command, now_ms=1_000_000)
        assert isinstance(decision, Accepted), decision
        for write in decision.writes:
            state.put(write)
    return commands


def models(*lines: str) -> Config:
    """A configuration with models given as `id: alias alias`."""
    text = '[[providers]]\nname = "p"\nkind = "llama_cpp"\n'
    for line in lines:
        name, _, aliases = line.partition(":")
        quoted = ", ".join(f'"{alias}"' for alias in aliases.split())
        text += f'[[models]]\nid = "{name}"\nprovider = "p"\nbackend_tag = "t"\naliases = [{quoted}]\n'
    return parse_config(text)


def test_the_first_apply_makes_all_and_the_second_does_nothing() -> None:
    state = ControlState()
    commands = apply(state, default_config())
    assert [(command.kind, command.key) for command in commands] == [
        ("apps", DEFAULT_APP),
        ("keys", sha256(ADMIN)),
        ("providers", "local"),
        ("models", "smollm2"),
    ]
    filed = state.keys[sha256(ADMIN)]
    assert filed == msgspec.structs.replace(admin_record(ADMIN, DEFAULT_APP), created=filed.created)
    assert state.keys[sha256(ADMIN)].role == "owner"
    assert apply(state, default_config()) == []


def test_the_first_owner_is_made_once_and_never_again() -> None:
    named = Settings(admin_email=" Ann@Example.org ", admin_password=SecretStr("Kx9!pL2-vQ7zRt"))
    owner = first_owner(named)
    assert owner is not None and (owner.email, owner.role) == ("ann@example.org", "owner")
    assert owner.password_hash.startswith("$argon2id$")
    state = ControlState()
    assert "users" in [command.kind for command in apply(state, default_config(), owner=owner)]
    state.users[owner.id] = msgspec.structs.replace(state.users[owner.id], role="viewer")
    assert apply(state, default_config(), owner=owner) == [], "what became of it since is nobody else's to say"
    assert first_owner(Settings(admin_email="ann@example.org")) is None
    with pytest.raises(InvalidRequest, match="HEADRACE_ADMIN_PASSWORD"):
        first_owner(Settings(admin_email="ann@example.org", admin_password=SecretStr("short")))


def test_limits_of_a_model_are_the_files_or_stay_as_they_were_set() -> None:
    state = ControlState()
    apply(state, models("a"))
    state.models["a"] = msgspec.structs.replace(state.models["a"], rate_limit_rpm=5, concurrency_limit=2)
    assert apply(state, models("a")) == []
    said = msgspec.structs.replace(state.models["a"], rate_limit_rpm=7)
    [model] = models("a").models
    apply(state, models("a").model_copy(update={"models": (model.model_copy(update={"rate_limit_rpm": 7}),)}))
    assert state.models["a"] == said


def test_the_admin_key_itself_is_in_no_command() -> None:
    assert ADMIN not in msgspec.json.encode(apply(ControlState(), default_config())).decode()


def test_another_admin_key_replaces_the_one_before() -> None:
    state = ControlState()
    apply(state, default_config())
    apply(state, default_config(), "hr-other")
    assert not state.keys[sha256(ADMIN)].enabled
    assert state.keys[sha256("hr-other")].enabled
    apply(state, default_config())
    assert state.keys[sha256(ADMIN)].enabled
    assert not state.keys[sha256("hr-other")].enabled


def test_what_is_no_longer_configured_is_disabled_or_deleted() -> None:
    state = ControlState()
    apply(state, default_config())
    apply(state, models("m: gpt-4o-mini"))
    assert not state.models["smollm2"].enabled
    assert set(state.providers) == {"p"}
    assert apply(state, models("m: gpt-4o-mini")) == []


def test_names_can_change_places() -> None:
    state = ControlState()
    apply(state, models("a: x", "b: y"))
    apply(state, models("a: y", "b: x"))
    assert (state.models["a"].aliases, state.models["b"].aliases) == (("y",), ("x",))
    assert apply(state, models("a: y", "b: x")) == []


def test_a_model_may_become_the_alias_of_its_successor() -> None:
    state = ControlState()
    apply(state, models("old: x"))
    apply(state, models("new: old x"))
    assert state.models["new"].aliases == ("old", "x")
    apply(state, models("old: new x"))
    assert state.models["old"].enabled
    assert not state.models["new"].enabled


def test_an_alias_may_become_a_model_of_its_own() -> None:
    state = ControlState()
    apply(state, models("a: x"))
    apply(state, models("a", "x"))
    assert set(state.models) == {"a", "x"}


def put(state: ControlState, kind: str, key: str, record: Record | Price) -> None:
    decision = decide(state, ControlCommand("c", kind, key, msgspec.Raw(msgspec.json.encode(record))), now_ms=1_000_000)
    assert isinstance(decision, Accepted), decision
    for write in decision.writes:
        state.put(write)


def test_a_model_that_the_file_does_not_know_is_left_alone_and_so_is_its_provider() -> None:
    state = ControlState()
    apply(state, default_config())
    put(state, "models", "mine", Model(id="mine", provider="local", backend_tag="t", origin=API))
    assert {command.key for command in apply(state, models("m"))} == {"p", "smollm2", "m"}
    assert state.models["mine"].enabled
    assert set(state.providers) == {"local", "p"}
    assert apply(state, models("m")) == []


def test_a_model_that_the_file_comes_to_name_is_the_files_from_then_on() -> None:
    state = ControlState()
    apply(state, default_config())
    put(state, "models", "mine", Model(id="mine", provider="local", backend_tag="t", origin=API))
    apply(state, models("mine"))
    assert (state.models["mine"].origin, state.models["mine"].provider) == ("", "p")
    apply(state, models("m"))
    assert not state.models["mine"].enabled


def test_a_price_that_was_set_by_itself_outlives_the_files() -> None:
    state = ControlState()
    apply(state, default_config())
    put(state, "prices", "smollm2", Price(0, Decimal(7), Decimal(8), Decimal(7)))
    assert apply(state, default_config()) == []
    assert state.models["smollm2"].price.input == 7
