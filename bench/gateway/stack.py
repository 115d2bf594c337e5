"""The two things a run starts: the mock upstream, and a whole Headrace stack whose one model is that upstream."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.gateway.client import Target
from bench.gateway.measure import ROOT, Subject
from bench.gateway.processes import child, ready_line, wait_ready

CONFIG = """\
[[providers]]
name = "bench"
kind = "openai"
base_url = "{base_url}"

[[models]]
id = "bench"
provider = "bench"
backend_tag = "bench"
context_length = 131072
max_concurrency = 2000
price = {{ input = "0.10", output = "0.40" }}
"""
STOP_SECONDS = 60.0
"""How long a stack may drain before what is left of it is killed."""


class _Stack(msgspec.Struct):
    """What is read of a stack's own record."""

    kafka_bootstrap: str


@contextmanager
def upstream(directory: Path, port: int = 0) -> Iterator[str]:
    """The mock upstream on a port, 0 for a free one; gives its base URL, which ends in `/v1`."""
    log = directory / "upstream.log"
    with child([sys.executable, "-m", "bench.gateway.upstream", "--port", str(port)], log, cwd=ROOT) as process:
        yield wait_ready(process, log, ready_line, 20.0) + "/v1"


@contextmanager
def headrace(directory: Path, base_url: str, *, start_seconds: float = 180.0) -> Iterator[Subject]:
    """A Headrace stack in front of `base_url`, on free ports, with data under `directory`."""
    config, log, key = directory / "headrace.toml", directory / "headrace.log", f"hr-bench-{secrets.token_hex(16)}"
    config.write_text(CONFIG.format(base_url=base_url))
    with child(
        up_command(config, data_dir(directory)), log, env={"HEADRACE_ADMIN_KEY": key}, cwd=directory, grace=STOP_SECONDS
    ) as process:
        url = wait_ready(process, log, ready_line, start_seconds)
        yield Subject(name="headrace", target=Target(base_url=f"{url}/v1", api_key=key), roots=[process.pid])


def up_command(config: Path | None, data: Path) -> list[str]:
    """`headrace up` of this installation on free ports; further options may follow."""
    up = [str(Path(sys.executable).with_name("headrace")), "up"]
    return [*up, *(["--config", str(config)] if config else []), "--data-dir", str(data), "--port", "0"]


def data_dir(directory: Path) -> Path:
    """Where the stack of a run keeps its data."""
    return directory / "data"


def bootstrap(directory: Path) -> str:
    """Kafka's `host:port` of the stack of a run, out of its `stack.json`."""
    return msgspec.json.decode((data_dir(directory) / "stack.json").read_bytes(), type=_Stack).kafka_bootstrap
