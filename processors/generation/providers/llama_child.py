"""What runs in a llama.cpp child process: one xllamacpp server for one model, until its worker goes away.

Started as `python -m processors.generation.providers.llama_child`; `child` says how it is talked to.
"""

from __future__ import annotations

from processors.generation.providers import child

LOG_WARNINGS = 2


class Launch(child.ChildLaunch, frozen=True, kw_only=True):
    """Everything that a child needs to know."""

    model_path: str
    gpu_layers: int = -1
    chat_template: str = ""
    """A Jinja template in place of the model's own; empty keeps the model's."""
    pooling: str | None = None
    """How embeddings are pooled (`model`, `mean`, `cls`, `last`); None serves none."""

    @property
    def http_threads(self) -> int:
        """Threads of the server: a connection at rest holds one, so there are more of them than slots."""
        return 4 * self.slots + 16


def serve(launch: Launch) -> tuple[str, object]:
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
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in launch.adapters.values()]
    params.api_keys = [launch.api_key]
    params.hostnames = [child.socket_path(launch) or "127.0.0.1"]
    params.port = 0
    server = xllamacpp.Server(params)
    return server.listening_address, server


if __name__ == "__main__":
    child.run(Launch, serve)
