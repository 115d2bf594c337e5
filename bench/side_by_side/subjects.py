"""What is measured: a genuine Ollama, Headrace with llama.cpp, and Headrace before that same Ollama."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.gateway.processes import NotReady, child, ready_line, wait_ready
from bench.gateway.stack import STOP_SECONDS, data_dir, up_command
from bench.side_by_side import ollama
from bench.side_by_side.client import Server
from bench.side_by_side.workload import CONTEXT, MODELS, SLOTS, TENANTS
from deploy.embedded.ports import PortBook
from deploy.embedded.stack import discover
from headrace.control_client import command, control_client
from headrace.settings import Settings
from processors.generation.providers.factory import make_provider
from schemas.control import App, Key, Model, Provider

ROOM = 2.5
"""Memory in models: holds two, and not three."""
START_SECONDS = 180.0
OLLAMA = {
    "OLLAMA_MAX_LOADED_MODELS": "2",
    "OLLAMA_NUM_PARALLEL": str(SLOTS),
    "OLLAMA_CONTEXT_LENGTH": str(CONTEXT),
}
"""The same work: as many models, slots and tokens as Headrace's records say."""
PROVIDER = "local"
ANY_MEMORY = 1 << 40
OLLAMA_ALONE, HEADRACE, HEADRACE_OLLAMA = "ollama", "headrace", "headrace+ollama"
SUBJECTS = (OLLAMA_ALONE, HEADRACE, HEADRACE_OLLAMA)


class Subject(msgspec.Struct, kw_only=True):
    """A server that runs."""

    name: str
    server: Server
    roots: list[int]
    """Ids of the processes whose trees it consists of."""
    budget: int = 0
    """Bytes that its models may take; 0 where they are counted as models."""


@contextmanager
def running(
    name: str, directory: Path, models: Mapping[str, Path], program: Path, threads: int | None
) -> Iterator[Subject]:
    """A subject for the length of a block, with its data and logs under `directory`. Raises `NotReady`."""
    directory.mkdir()
    if name == HEADRACE:
        folder = next(iter(models.values())).parent
        with _headrace(directory, Provider(PROVIDER, "llama_cpp", options={"model_dir": str(folder)})) as made:
            yield made
        return
    port = PortBook(directory / "ports.json").port("ollama")
    with ollama.serving(program, directory, port, models, OLLAMA, threads) as (url, pid):
        if name == OLLAMA_ALONE:
            yield Subject(name=name, server=Server(base_url=f"{url}/v1", keys={}), roots=[pid])
            return
        record = Provider(PROVIDER, "ollama", base_url=url, options={"memory_bytes": ANY_MEMORY, "parallel": SLOTS})
        with _headrace(directory, record) as made:
            yield msgspec.structs.replace(made, name=name, roots=[*made.roots, pid])


@contextmanager
def _headrace(directory: Path, record: Provider) -> Iterator[Subject]:
    budget = int(ROOM * asyncio.run(need(record)))
    if "memory_bytes" in record.options:
        record = msgspec.structs.replace(record, options={**record.options, "memory_bytes": budget})
    config = directory / "headrace.toml"
    config.write_text(toml(record))
    environ = {"HEADRACE_ADMIN_KEY": f"hr-bench-{secrets.token_hex(16)}", "HEADRACE_WORKER_MEMORY": str(budget)}
    command_line, log = up_command(config, data_dir(directory)), directory / "headrace.log"
    with child(command_line, log, env=environ, cwd=directory, grace=STOP_SECONDS) as process:
        url = wait_ready(process, log, ready_line, START_SECONDS)
        keys = asyncio.run(tenants(data_dir(directory)))
        server = Server(base_url=f"{url}/v1", keys=keys)
        yield Subject(name=HEADRACE, server=server, roots=[process.pid], budget=budget)


async def need(record: Provider) -> int:
    """Bytes that one of the models is expected to take. Raises `ProviderError`."""
    provider = make_provider(record)
    try:
        model = Model("one", record.name, MODELS[0], context_length=CONTEXT, max_concurrency=SLOTS)
        return (await provider.inspect(model)).bytes
    finally:
        await provider.close()


def toml(record: Provider) -> str:
    """The configuration of a stack with that provider and the three models."""
    options = ", ".join(f"{name} = {msgspec.json.encode(value).decode()}" for name, value in record.options.items())
    where = f'base_url = "{record.base_url}"\n' if record.base_url else ""
    text = f'[[providers]]\nname = "{record.name}"\nkind = "{record.kind}"\n{where}options = {{ {options} }}\n'
    for name in MODELS:
        text += (
            f'[[models]]\nid = "{name}"\nprovider = "{record.name}"\nbackend_tag = "{name}"\n'
            f"context_length = {CONTEXT}\nmax_concurrency = {SLOTS}\npreload = false\n"
        )
    return text


async def tenants(data: Path) -> dict[str, str]:
    """An app and a key for each tenant; the keys. Raises `NotReady`."""
    found = discover(data)
    if found is None:
        raise NotReady("the stack has no record")
    settings = Settings(kafka_bootstrap=found.kafka_bootstrap, redis_url=found.redis_url, data_dir=data)
    keys = {tenant: f"hr-{secrets.token_hex(16)}" for tenant in TENANTS}
    async with control_client(settings) as control:
        for tenant, text in keys.items():
            key = Key(f"k-{tenant}", hashlib.sha256(text.encode()).hexdigest(), tenant, tenant)
            await control.submit([command(App(tenant, tenant), actor="bench"), command(key, actor="bench")])
    return keys
