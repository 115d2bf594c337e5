"""`headrace models create|update|disable`: which models there are; how they stand is `fleet`'s."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from headrace import records, steer
from headrace.commands.failures import stop
from headrace.commands.records import (
    AsJson,
    Concurrency,
    DataDir,
    Reason,
    Rpm,
    Tpm,
    body,
    change,
    create,
    limits,
    with_client,
)
from headrace.control_client import ControlClient, ControlPlane
from headrace.errors import ModelNotFound
from schemas.admin_records import ModelCreate, ModelPatch
from schemas.control import Model

Which = Annotated[str, typer.Argument(metavar="MODEL", help="Id or alias.")]
Provider = Annotated[str | None, typer.Option("--provider", help="Name of a provider.")]
Tag = Annotated[str | None, typer.Option("--tag", help="The model as the provider knows it.")]
Aliases = Annotated[list[str] | None, typer.Option("--alias", help="Another name; may be repeated.")]
Context = Annotated[int | None, typer.Option("--context-length", help="Tokens of prompt and completion.")]
Slots = Annotated[int | None, typer.Option("--max-concurrency", help="Requests at once on a worker.")]
Capabilities = Annotated[list[str] | None, typer.Option("--capability", help="What it is good for; may be repeated.")]
Fallbacks = Annotated[list[str] | None, typer.Option("--fallback", help="Who serves when it cannot; may be repeated.")]
Pool = Annotated[str | None, typer.Option("--pool", help="Pool of workers that serves it.")]
Preload = Annotated[bool | None, typer.Option("--preload/--no-preload", help="Load it before it is asked.")]
MaxTokens = Annotated[int | None, typer.Option("--default-max-tokens", help="Cap where the caller names none.")]


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
    alias: Aliases = None,
    context_length: Context = None,
    max_concurrency: Slots = None,
    capability: Capabilities = None,
    fallback: Fallbacks = None,
    pool: Pool = None,
    preload: Preload = None,
    default_max_tokens: MaxTokens = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Create a model that callers may name; `headrace apply` leaves it alone."""
    fields = _fields(alias, context_length, max_concurrency, capability, fallback, pool, preload, default_max_tokens)
    named = {"id": model_id, "provider": provider, "backend_tag": tag}
    price = {"price": {"input": input_price, "output": output}}
    made = records.new_model(body(ModelCreate, named | price | fields | _caps(rpm, tpm, concurrency)))

    async def work(client: ControlClient) -> Model:
        await create(client, made, reason=reason)
        return (await client.read()).models[made.id]

    _say("created", with_client(data_dir, work), as_json)


def update(
    model: Which,
    provider: Provider = None,
    tag: Tag = None,
    alias: Aliases = None,
    context_length: Context = None,
    max_concurrency: Slots = None,
    capability: Capabilities = None,
    fallback: Fallbacks = None,
    pool: Pool = None,
    preload: Preload = None,
    default_max_tokens: MaxTokens = None,
    enabled: Annotated[bool | None, typer.Option("--enabled/--disabled", help="Whether it serves.")] = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Change a model, in force at once; `headrace apply` undoes it where headrace.toml names the model."""
    fields = _fields(alias, context_length, max_concurrency, capability, fallback, pool, preload, default_max_tokens)
    named = {"provider": provider, "backend_tag": tag, "enabled": enabled}
    patch = body(ModelPatch, named | fields | _caps(rpm, tpm, concurrency))
    if not patch.model_fields_set:
        raise stop("say what to change; see --help")
    _say("updated", _change(data_dir, model, patch, reason), as_json)


def disable(model: Which, reason: Reason = "disabled", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Disable a model: nobody is given it any more. Its usage and prices stay."""
    _say("disabled", _change(data_dir, model, ModelPatch(enabled=False, fallbacks=[]), reason), as_json)


def _caps(rpm: str | None, tpm: str | None, concurrency: str | None) -> dict[str, Any]:
    return {name: value for name, value in limits(rpm, tpm, concurrency).items() if value is not None}


def _fields(
    alias: list[str] | None, context_length: int | None, max_concurrency: int | None, capability: list[str] | None,
    fallback: list[str] | None, pool: str | None, preload: bool | None, default_max_tokens: int | None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "aliases": alias, "context_length": context_length, "max_concurrency": max_concurrency,
        "capabilities": capability, "fallbacks": fallback, "pool": pool, "preload": preload,
        "default_max_tokens": default_max_tokens,
    }  # fmt: skip


def _change(data_dir: DataDir, model: str, patch: ModelPatch, reason: str) -> Model:
    _, after = change(
        data_dir,
        lambda plane: _find(plane, model),
        lambda before, _: records.changed_model(before, patch),
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
