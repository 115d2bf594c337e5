"""Production's secrets, passwords, tokens, grants, and records as the admin API makes them."""

from __future__ import annotations

import base64
import json

import jwt
import pytest
from pydantic import ValidationError

from headrace import passwords, records
from headrace.access import Principal, check_grant
from headrace.config import load_config, ollama_tags
from headrace.errors import Forbidden, InvalidRequest, InvalidToken
from headrace.production import faults
from headrace.settings import Settings
from ingress.signin.tokens import ALGORITHM, AUDIENCE, ISSUER, LIFE_S, SignIn, is_token
from schemas.admin_records import KeyCreate, KeyPatch, PriceCreate
from schemas.control import Key, Model, User

GOOD = "k3Jx0qLz9vRt7WbN2mYp5sDf8gHc1aQe4uTi6oXyZ"
PARTS = {"open_parts": "kafka,redis,clickhouse"}
"""So that only our own secrets are in question."""
MODELS = {"big": Model("big", "p", "t", aliases=("gpt-4o",))}


@pytest.mark.parametrize(
    ("fields", "role", "named"),
    [
        ({}, "ingress", "HEADRACE_JWT_SECRET is not set"),
        ({"jwt_secret": "short"}, "ingress", "HEADRACE_JWT_SECRET must be random"),
        ({"jwt_secret": "change-me-change-me-change-me-change-me"}, "up", "HEADRACE_JWT_SECRET must be random"),
        ({"jwt_secret": "a" * 64}, "ingress", "HEADRACE_JWT_SECRET must be random"),
        ({"jwt_secret": GOOD, "admin_key": "hr-admin"}, "ingress", "HEADRACE_ADMIN_KEY must be random"),
        ({"ingress_secret": "change-me-" * 4}, "router", "HEADRACE_INGRESS_SECRET must be random"),
        ({"ingress_secret": f"{GOOD},{'a' * 40}"}, "control", "HEADRACE_INGRESS_SECRET must be random"),
        ({"jwt_secret": GOOD, "admin_password": "password123"}, "up", "HEADRACE_ADMIN_PASSWORD must be"),
        ({"jwt_secret": GOOD, "admin_email": "a@b"}, "up", "HEADRACE_ADMIN_PASSWORD is not set"),
    ],
)
def test_production_does_not_start_with_a_weak_secret(fields: dict[str, str], role: str, named: str) -> None:
    [said] = faults(Settings(env="production", **PARTS, **fields), role)  # type: ignore[arg-type]
    assert said.startswith(named)
    assert faults(Settings(**fields), role) == [], "a developer's machine does"  # type: ignore[arg-type]


def test_production_starts_with_good_ones() -> None:
    secrets = {"jwt_secret": GOOD, "admin_key": "hr-" + GOOD, "admin_password": "Kx9!pL2-vQ7zRt"}
    good = Settings(env="production", **PARTS, **secrets)  # type: ignore[arg-type]
    assert faults(good, "ingress") == []
    assert faults(Settings(env="production", **PARTS), "router") == [], "it signs nothing"  # type: ignore[arg-type]


def test_variables_are_read_without_the_prefix_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("JWT_SECRET", "s"),
        ("ADMIN_EMAIL", "a@b"),
        ("OLLAMA_BASE_URL", "http://o"),
        ("OLLAMA_MODELS", "m"),
    ):
        monkeypatch.setenv(name, value)
    read = Settings()
    assert read.jwt_secret is not None and read.jwt_secret.get_secret_value() == "s"
    assert (read.admin_email, read.ollama_base_url, read.ollama_models) == ("a@b", "http://o", "m")
    monkeypatch.setenv("HEADRACE_OLLAMA_MODELS", "n")
    assert Settings().ollama_models == "n"


def test_models_of_ollama_are_served_without_a_file() -> None:
    found = load_config(None, ollama_models="llama3.2:3b, qwen3:8b,,llama3.2:3b", ollama_base_url="http://o:11434")
    assert [(model.id, model.provider, model.backend_tag) for model in found.models] == [
        ("llama3.2:3b", "ollama", "llama3.2:3b"), ("qwen3:8b", "ollama", "qwen3:8b"),
    ]  # fmt: skip
    assert (found.providers[0].base_url, found.providers[0].options) == ("http://o:11434", {"pull": True})
    assert ollama_tags("/usr/share/ollama/models") == [], "Ollama's own variable of that name"
    assert load_config(None, ollama_models="/models").models[0].id == "smollm2"


def test_a_password_is_filed_as_argon2id_and_told_from_others() -> None:
    filed = passwords.hashed("a long sentence")
    assert filed.startswith("$argon2id$")
    assert passwords.is_right("a long sentence", filed)
    assert not passwords.is_right("another sentence", filed)
    assert not passwords.is_right("nobody's", ""), "who has none signs in with none"
    for weak in ("short", "x" * 1025):
        with pytest.raises(passwords.WeakPassword) as told:
            passwords.hashed(weak)
        assert weak not in str(told.value)


def forged(header: dict[str, str], claims: dict[str, object]) -> str:
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims))
    return ".".join([*parts, ""])


def test_a_token_is_read_under_one_algorithm_one_secret_and_until_it_expires() -> None:
    ours = SignIn(GOOD)
    token = ours.issue("u", "s", now_s=1_000)
    assert is_token(token) and not is_token("hr-abc")
    claims = ours.read(token, now_s=1_000 + LIFE_S - 1)
    assert (claims.sub, claims.sid) == ("u", "s")
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "u", "sid": "s", "iat": 1_000, "exp": 9_000}
    for wrong, now_s in (
        (token, 1_000 + LIFE_S),
        (SignIn(GOOD[::-1]).issue("u", "s", now_s=1_000), 1_000),
        (forged({"alg": "none", "typ": "JWT"}, good), 1_000),
        (jwt.encode(good, GOOD * 2, algorithm="HS512"), 1_000),
        (jwt.encode(good | {"aud": "others"}, GOOD, algorithm=ALGORITHM), 1_000),
        (jwt.encode({name: value for name, value in good.items() if name != "sid"}, GOOD, algorithm=ALGORITHM), 1_000),
        (jwt.encode(good | {"sid": 7}, GOOD, algorithm=ALGORITHM), 1_000),
        ("eyJ.x.y", 1_000),
    ):
        with pytest.raises(InvalidToken):
            ours.read(wrong, now_s=now_s)


def test_only_owners_make_owners_and_admins() -> None:
    for role, others in (("owner", ()), ("admin", ("owner", "admin")), ("member", ("owner", "admin"))):
        who = Principal.of_key(Key("k", "", "", "a", role=role))
        for given in ("owner", "admin", "member", "viewer"):
            if given in others:
                with pytest.raises(Forbidden):
                    check_grant(who, "member", given)
            else:
                check_grant(who, "member", given)


def test_a_user_asks_in_the_name_of_its_apps_only() -> None:
    ada = Principal.of_user(User("u", "ada@example.org", apps=("a", "b")), "s")
    assert [ada.asks_for(name).app for name in (None, "b")] == ["a", "b"]
    assert ada.asks_for("a").id == "user:u"
    for who, app in (
        (ada, "c"),
        (Principal.of_user(User("u", "e"), "s"), None),
        (Principal.of_key(Key("k", "", "", "a")), "b"),
    ):
        with pytest.raises(Forbidden):
            who.asks_for(app)


def test_a_key_is_made_with_all_its_limits_and_shown_without_its_text() -> None:
    body = KeyCreate.model_validate(
        {"name": "n", "allowed_models": ["gpt-4o", "none"], "monthly_budget": 0.1, "expires_at": "2030-01-01T00:00:00"}
    )
    key = records.new_key(body, "hr-text", MODELS)
    assert key.allowed_models == ("big", "none"), "an alias is its model; what is none is left for the refusal to name"
    shown = records.key_view(key).model_dump_json()
    assert "hr-text" not in shown and key.sha256 not in shown
    assert '"monthly_budget":"0.1"' in shown and '"expires_at":"2030-01-01T00:00:00Z"' in shown
    with pytest.raises(InvalidRequest):
        records.new_key(KeyCreate(name="n", id="admin-mine"), "hr-x", {})


def test_a_change_takes_what_is_there_and_null_takes_limits_away() -> None:
    key = Key("k", "s", "n", "a", rate_limit_rpm=5, rate_limit_tpm=6)
    assert records.changed_key(key, KeyPatch(), {}) == key
    changed = records.changed_key(key, KeyPatch(rate_limit_rpm=None, enabled=False), {})
    assert (changed.rate_limit_rpm, changed.rate_limit_tpm, changed.enabled) == (None, 6, False)
    with pytest.raises(InvalidRequest, match="name: must not be null"):
        records.changed_key(key, KeyPatch(name=None), {})


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "-1"}, {"input": "NaN"}, {"input": "1e400"}, {"input": "0.00000000001"}, {"colour": "red"},
        {"effective_from": "1999-01-01T00:00:00Z"}, {"effective_from": "0001-01-01T00:00:00+23:59"},
        {"currency": "usd"},
    ],
)  # fmt: skip
def test_what_no_price_can_be_is_refused(fields: dict[str, str]) -> None:
    PriceCreate.model_validate({"model": "m", "input": "1", "output": "2"})
    with pytest.raises(ValidationError):
        PriceCreate.model_validate({"model": "m", "input": "1", "output": "2"} | fields)


def test_an_apps_id_is_made_of_its_name() -> None:
    assert [records.slug(name) for name in ("Team A", "--Ünï 7!", "a" * 90)] == ["team-a", "n-7", "a" * 40]
    with pytest.raises(InvalidRequest):
        records.slug("日本")
