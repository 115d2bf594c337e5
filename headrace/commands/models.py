"""`headrace models create|update|disable`: which models there are; how they stand is `fleet`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from headrace import records, steer, units
from headrace.commands.failures import stop
from headrace.commands.records import (
    NONE,
    AsJson,
    Cached,
    Concurrency,
    Currency,
    DataDir,
    Reason,
    Rpm,
    Tpm,
    body,
    change,
    create,
    limits,
    merged,
    pair,
    with_client,
)
from headrace.control_client import ControlClient, ControlPlane
from headrace.errors import ModelNotFound
from schemas.admin_records import Amounts, ModelCreate, ModelPatch
from schemas.control import Model

Which = Annotated[str, typer.Argument(metavar="MODEL", help="Id or alias.")]
Provider = Annotated[str | None, typer.Option("--provider", help="Name of a provider.")]
Tag = Annotated[str | None, typer.Option("--tag", help="The model as the provider knows it.")]
Aliases = Annotated[list[str] | None, typer.Option("--alias", help="Another name; may be repeated; none for none.")]
Context = Annotated[int | None, typer.Option("--context-length", help="Tokens of prompt and completion.")]
Slots = Annotated[int | None, typer.Option("--max-concurrency", help="Requests at once on a worker.")]
Capabilities = Annotated[list[str] | None, typer.Option("--capability", help="What it is good for; may be repeated.")]
Fallbacks = Annotated[
    list[str] | None, typer.Option("--fallback", help="Who serves when it cannot; may be repeated; none for none.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=PLACE", help="LoRA adapter and where it is; may be repeated."),
]
Pool = Annotated[str | None, typer.Option("--pool", help="Pool of workers that serves it.")]
Preload = Annotated[bool | None, typer.Option("--preload/--no-preload", help="Load it before it is asked.")]
Pinned = Annotated[bool | None, typer.Option("--pinned/--no-pinned", help="Load it, and keep it for ever.")]
KeepAlive = Annotated[
    str | None,
    typer.Option("--keep-alive", metavar="TIME", help="How long it stays unused, as 5m; none: until others want it."),
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help='Device memory that it takes, as "4 GiB"; 0B: estimate.')
]
LoadTime = Annotated[str | None, typer.Option("--load-time", metavar="TIME", help="How long a load takes, as 8s.")]
MaxTokens = Annotated[
    str | None,
    typer.Option("--default-max-tokens", metavar="N", help="Cap where the caller names none; none: the context."),
]
Enabled = Annotated[bool | None, typer.Option("--enabled/--disabled", help="Whether it serves.")]


def add_to(group: typer.Typer) -> None:
    """Add the commands to those on models."""
    group.command("create")(new)
    group.command("update")(update)
    group.command("disable")(disable)


def new(
    model_id: Annotated[str, typer.Argument(metavar="ID", help="Name of the model.")],
    provider: Annotated[str, typer.Option("--provider", help="Name of a provider.")],
    tag: Annotated[str, typer.Option("--tag", help="The model as the provider knows it.")],
    input_price: Annotated[str, typer.Option("--input", metavar="MONEY", help="A million prompt tokens.")] = "0",
    output: Annotated[str, typer.Option("--output", metavar="MONEY", help="A million completion tokens.")] = "0",
    cached: Cached = None,
    currency: Currency = None,
    alias: Aliases = None,
    adapter: Adapters = None,
    context_length: Context = None,
    max_concurrency: Slots = None,
    capability: Capabilities = None,
    fallback: Fallbacks = None,
    pool: Pool = None,
    enabled: Enabled = None,
    preload: Preload = None,
    pinned: Pinned = None,
    keep_alive: KeepAlive = None,
    memory: Memory = None,
    load_time: LoadTime = None,
    default_max_tokens: MaxTokens = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Create a model that callers may name; `headrace apply` leaves it alone."""
    price = {"input": input_price, "output": output, "cached": cached, "currency": currency}
    fields = {
        "id": model_id, "provider": provider, "backend_tag": tag, "aliases": alias,
        "adapters": dict(map(pair, adapter or ())), "context_length": context_length,
        "max_concurrency": max_concurrency, "capabilities": capability, "fallbacks": fallback, "pool": pool,
        "enabled": enabled, "preload": preload, "pinned": pinned, "default_max_tokens": default_max_tokens,
        "price": body(Amounts, price), **_measures(keep_alive, memory, load_time), **limits(rpm, tpm, concurrency),
    }  # fmt: skip
    made = records.new_model(body(ModelCreate, fields))

    async def work(client: ControlClient) -> Model:
        await create(client, made, reason=reason)
        return (await client.read()).models[made.id]

    _say("created", with_client(data_dir, work), as_json)


def update(
    model: Which,
    provider: Provider = None,
    tag: Tag = None,
    alias: Aliases = None,
    adapter: Adapters = None,
    without_adapter: Annotated[
        list[str] | None, typer.Option("--without-adapter", metavar="NAME", help="Take an adapter away.")
    ] = None,
    context_length: Context = None,
    max_concurrency: Slots = None,
    capability: Capabilities = None,
    fallback: Fallbacks = None,
    pool: Pool = None,
    enabled: Enabled = None,
    preload: Preload = None,
    pinned: Pinned = None,
    keep_alive: KeepAlive = None,
    memory: Memory = None,
    load_time: LoadTime = None,
    default_max_tokens: MaxTokens = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Change a model, in force at once; `headrace apply` undoes it where headrace.toml names the model."""
    changes = {
        "provider": provider, "backend_tag": tag, "aliases": alias, "context_length": context_length,
        "max_concurrency": max_concurrency, "capabilities": capability, "fallbacks": fallback, "pool": pool,
        "enabled": enabled, "preload": preload, "pinned": pinned, "default_max_tokens": default_max_tokens,
        **_measures(keep_alive, memory, load_time), **limits(rpm, tpm, concurrency),
    }  # fmt: skip
    added, adapters = list(map(pair, adapter or ())), bool(adapter or without_adapter)
    if not body(ModelPatch, changes).model_fields_set and not adapters:
        raise stop("say what to change; see --help")

    def patch(before: Model) -> ModelPatch:
        held = {"adapters": merged(before.adapters, added, without_adapter)} if adapters else {}
        return body(ModelPatch, changes | held)

    _say("updated", _change(data_dir, model, patch, reason), as_json)


def disable(model: Which, reason: Reason = "disabled", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Disable a model: nobody is given it any more. Its usage and prices stay."""
    _say("disabled", _change(data_dir, model, lambda _: ModelPatch(enabled=False, fallbacks=[]), reason), as_json)


def _measures(keep_alive: str | None, memory: str | None, load_time: str | None) -> dict[str, int | str | None]:
    """Times in milliseconds and the size in bytes, among the fields of a body."""
    return {
        "keep_alive_ms": _parsed(keep_alive, units.parse_duration),
        "bytes": _parsed(memory, units.parse_size),
        "load_ms": _parsed(load_time, units.parse_duration),
    }


def _parsed(text: str | None, parse: Callable[[str], int]) -> int | str | None:
    if text is None or text == NONE:
        return text
    try:
        return parse(text)
    except ValueError as error:
        raise stop(f"{text!r}: {error}") from None


def _change(data_dir: DataDir, model: str, patch: Callable[[Model], ModelPatch], reason: str) -> Model:
    _, after = change(
        data_dir,
        lambda plane: _find(plane, model),
        lambda before, _: records.changed_model(before, patch(before)),
        missing=f"there is no model {model!r}; `headrace models list` shows them",
        reason=reason,
    )
    return after


def _find(plane: ControlPlane, name: str) -> Model | None:
    try:
        return steer.find(plane.models, name)
    except ModelNotFound:
        return None


def _say(done: str, model: Model, as_json: bool) -> None:
    if as_json:
        typer.echo(records.model_json(model))
    else:
        typer.echo(f"{done} model {model.id}")
