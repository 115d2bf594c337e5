"""Stacks under test: `headrace up` and its infrastructure as child processes, which never outlive the test session."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import msgspec
import psutil

from bench.gateway.stack import up_command, upstream
from bench.gateway.tally import Entry, Stats
from deploy.embedded import probes
from deploy.embedded.ports import is_free
from deploy.embedded.stack import Endpoints, discover
from headrace import sql
from headrace.parent import die_with_parent
from headrace.settings import Settings
from tests.support.adapters import write_adapter
from tests.support.engines import freeze
from tests.support.waiting import until

HEADRACE = str(Path(sys.executable).with_name("headrace"))
START_SECONDS = 200.0
STOP_SECONDS = 60.0
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Everything here is plain HTTP; loading the trusted certificates for each client would take longer than the call."""

PROVIDER_KEY = "sk-provider-9f3c77a1"
"""What the workers send to the provider `bench`; only they and their environment may know it."""

CONFIG = """\
[[providers]]
name = "local"
kind = "llama_cpp"
[[providers]]
name = "bench"
kind = "openai"
base_url = "{upstream}"
api_key_env = "BENCH_PROVIDER_KEY"
options = {{ continues = "prefill" }}
[[providers]]
name = "impatient"
kind = "openai"
base_url = "{upstream}"
options = {{ idle_timeout_s = 1.5 }}
[[providers]]
name = "down"
kind = "openai"
base_url = "http://127.0.0.1:{closed}/v1"

[[models]]
id = "bench"
provider = "bench"
backend_tag = "bench"
context_length = 131072
max_concurrency = 2000
price = {{ input = "1.00", output = "10.00" }}
[[models]]
id = "narrow"
provider = "bench"
backend_tag = "bench"
context_length = 131072
max_concurrency = 1
[[models]]
id = "impatient"
provider = "impatient"
backend_tag = "bench"
context_length = 131072
[[models]]
id = "down"
provider = "down"
backend_tag = "bench"
preload = false
"""
SMOLLM2 = """\
[[models]]
id = "smollm2"
provider = "local"
backend_tag = "SmolLM2-135M-Instruct"
aliases = ["gpt-4o-mini"]
adapters = {{ tone = "{tone}", lost = "/no/such.gguf" }}
context_length = 1024
max_concurrency = 4
price = {{ input = "0.10", output = "0.40" }}
"""


class Process:
    """A child that says one line when it is ready, and stops in order on SIGTERM."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str], seconds: float = START_SECONDS) -> None:
        self.log = log
        with log.open("ab") as errors:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**clean_environment(), **env},
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
                text=True,
            )
        self.pid = self._popen.pid
        self.line = self._first_line(seconds)

    def _first_line(self, seconds: float) -> str:
        assert self._popen.stdout is not None
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        try:
            line = self._popen.stdout.readline().strip()
        finally:
            timer.cancel()
        if not line:
            self.kill()
            raise RuntimeError(f"not ready within {seconds:g} s:\n{self.log.read_text()[-4000:]}")
        return line

    def tree(self) -> list[psutil.Process]:
        """All descendants."""
        return psutil.Process(self.pid).children(recursive=True)

    def kill(self) -> None:
        """SIGKILL, as a crash of the machine's process would be; the kernel ends its children."""
        self._popen.kill()
        self._popen.wait()

    def stop(self) -> int:
        """Stop in order; returns the exit code. What is left after `STOP_SECONDS` is killed and fails the caller."""
        if self._popen.poll() is not None:
            return self._popen.returncode
        children = self.tree()
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        _, alive = psutil.wait_procs(children, timeout=5)
        for process in alive:
            process.kill()
        if alive:
            raise AssertionError(f"left behind: {[' '.join(process.cmdline()) for process in alive]}")
        return self._popen.returncode


class Stack:
    """A running `headrace up` on a data directory, before an upstream whose tokens are numbered."""

    def __init__(
        self,
        data_dir: Path,
        upstream_url: str,
        *,
        small_model: bool = False,
        models: str = "",
        replicas: dict[str, int] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        """`models` is TOML of further models; `env` goes to every role."""
        self.data_dir = data_dir
        self.upstream = upstream_url
        self.key = "hr-admin-of-the-tests"
        config = data_dir.with_suffix(".toml")
        text = CONFIG.format(upstream=upstream_url, closed=closed_port())
        if small_model:
            _, tone = write_adapter(data_dir.with_suffix(".adapters"), seed=1)
            text += SMOLLM2.format(tone=tone)
        config.write_text(text + models)
        self._command = up_command(config, data_dir)
        self._command += [f"--replicas={role}={count}" for role, count in (replicas or {}).items()]
        self._env = env or {}
        self.start()

    def start(self) -> None:
        """Start it (again, on the data that is there)."""
        env = {"HEADRACE_ADMIN_KEY": self.key, "HEADRACE_DRAIN_TIMEOUT": "5", "HEADRACE_LOG_LEVEL": "info"}
        env |= {"BENCH_PROVIDER_KEY": PROVIDER_KEY, **self._env}
        self.process = Process(self._command, self.data_dir.with_suffix(".log"), env)
        self.base_url = self.process.line.removeprefix("ready ")
        self.ingress_urls = self.endpoints().ingress_urls

    def stop(self) -> int:
        """Stop in order; returns the exit code."""
        return self.process.stop()

    def endpoints(self) -> Endpoints:
        """The record of the running stack."""
        found = discover(self.data_dir)
        assert found is not None, "the stack has no record"
        return found

    @property
    def settings(self) -> Settings:
        """Settings that point at its parts."""
        found = self.endpoints()
        return Settings(
            kafka_bootstrap=found.kafka_bootstrap,
            redis_url=found.redis_url,
            clickhouse_url=found.clickhouse_url,
            data_dir=self.data_dir,
        )

    # --- children ---------------------------------------------------------------------------------------------

    def pid(self, name: str) -> int:
        """Process id of a child, 0 while it does not run."""
        return self.endpoints().children[name].pid or 0

    def signal(self, name: str, number: signal.Signals) -> int:
        """Send a signal to one child's process; returns its process id."""
        pid = self._running(name)
        os.kill(pid, number)
        return pid

    async def pause(self, name: str) -> int:
        """SIGSTOP one child's process; returns its process id once it stands."""
        pid = self._running(name)
        await freeze(psutil.Process(pid))
        return pid

    def _running(self, name: str) -> int:
        pid = self.pid(name)
        assert pid, f"{name} does not run"
        return pid

    async def killed(self, name: str) -> None:
        """SIGKILL a child; returns once its successor runs."""
        pid = self.signal(name, signal.SIGKILL)
        await until(lambda: self.pid(name) not in (0, pid), f"{name} is started again", 20)

    def role_logs(self) -> str:
        """What supervisor and roles wrote."""
        return self.data_dir.with_suffix(".log").read_text()

    async def ready(self, within_s: float = 60.0) -> None:
        """Wait until every ingress says that it is ready, and waits for no model."""
        for url in self.ingress_urls:

            async def answers(url: str = url) -> bool:
                said = await probes.health(url)
                return said.complete and not said.failed

            await until(answers, f"{url} is ready", within_s)

    # --- commands and the upstream ----------------------------------------------------------------------------

    def run(self, *arguments: str, timeout: float = 90.0) -> subprocess.CompletedProcess[str]:
        """A `headrace` command on this stack."""
        return subprocess.run(
            [HEADRACE, *arguments, "--data-dir", str(self.data_dir)],
            capture_output=True, text=True, timeout=timeout, check=False, env=clean_environment(),
        )  # fmt: skip

    def ledger(self) -> dict[str, object]:
        """The ledger; raises when it does not add up."""
        ran = self.run("ledger", "--json")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        found: dict[str, object] = json.loads(ran.stdout)
        return found

    def rows(self, query: str) -> list[dict[str, object]]:
        """The rows of an SQL query."""
        answer = sql.run(self.settings, query, {})
        return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]

    async def seen(self, name: str) -> Entry:
        """What the upstream saw of requests that carried `id=name`; an empty entry when none came."""
        return (await self._stats({"id": name})).get(name, Entry())

    async def all_seen(self) -> dict[str, Entry]:
        """What the upstream saw, by id."""
        return await self._stats({})

    async def have_begun(self, names: Iterable[str], *, tokens: int = 1) -> bool:
        """Whether the upstream has sent so many tokens of each of these requests, in one of their tries."""
        seen = await self.all_seen()
        return all(any(one.tokens >= tokens for one in seen.get(name, Entry()).tries) for name in names)

    async def _stats(self, query: dict[str, str]) -> dict[str, Entry]:
        async with httpx.AsyncClient(timeout=10, verify=NO_TLS) as client:
            answer = await client.get(f"{self.upstream.removesuffix('/v1')}/stats", params=query)
        return msgspec.json.decode(answer.content, type=Stats).ids


def clean_environment() -> dict[str, str]:
    """The environment of the tests without settings of Headrace: what a command of its own sees."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}


def paid_model(**price: str) -> str:
    """The configuration of `paid`, a model on the numbered upstream, at a price in dollars a million tokens."""
    amounts = ", ".join(f'{name} = "{amount}"' for name, amount in price.items())
    return f"""
[[models]]
id = "paid"
provider = "bench"
backend_tag = "bench"
context_length = 131072
max_concurrency = 2000
price = {{ {amounts} }}
"""


def closed_port() -> int:
    """A port that nothing listens on: below the ranges of stacks and of outgoing connections."""
    return next(port for port in range(1_024 + 7, 20_000) if is_free("127.0.0.1", port))


@contextmanager
def running_stack(
    directory: Path,
    upstream_url: str,
    *,
    small_model: bool = False,
    models: str = "",
    replicas: dict[str, int] | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Stack]:
    """A stack; on leaving it must stop in order and leave nothing behind."""
    stack = Stack(directory / "data", upstream_url, small_model=small_model, models=models, replicas=replicas, env=env)
    try:
        yield stack
    finally:
        code = stack.stop()
    assert code == 0, f"exit code {code}: {stack.role_logs()[-3000:]}"


@contextmanager
def running_infra(data_dir: Path) -> Iterator[Settings]:
    """Kafka, Valkey and ClickHouse alone; on leaving they must stop in order."""
    command = [sys.executable, "-m", "deploy.embedded", "--data-dir", str(data_dir)]
    process = Process(command, data_dir.with_suffix(".log"), {})
    found = json.loads(process.line)
    try:
        yield Settings(**{name.removeprefix("HEADRACE_").lower(): value for name, value in found.items()})
    finally:
        code = process.stop()
    assert code == 0


__all__ = ["Stack", "paid_model", "running_infra", "running_stack", "upstream"]
