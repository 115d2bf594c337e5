"""The engines behind the provider suite: what each kind of provider talks to, and how a test looks inside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import psutil

from headrace.errors import ProviderError
from processors.generation.providers.base import Piece, Provider
from processors.generation.providers.child_server import ChildServer
from processors.generation.providers.children import ChildProvider
from processors.generation.providers.factory import make_provider
from processors.generation.providers.llama_cpp import LlamaCpp
from processors.generation.providers.llama_models import resolve
from processors.generation.providers.ollama import Ollama
from schemas import control
from schemas.control import Model

ROOT = Path(__file__).parents[2]
WEIGHTS = "SmolLM2-135M-Instruct"
CONTEXT = 1024
SMALL_CONTEXT = 128
ASK = [{"role": "user", "content": "Write one short sentence about the sea."}]
ran: list[str] = []
"""Which Ollama server the suite met, for the summary of the test run."""


class Backend:
    """A provider with what a test needs to know of the engine behind it."""

    def __init__(self, kind: str, provider: Provider, tag: str, engine: Callable[[], psutil.Process | None]) -> None:
        self.kind = kind
        self.provider = provider
        self.model = Model(id="contract", provider=kind, backend_tag=tag, context_length=CONTEXT, max_concurrency=2)
        self.engine = engine
        self.small: tuple[Provider, Model] = (provider, self.model)
        """A provider and model of SMALL_CONTEXT tokens."""
        self.slots: Callable[[], ChildServer] | None = None
        self.options: dict[str, str | int | float | bool] = {}
        """Of the provider's record."""
        self.restart: Callable[[], Awaitable[None]] = self._nothing
        """Bring a killed engine back where the provider itself cannot."""

    @property
    def ours(self) -> bool:
        """Whether the engine is a child of the provider, rather than a server that others run."""
        return isinstance(self.provider, ChildProvider)

    async def busy(self) -> bool:
        """Whether the engine computes now: by its slots, or by its CPU time where it shows none."""
        if self.slots is not None:
            return await working(self.slots())
        return await asyncio.to_thread(using_cpu, self.engine())

    async def _nothing(self) -> None:
        """The provider's own load is enough."""

    async def pieces(self, **fields: object) -> list[Piece]:
        body = {"messages": ASK, "max_tokens": 8, **fields}
        return [piece async for batch in self.provider.generate(self.model, body) for piece in batch]


def using_cpu(process: psutil.Process | None) -> bool:
    """Whether an engine computes: more than a tenth of a core over 100 ms."""
    with contextlib.suppress(psutil.Error):
        return process is not None and process.cpu_percent(interval=0.1) > 10
    return False


async def working(server: ChildServer) -> bool:
    """Whether a slot of the engine is in use, as the engine itself says."""
    slots = msgspec.json.decode(await server.root.call("GET", "/slots"), type=list[dict[str, object]])
    return any(slot["is_processing"] for slot in slots)


@contextlib.asynccontextmanager
async def llama_backend() -> AsyncIterator[Backend]:
    async with child_backend("llama_cpp", LlamaCpp("llama_cpp"), WEIGHTS) as backend:
        yield backend


@contextlib.asynccontextmanager
async def child_backend(kind: str, provider: ChildProvider, tag: str) -> AsyncIterator[Backend]:
    """A provider whose engines are children of this process."""

    def engine() -> psutil.Process | None:
        with contextlib.suppress(ProviderError, psutil.Error):
            return psutil.Process(provider.server(backend.model).pid)
        return None

    backend = Backend(kind, provider, tag, engine)
    backend.slots = lambda: provider.server(backend.model)
    backend.small = provider, msgspec.structs.replace(backend.model, id="small", context_length=SMALL_CONTEXT)
    try:
        yield backend
    finally:
        await provider.close()


@contextlib.asynccontextmanager
async def openai_backend() -> AsyncIterator[Backend]:
    """The engine's child as a server that somebody else runs."""
    host = LlamaCpp("host")
    small = Model(id="small", provider="host", backend_tag=WEIGHTS, context_length=256, max_concurrency=1)
    model = Model(id="contract", provider="host", backend_tag=WEIGHTS, context_length=CONTEXT, max_concurrency=2)

    async def connect(model: Model) -> Provider:
        await host.load(model)
        server = host.server(model)
        address = server.root.endpoint
        url = f"unix://{address.socket}" if address.socket else f"http://{address}/v1"
        os.environ["CONTRACT_KEY"] = server.launch.api_key
        record = control.Provider(
            name="openai", kind="openai", base_url=url, api_key_env="CONTRACT_KEY", options={"continues": "prefill"}
        )
        return make_provider(record)

    backend = Backend("openai", await connect(model), WEIGHTS, lambda: psutil.Process(host.server(model).pid))

    backend.slots = lambda: host.server(model)

    async def again() -> None:
        await backend.provider.close()
        backend.provider = await connect(model)

    backend.restart = again
    backend.small = await connect(small), small
    try:
        yield backend
    finally:
        await backend.provider.close()
        await backend.small[0].close()
        await host.close()


@contextlib.asynccontextmanager
async def ollama_backend() -> AsyncIterator[Backend]:
    with ollama_server() as (url, genuine, server_pid):
        provider = make_provider(
            control.Provider(name="ollama", kind="ollama", base_url=url, options={"idle_timeout_s": 60})
        )
        assert isinstance(provider, Ollama)
        ran.append(f"the genuine server at {url}" if genuine else "tests/support/ollama_server.py")
        await provider.create("headrace-contract", resolve(WEIGHTS, None), lambda *_: None)

        def engine() -> psutil.Process | None:
            for child in psutil.Process(server_pid).children() if server_pid else ():
                with contextlib.suppress(psutil.Error):
                    if "runner" in child.cmdline() or any("llama_child" in part for part in child.cmdline()):
                        return child
            return None

        backend = Backend("ollama", provider, "headrace-contract", engine)
        backend.small = provider, msgspec.structs.replace(backend.model, id="small", context_length=SMALL_CONTEXT)
        try:
            yield backend
        finally:
            await provider.unload(backend.model)
            await provider.close()


@contextlib.contextmanager
def ollama_server() -> Iterator[tuple[str, bool, int]]:
    """Address of a server, whether it is the genuine one, and its process id (0 where it is not on this machine)."""
    host = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434")
    url = host if host.startswith("http") else f"http://{host}"
    with contextlib.suppress(httpx.HTTPError):
        httpx.get(f"{url}/api/version", timeout=1).raise_for_status()
        serving = [one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [])[1:2] == ["serve"]]
        yield url, True, serving[0].pid if serving else 0
        return
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/support/ollama_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
        yield line.removeprefix("ready ").strip(), False, process.pid
    finally:
        if process.stdin:
            process.stdin.close()
        process.wait(10)


MAKERS = {"llama_cpp": llama_backend, "openai": openai_backend, "ollama": ollama_backend}
