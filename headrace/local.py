"""How operating commands find the stack they are to work on: `HEADRACE_*` first, then the one of a data directory."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from deploy.embedded.stack import discover
from headrace.settings import Settings

DEFAULT_DATA_DIR = Path(".headrace")
ENDPOINTS = ("kafka_bootstrap", "redis_url", "clickhouse_url")


class NoStack(Exception):
    """No stack was found; the message says where was looked and what to do."""


def resolve(data_dir: Path | None = None) -> Settings:
    """Settings that point at a stack: what `HEADRACE_*` names explicitly, and the local stack's endpoints for the rest.

    Raises `NoStack` when an endpoint is neither named nor that of a stack running on `data_dir` (default: the
    variable HEADRACE_DATA_DIR, else ./.headrace).
    """
    directory = data_dir or Path(os.environ.get("HEADRACE_DATA_DIR") or DEFAULT_DATA_DIR)
    missing = [name for name in ENDPOINTS if not os.environ.get(f"HEADRACE_{name.upper()}")]
    try:
        named = Settings(data_dir=directory)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
        raise NoStack(f"the HEADRACE_* variables are wrong: {problems}") from None
    if not missing:
        return named
    stack = discover(directory)
    if stack is None:
        wanted = ", ".join(f"HEADRACE_{name.upper()}" for name in missing)
        raise NoStack(
            f"no stack is running on {directory}; start one with `headrace up --data-dir {directory}`, "
            f"name another with --data-dir, or set {wanted}"
        )
    found: dict[str, str] = {name: getattr(stack, name) for name in missing}
    if "kafka_bootstrap" in found:
        found["kafka_security_protocol"] = "PLAINTEXT"  # What the variables say is not of a local broker.
    return named.model_copy(update=found)
