"""A genuine Ollama server: built by Go, served on a port of its own, with models made of GGUF files."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ollama import AsyncClient

from bench.gateway.processes import NotReady, child
from headrace.errors import ProviderError
from processors.generation.providers.factory import make_provider
from processors.generation.providers.ollama import Ollama
from schemas.control import Provider

VERSION = "v0.11.4"
"""The last version that `go install` builds plainly."""
DIRECTORY = Path(".ollama")
"""Where the program goes, and the models of `just ollama`."""
READY_TRIES = 150
READY_AGAIN_S = 0.1


def install(directory: Path) -> Path:
    """The path of the program, built if it is not there. Ends the process where there is no Go."""
    program = directory.absolute() / "bin" / "ollama"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None:
        sys.exit("Go is not installed: see https://go.dev/dl, or https://ollama.com/download for Ollama itself")
    print(f"building Ollama {VERSION} into {program} (about 3 minutes)", flush=True)
    environ = {**os.environ, "GOBIN": str(program.parent)}
    subprocess.run([go, "install", f"github.com/ollama/ollama@{VERSION}"], check=True, env=environ)
    return program


async def create(url: str, models: Mapping[str, Path], threads: int | None = None) -> None:
    """Wait until the server answers, and make models of these files, by name. Raises `NotReady`.

    `threads` is what their engines compute with; None leaves that to the server.
    """
    provider = make_provider(Provider(name="ollama", kind="ollama", base_url=url))
    assert isinstance(provider, Ollama)
    try:
        for _ in range(READY_TRIES):
            try:
                await provider.health()
                break
            except ProviderError:
                await asyncio.sleep(READY_AGAIN_S)
        else:
            raise NotReady(f"Ollama does not answer at {url}")
        for name, path in models.items():
            await provider.create(name, path, lambda *_: None)
            if threads is not None:
                await AsyncClient(host=url).create(name, from_=name, parameters={"num_thread": threads})
    finally:
        await provider.close()


@contextmanager
def serving(
    program: Path,
    directory: Path,
    port: int,
    models: Mapping[str, Path],
    settings: Mapping[str, str],
    threads: int | None = None,
) -> Iterator[tuple[str, int]]:
    """Its address and process id while a block runs; `settings` are further `OLLAMA_*` variables. Raises `NotReady`."""
    host = f"127.0.0.1:{port}"
    environ = {"OLLAMA_HOST": host, "OLLAMA_MODELS": str(directory / "ollama-models"), "HOME": str(directory)}
    with child([str(program), "serve"], directory / "ollama.log", env={**environ, **settings}) as process:
        asyncio.run(create(f"http://{host}", models, threads))
        yield f"http://{host}", process.pid
