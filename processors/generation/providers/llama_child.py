"""What runs in a llama.cpp child process: one xllamacpp server for one model, until its worker goes away.

`python -m processors.generation.providers.llama_child` reads a `Launch` as one line of JSON from standard input, loads
the model, prints `ready ADDRESS` and serves. Standard input stays open as long as the parent lives: its end, however
the parent died, ends this process. Logs go to standard error.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

PR_SET_PDEATHSIG = 1
LOG_WARNINGS = 2


class Launch(msgspec.Struct, frozen=True):
    """Everything that a child needs to know."""

    model_path: str
    alias: str
    context_length: int
    """Tokens of one slot."""
    slots: int
    threads: int
    batch_tokens: int
    """Prompt tokens that are computed before anything else gets a turn."""
    api_key: str
    directory: str
    """A private directory; it holds the unix socket and is removed at the end."""
    parent: int
    """Process id of the worker."""
    device: str = ""
    """The device that the model may use, as in `Provider.load`; it reaches the engine through the environment."""
    gpu_layers: int = -1
    chat_template: str = ""
    """A Jinja template in place of the model's own; empty keeps the model's."""
    pooling: str | None = None
    """How embeddings are pooled (`model`, `mean`, `cls`, `last`); None serves none."""

    @property
    def http_threads(self) -> int:
        """Threads of the server: a connection at rest holds one, so there are more of them than slots."""
        return 4 * self.slots + 16


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process with its parent's thread; elsewhere the end of standard input has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def leave(directory: str) -> NoReturn:
    """End at once: the engine's threads hold nothing that is worth an orderly end."""
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def main() -> None:
    """Serve one model. Exits with 1 and the reason on standard error when it cannot be loaded."""
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    die_with_parent(launch.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: leave(launch.directory))
    try:
        server = serve(launch)
    except Exception as problem:
        sys.exit(f"{type(problem).__name__}: {problem}")
    print(f"ready {server.listening_address}", flush=True)
    while sys.stdin.buffer.read(4096):
        pass
    leave(launch.directory)


def serve(launch: Launch):  # type: ignore[no-untyped-def]  # xllamacpp has no types
    """Load the model and start its server."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = launch.model_path
    params.model_alias = {launch.alias}
    params.n_ctx = launch.context_length * launch.slots
    params.n_parallel = launch.slots
    params.n_gpu_layers = launch.gpu_layers
    params.n_batch = params.n_ubatch = launch.batch_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = launch.threads
    params.n_threads_http = launch.http_threads
    # Weights are read, not mapped: the engine lays most kinds out anew for the CPU, and mapped ones would then be
    # resident twice (520 MB in place of 306 for 220 MB of Q4_0; llama.cpp issue 16761). Loading takes as long.
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.fit_params = False  # never a smaller context than asked for
    params.ctx_shift = False  # a full context ends the answer with `length`; nothing is dropped
    # No prompt cache beside the slots, and no copies of sliding windows (32 a slot by default, hundreds of megabytes
    # each for some models): their memory would be outside the lease.
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = True
    params.ui = False
    params.verbosity = LOG_WARNINGS
    params.chat_template = launch.chat_template
    params.embedding = launch.pooling is not None
    if launch.pooling not in (None, "model"):
        params.pooling_type = xllamacpp.llama_pooling_type[f"LLAMA_POOLING_TYPE_{launch.pooling.upper()}"]
    params.api_keys = [launch.api_key]
    socket = Path(launch.directory) / "s.sock"
    # A unix socket's path has at most 104 bytes on some systems; a free loopback port always works.
    params.hostnames = [str(socket)] if len(os.fsencode(socket)) < 100 else ["127.0.0.1"]
    params.port = 0
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
