"""A production start with a secret that is missing or known from an example: the process says which, and ends."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from headrace.process import ROLES
from headrace.production import faults
from headrace.settings import Settings
from tests.support.stacks import HEADRACE, clean_environment

GOOD = "Zm8r3_qLw7-TxV0pYkN5uBdE1hJc9sGaQ2iRf6"
PASSWORD = "u7Qm-x2LrT9e_Vd4"
UP = ("up", "--data-dir", "data", "--port", "0")
SAFE = {
    "JWT_SECRET": GOOD, "INGRESS_SECRET": GOOD, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_USERNAME": "roles",
    "KAFKA_SASL_PASSWORD": PASSWORD, "KAFKA_BOOTSTRAP": "127.0.0.1:1",
    "REDIS_URL": f"rediss://:{PASSWORD}@127.0.0.1:1/0", "CLICKHOUSE_URL": f"https://default:{PASSWORD}@127.0.0.1:1",
}  # fmt: skip
"""With these every role starts; nothing listens there."""
WEAK = "default-password"


def ran(directory: Path, command: tuple[str, ...], said: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = clean_environment() | {"HEADRACE_ENV": "production"}
    env |= {f"HEADRACE_{name}": value for name, value in said.items()}
    return subprocess.run(
        [HEADRACE, *command], cwd=directory, env=env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("command", "secrets", "named"),
    [
        (UP, {"ADMIN_KEY": "hr-admin"}, "HEADRACE_ADMIN_KEY must be random"),
        (
            UP,
            {"JWT_SECRET": GOOD, "ADMIN_EMAIL": "a@example.org", "ADMIN_PASSWORD": "password123"},
            "HEADRACE_ADMIN_PASSWORD must be",
        ),
        (UP, {"ADMIN_EMAIL": "a@example.org"}, "HEADRACE_ADMIN_PASSWORD is not set"),
        (("apply",), SAFE, "set HEADRACE_ADMIN_KEY"),
        (("apply",), SAFE | {"ADMIN_KEY": "hr-change-me-admin-key-1"}, "HEADRACE_ADMIN_KEY must be random"),
        (("apply",), SAFE | {"ADMIN_KEY": GOOD, "ADMIN_EMAIL": "a@b.org"}, "HEADRACE_ADMIN_PASSWORD is not set"),
        (("run", "router"), SAFE | {"INGRESS_SECRET": ""}, "Set HEADRACE_INGRESS_SECRET"),
        (("run", "ingress"), SAFE | {"JWT_SECRET": ""}, "HEADRACE_JWT_SECRET is not set"),
    ],
)
def test_it_does_not_start(tmp_path: Path, command: tuple[str, ...], secrets: dict[str, str], named: str) -> None:
    found = ran(tmp_path, command, secrets)
    said = found.stdout + found.stderr
    assert found.returncode in (1, 2) and named in said, said
    assert not any(value in said for value in secrets.values() if len(value) > 8), "no secret is shown"
    assert "Traceback" not in said
    assert not (tmp_path / "data").exists()


def test_a_known_admin_key_in_the_data_directory_is_not_filed(tmp_path: Path) -> None:
    (tmp_path / ".headrace").mkdir()
    (tmp_path / ".headrace/admin.key").write_text("hr-admin-key\n")
    found = ran(tmp_path, ("apply",), SAFE)
    assert found.returncode == 1 and "HEADRACE_ADMIN_KEY must be random" in found.stderr, found.stderr


CLICKHOUSE = {"ingress", "sink"}
ALL = set(ROLES)


@pytest.mark.parametrize(
    ("changes", "named", "roles"),
    [
        ({"KAFKA_SECURITY_PROTOCOL": "PLAINTEXT"}, "HEADRACE_KAFKA_SECURITY_PROTOCOL=PLAINTEXT does not encrypt", ALL),
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}, "SASL_PLAINTEXT does not encrypt", ALL),
        ({"KAFKA_SECURITY_PROTOCOL": "SSL"}, "HEADRACE_KAFKA_SSL_CERTFILE is not set", ALL),
        ({"KAFKA_SASL_PASSWORD": WEAK}, "HEADRACE_KAFKA_SASL_PASSWORD must be random", ALL),
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, "HEADRACE_REDIS_URL has no password", ALL),
        ({"REDIS_URL": f"redis://:{WEAK}@127.0.0.1:1/0"}, "The password in HEADRACE_REDIS_URL must be", ALL),
        ({"CLICKHOUSE_URL": "http://127.0.0.1:1"}, "HEADRACE_CLICKHOUSE_URL has no password", CLICKHOUSE),
        ({"CLICKHOUSE_URL": "http://default:@127.0.0.1:1"}, "HEADRACE_CLICKHOUSE_URL has no password", CLICKHOUSE),
        ({"CLICKHOUSE_URL": f"http://default:{WEAK}@127.0.0.1:1"}, "password in HEADRACE_CLICKHOUSE_URL", CLICKHOUSE),
        ({"JWT_SECRET": ""}, "HEADRACE_JWT_SECRET is not set", {"ingress"}),
        ({"JWT_SECRET": "change-me-" * 5}, "HEADRACE_JWT_SECRET must be random", ALL),
        ({"INGRESS_SECRET": "secret-" * 6}, "HEADRACE_INGRESS_SECRET must be random", ALL),
        ({"INGRESS_SECRET": f"{GOOD}, secret-secret"}, "HEADRACE_INGRESS_SECRET must be random", ALL),
        ({"ADMIN_KEY": "hr-admin"}, "HEADRACE_ADMIN_KEY must be random", ALL),
    ],
)
def test_a_role_refuses_what_it_uses_and_no_other(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], named: str, roles: set[str]
) -> None:
    for role in ROLES:
        assert faults(settings(monkeypatch, {}), role) == []
        found = faults(settings(monkeypatch, changes), role)
        assert [named in one for one in found] == [True] * (role in roles), (role, found)
        assert not any(value in one for one in found for value in changes.values() if len(value) > 14)
        changed = settings(monkeypatch, changes | {"ENV": "development"})
        assert faults(changed, role) == []


def test_what_is_open_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {
        "KAFKA_SECURITY_PROTOCOL": "PLAINTEXT", "REDIS_URL": "redis://redis/0", "CLICKHOUSE_URL": "http://clickhouse"
    }  # fmt: skip
    assert len(faults(settings(monkeypatch, bare), "sink")) == 3
    for part in ("kafka", "redis", "clickhouse"):
        found = faults(settings(monkeypatch, bare | {"OPEN_PARTS": part}), "sink")
        assert len(found) == 2 and not any(f"HEADRACE_OPEN_PARTS={part} " in one for one in found)
    assert faults(settings(monkeypatch, bare | {"OPEN_PARTS": "kafka, redis,clickhouse"}), "sink") == []
    with pytest.raises(ValidationError, match="open_parts"):
        settings(monkeypatch, {"OPEN_PARTS": "kafak"})


@pytest.mark.parametrize("command", [("run", role) for role in ROLES], ids=lambda command: command[1])
def test_a_role_says_it_before_it_looks_for_brokers(tmp_path: Path, command: tuple[str, ...]) -> None:
    found = ran(tmp_path, command, {"ENV": "production"})
    assert found.returncode == 2 and "HEADRACE_REDIS_URL has no password" in found.stdout, found.stdout + found.stderr
    assert "Traceback" not in found.stderr


def settings(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]) -> Settings:
    """As a role reads them from its environment."""
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
            patch.delenv(name)
        for name, value in ({"ENV": "production"} | SAFE | changes).items():
            patch.setenv(f"HEADRACE_{name}", value)
        return Settings()
