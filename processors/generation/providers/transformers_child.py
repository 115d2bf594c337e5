"""What runs in a child process of the `transformers` provider: one PyTorch model, until its worker goes away.

Started as `python -m processors.generation.providers.transformers_child`; `child` says how it is talked to.
"""

from __future__ import annotations

import socket
import threading

from processors.generation.providers import child


class Launch(child.ChildLaunch, frozen=True, kw_only=True):
    """Everything that a child needs to know."""

    tag: str
    """A folder, or a name in the Hugging Face hub."""
    torch_device: str | None = None
    """PyTorch's name of a device; None takes the first GPU, or the CPU."""
    dtype: str = "auto"
    step_s: float
    """Seconds after which an engine that is still in the same step hangs."""
    chat_template: str = ""
    """A Jinja template in place of the model's own; empty keeps the model's."""


def serve(launch: Launch) -> tuple[str, object]:
    """Load the model and its adapters, and serve them in threads."""
    import torch
    import uvicorn
    from transformers.utils import logging

    from processors.generation.providers.hf.adapters import AdapterError
    from processors.generation.providers.hf.app import App
    from processors.generation.providers.hf.loading import load

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(launch.threads)
    loaded = load(
        launch.tag,
        context=launch.context_length,
        slots=launch.slots,
        device=launch.torch_device,
        dtype=launch.dtype,
        chat_template=launch.chat_template,
    )
    app = App(
        loaded,
        alias=launch.alias,
        api_key=launch.api_key,
        context=launch.context_length,
        slots=launch.slots,
        budget=launch.batch_tokens,
        step_s=launch.step_s,
    )
    for name, path in launch.adapters.items():
        try:
            app.adapters.load(name, path)
        except AdapterError as problem:
            app.adapter_faults[name] = str(problem)
    app.engine.start()
    listening, address = _listen(launch)
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listening],), name="http", daemon=True).start()
    return address, server


def _listen(launch: Launch) -> tuple[socket.socket, str]:
    """A socket that already accepts, so that `ready` is true whenever it is read."""
    if path := child.socket_path(launch):
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(path)
        address = f"unix://{path}"
    else:
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.listen(256)
    return listening, address


if __name__ == "__main__":
    child.run(Launch, serve)
