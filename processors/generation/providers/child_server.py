"""The worker's side of one engine's child process: start, watch, ask, end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import msgspec
import psutil
import structlog

from headrace.errors import ProviderError
from processors.generation.providers.base import RAM
from processors.generation.providers.child import ChildLaunch
from processors.generation.providers.endpoint import Endpoint
from processors.generation.providers.pool import Pool

log = structlog.get_logger(__name__)

PREFIX = "headrace-engine-"
TAIL_LINES = 12
LINE_LIMIT = 400
LOAD_TIMEOUT_S = 600.0
HEALTH_TIMEOUT_S = 5.0
"""How long a child may take to say that it lives. Threads of their own say it: a long prefill does not delay them."""
END_TIMEOUT_S = 10.0
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""The engine's threads spin for some microseconds at their barriers, of which a token has hundreds, and then sleep.

Tokens/s of one stream on two cores, by `GOMP_SPINCOUNT`: alone 21 at 0, which wakes a thread at each barrier, and 77 to
82 from 300 to 300,000; beside two busy processes 13 to 19 at 0, 31 at 300, 15 to 39 at 3,000, 16 to 24 at 300,000,
since who spins for long keeps the core from whom it waits for. An operator's own setting comes first; others than
libgomp read the policy alone.
"""
NO_GPU = "-1"
"""An id that is no GPU's, which hides them all."""


class ChildServer:
    """One running child. Made by `start`; afterwards it is alive until `stop`, or until `exited` says otherwise."""

    def __init__(self, process: asyncio.subprocess.Process, launch: ChildLaunch, idle_timeout_s: float) -> None:
        self.launch = launch
        self.doubted = False
        """Whether an answer of it did not come to its end since it last said that it lives."""
        self._idle_timeout_s = idle_timeout_s
        self._process = process
        self._measured = psutil.Process(process.pid)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader = asyncio.create_task(self._read_log())
        self.pool: Pool
        self.root: Pool
        self.slot_context = launch.context_length
        """Tokens that a slot really holds: the engine rounds up to a multiple of 256."""
        self.takes_tools = False
        """Whether the model's chat template shows tools to the model."""
        self.adapters: dict[str, str | None] = {}
        """LoRA adapters by name, each with the reason why it could not be loaded, or None."""

    @classmethod
    async def start(cls, name: str, program: str, launch: ChildLaunch, idle_timeout_s: float) -> ChildServer:
        """Start the module `program` with `launch` (its key, directory and parent are filled in).

        Returns when it answers; an answer of it without a byte for `idle_timeout_s` seconds will have failed. Raises
        `ProviderError` with the end of its log when it cannot load the model.
        """
        remove_orphans(Path(tempfile.gettempdir()))
        directory = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")
        launch = msgspec.structs.replace(launch, api_key=secrets.token_hex(16), directory=directory, parent=os.getpid())
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(os.environ, launch.device),
        )
        server = cls(process, launch, idle_timeout_s)
        try:
            await server._become_ready(name)
        except BaseException:
            await server.stop()
            raise
        log.info("engine_started", provider=name, model=launch.alias, pid=process.pid, bytes=server.resident_bytes())
        return server

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def exited(self) -> bool:
        """Whether the child has ended."""
        return self._process.returncode is not None

    async def answers(self) -> bool:
        """Whether the child is there and answers; right after its death its exit may not have been noticed yet."""
        if self.exited:
            return False
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self.root.call("GET", "/health")
        except (ProviderError, TimeoutError):
            return False
        self.doubted = False
        return True

    async def wait_exited(self, timeout_s: float) -> bool:
        """Whether the child ends within `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), timeout_s)
        return self.exited

    def how_it_ended(self) -> str:
        """Why the child is gone, with the end of its log."""
        code = self._process.returncode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name}" + (", perhaps for lack of memory" if code == -9 else "")
        return f"{how}{': ' if self._tail else ''}{' | '.join(self._tail)}"

    def resident_bytes(self) -> int:
        """Resident memory of the child as the system measures it, in 15 us; 0 when it is gone.

        All of it but about 20 MB of program code is the child's own: the weights are read into it, not mapped.
        """
        try:
            return int(self._measured.memory_info().rss)
        except psutil.Error:
            return 0

    async def kill(self) -> None:
        """End the child and reap it: its memory is free. Raises `ProviderError` when the system does not end it."""
        if self.exited:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if not await self.wait_exited(END_TIMEOUT_S):
            raise ProviderError(f"engine process {self.pid} does not end: its memory is still in use")

    async def stop(self) -> None:
        """Kill the child, reap it, and remove its directory. Raises what `kill` raises."""
        await self.kill()
        self._reader.cancel()
        for pool in (getattr(self, "pool", None), getattr(self, "root", None)):
            if pool is not None:
                await pool.close()
        shutil.rmtree(self.launch.directory, ignore_errors=True)

    async def _become_ready(self, name: str) -> None:
        stdin = cast(asyncio.StreamWriter, self._process.stdin)
        stdout = cast(asyncio.StreamReader, self._process.stdout)
        stdin.write(msgspec.json.encode(self.launch) + b"\n")
        try:
            line = await asyncio.wait_for(stdout.readline(), LOAD_TIMEOUT_S)
        except TimeoutError as problem:
            raise ProviderError(f"{self.launch.alias!r} was not loaded within {LOAD_TIMEOUT_S:g} s") from problem
        if not line.startswith(b"ready "):
            await self.wait_exited(1.0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._reader), 1.0)
            raise ProviderError(f"model {self.launch.alias!r} cannot be loaded: {self.how_it_ended()}")
        where = line[6:].decode().strip()
        headers = {"Authorization": f"Bearer {self.launch.api_key}"}
        self.root = Pool(name, _endpoint(where), headers=headers, max_idle=2)
        self.pool = Pool(
            name, _endpoint(where, "/v1"), headers=headers, idle_timeout_s=self._idle_timeout_s,
            max_idle=self.launch.slots,
        )  # fmt: skip
        props = msgspec.json.decode(await self.root.call("GET", "/props"), type=_Props)
        self.slot_context = props.default_generation_settings.n_ctx
        if self.slot_context < self.launch.context_length:
            raise ProviderError(
                f"model {self.launch.alias!r} holds {self.slot_context} tokens, less than its context_length of"
                f" {self.launch.context_length}: lower context_length"
            )
        self.takes_tools = props.chat_template_caps.get("supports_tools", False)
        self.adapters = {name: props.adapter_faults.get(name) for name in self.launch.adapters}

    async def _read_log(self) -> None:
        stderr = cast(asyncio.StreamReader, self._process.stderr)
        while True:
            try:
                line = await stderr.readline()
            except ValueError:  # a line over the reader's limit: drop it, the pipe must not fill up
                continue
            if not line:
                return
            if text := complaint(line.decode("utf-8", "replace")):
                self._tail.append(text)


def environment(own: Mapping[str, str], device: str) -> dict[str, str]:
    """The child's environment: of the GPUs it sees the one with this UUID, none for `ram`, as they are for none.

    Layers are kept off the GPU by number as well; an engine that sees one would use it for large batches even so.
    """
    waiting = {} if WAITING.keys() & own.keys() else WAITING
    made = {**waiting, **own, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if device == RAM:
        made |= {"CUDA_VISIBLE_DEVICES": NO_GPU, "HIP_VISIBLE_DEVICES": NO_GPU}
    elif device:
        made["CUDA_VISIBLE_DEVICES"] = device
    return made


def remove_orphans(temporary: Path) -> None:
    """Remove the socket directories of workers that were killed, and so could not do it themselves."""
    for directory in temporary.glob(f"{PREFIX}*"):
        owner = directory.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(directory, ignore_errors=True)


def complaint(line: str) -> str:
    """What a log line of the child says if it is an error, else nothing; warnings tell of every request."""
    leveled = _LEVELED.match(line)
    if leveled is None:
        return line.strip()[:LINE_LIMIT]
    return line[leveled.end() :].strip()[:LINE_LIMIT] if leveled[1] == "E" else ""


_LEVELED = re.compile(r"[\d.]+ ([A-Z]) ")


class _Settings(msgspec.Struct):
    n_ctx: int


class _Props(msgspec.Struct):
    default_generation_settings: _Settings
    chat_template_caps: dict[str, bool] = {}
    adapter_faults: dict[str, str] = {}


def _endpoint(address: str, prefix: str = "") -> Endpoint:
    parts = urlsplit(address)
    if parts.scheme == "unix":
        return Endpoint(host="localhost", port=80, path=prefix, socket=parts.path)
    return Endpoint(host=parts.hostname or "127.0.0.1", port=parts.port or 80, path=prefix)
