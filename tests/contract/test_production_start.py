"""A production start with a secret that is missing or known from an example: the process says which, and ends."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.stacks import HEADRACE, clean_environment

GOOD = "Zm8r3_qLw7-TxV0pYkN5uBdE1hJc9sGaQ2iRf6"


@pytest.mark.parametrize(
    ("command", "secrets", "named"),
    [
        (("run", "ingress"), {}, "HEADRACE_JWT_SECRET is not set"),
        (("run", "ingress"), {"JWT_SECRET": "change-me-" * 5}, "HEADRACE_JWT_SECRET must be random"),
        (("run", "router"), {"INGRESS_SECRET": "secret-" * 6}, "HEADRACE_INGRESS_SECRET must be random"),
        (("run", "router"), {}, "HEADRACE_INGRESS_SECRET"),
        (("up", "--data-dir", "data", "--port", "0"), {"ADMIN_KEY": "hr-admin"}, "HEADRACE_ADMIN_KEY must be random"),
        (
            ("up", "--data-dir", "data", "--port", "0"),
            {"JWT_SECRET": GOOD, "ADMIN_EMAIL": "a@example.org", "ADMIN_PASSWORD": "password123"},
            "HEADRACE_ADMIN_PASSWORD must be",
        ),
    ],
)
def test_it_does_not_start(tmp_path: Path, command: tuple[str, ...], secrets: dict[str, str], named: str) -> None:
    env = clean_environment() | {"HEADRACE_ENV": "production"}
    env |= {f"HEADRACE_{name}": value for name, value in secrets.items()}
    ran = subprocess.run(
        [HEADRACE, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    said = ran.stdout + ran.stderr
    assert ran.returncode in (1, 2) and named in said, said
    assert not any(value in said for value in secrets.values() if "@" not in value), "no secret is shown"
    assert "Traceback" not in said
    assert not (tmp_path / "data").exists()
