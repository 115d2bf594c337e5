"""Commands on what runs where: `models`, `workers` and `leases`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel, TypeAdapter
from rich.table import Table

from headrace import steer, units
from headrace.commands import models as model_records
from headrace.commands.failures import plain_failures, stop
from headrace.control_client import ControlPlane, command, control_client
from headrace.errors import HeadraceError
from headrace.fleet import Fleet, followed
from headrace.local import resolve
from headrace.model_facts import read_cards
from headrace.sql import drawn
from headrace.waiting import Awaited, came_true
from schemas.admin import LeaseView, ModelView, WorkerView
from schemas.control import Model
from schemas.events import PoolCommand
from topics.clients import Producer

ACTOR = "headrace command line"

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the admin API gives it.")]
Name = Annotated[str, typer.Argument(metavar="MODEL", help="Id or alias.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is so, for a minute at most.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept with the lease.")]
T = TypeVar("T")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    models = typer.Typer(help="Models: how they stand, and steering them.", no_args_is_help=True)
    models.command("list")(list_models)
    models.command("show")(show_model)
    for action in (load, unload, pin, unpin):
        models.command()(action)
    model_records.add_to(models)
    app.add_typer(models, name="models")
    app.command()(workers)
    held = typer.Typer(help="Leases: who holds which memory.", invoke_without_command=True)
    held.callback()(leases)
    held.command()(release)
    app.add_typer(held, name="leases")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _look(data_dir: Path | None, view: Callable[[Fleet, ControlPlane], T]) -> T:
    async def run() -> T:
        conf = resolve(data_dir)
        async with control_client(conf, timeout=10.0) as client:
            plane = await client.read()
        async with followed(conf) as fleet:
            return view(fleet, plane)

    with plain_failures(HeadraceError):
        return asyncio.run(run())


def _json(views: Sequence[BaseModel]) -> None:
    kind = TypeAdapter(list[BaseModel])
    typer.echo(kind.dump_json(list(views), indent=2, serialize_as_any=True).decode())


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False)


# --- models -------------------------------------------------------------------------------------------------------


def _views(data_dir: Path | None, choose: Callable[[ControlPlane], list[Model]]) -> list[ModelView]:
    with plain_failures(HeadraceError):
        cards = asyncio.run(read_cards(resolve(data_dir)))
    return _look(data_dir, lambda fleet, plane: fleet.model_views(choose(plane), _now_ms(), cards))


def list_models(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List models: where they are, who waits for them, and what a million tokens cost."""
    views = _views(data_dir, lambda plane: list(plane.models.values()))
    if as_json:
        return _json(views)
    table = _table(
        "model", "aliases", "provider", "state", "on", "memory", "queued", "running", "used", "input", "output"
    )
    for view in views:
        table.add_row(
            view.id,
            ", ".join(view.aliases),
            view.provider,
            _state(view),
            ", ".join(lease.worker for lease in view.leases),
            units.size(sum(lease.bytes for lease in view.leases)),
            str(view.queued),
            str(view.running),
            _ago(view.last_used_ms),
            f"{view.price.input} {view.price.currency}",
            f"{view.price.output} {view.price.currency}",
        )
    typer.echo(drawn(table))
    return None


def _state(view: ModelView) -> str:
    words = [view.state if view.enabled else "disabled"]
    words += [view.progress] if view.progress else []
    words += ["pinned"] * view.pinned + ["to be loaded"] * (view.asked == "load")
    return ", ".join(words)


def _ago(at_ms: int | None) -> str:
    return f"{units.age(_now_ms() - at_ms)} ago" if at_ms else ""


def show_model(name: Name, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Show one model: its configuration, its state and its leases."""
    [view] = _views(data_dir, lambda plane: [steer.find(plane.models, name)])
    if as_json:
        typer.echo(view.model_dump_json(indent=2))
        return
    keep = "until another wants the memory" if view.keep_alive_ms is None else units.age(view.keep_alive_ms)
    wait = "unknown" if view.estimated_wait_ms is None else units.age(view.estimated_wait_ms)
    table = Table(box=None, pad_edge=False, show_header=False)
    for field, value in (
        ("model", view.id),
        ("aliases", ", ".join(view.aliases)),
        ("provider", f"{view.provider}: {view.backend_tag}"),
        ("pool", view.pool),
        ("is", _facts(view)),
        ("can", ", ".join(view.facts.capabilities) if view.facts is not None else ""),
        ("good for", ", ".join(view.capabilities)),
        ("fallbacks", ", ".join(view.fallbacks)),
        ("state", _state(view)),
        ("error", view.error or ""),
        *(("warning", warning) for warning in view.warnings),
        ("context", f"{view.context_length} tokens, {view.max_concurrency} requests at once on a worker"),
        ("memory", f"{units.size(view.bytes)} expected, loaded in about {units.age(view.load_ms)}"),
        ("kept", "for ever (pinned)" if view.pinned else "for ever (preloaded)" if view.preload else keep),
        ("requests", f"{view.running} running, {view.queued} waiting; the next one waits {wait}"),
        ("last used", _ago(view.last_used_ms)),
        ("price", f"{view.price.input} in, {view.price.output} out, {view.price.cached} cached {view.price.currency}"),
    ):
        if value:
            table.add_row(field, value)
    typer.echo(drawn(table))
    if view.leases:
        typer.echo("\n" + drawn(_lease_table(view.leases)))


def _facts(view: ModelView) -> str:
    """What the model itself is, in one line; what is not known is left out."""
    facts = view.facts
    if facts is None:
        return ""
    words = [
        facts.architecture,
        f"{facts.parameters / 1e6:,.0f} M parameters" * bool(facts.parameters),
        facts.quantisation,
        f"{facts.context_length} tokens of context" * bool(facts.context_length),
        f"chat template {facts.template_digest}" * facts.chat_template,
    ]
    return ", ".join(word for word in words if word)


def load(name: Name, wait: Wait = True, reason: Reason = "", data_dir: DataDir = None) -> None:
    """Bring a model into memory; idle models give way."""
    _ask(data_dir, name, wait, lambda fleet, model: steer.load(fleet, model, actor=ACTOR, reason=reason))


def unload(name: Name, wait: Wait = True, reason: Reason = "", data_dir: DataDir = None) -> None:
    """Let a model's requests end and give its memory back; it stays out until somebody calls it."""
    _ask(data_dir, name, wait, lambda fleet, model: steer.unload(fleet, model, actor=ACTOR, reason=reason))


def _ask(data_dir: Path | None, name: str, wait: bool, wish: Callable[[Fleet, Model], PoolCommand]) -> None:
    """Send a wish, and wait for what comes of it."""

    async def run() -> None:
        conf = resolve(data_dir)
        async with control_client(conf, timeout=10.0) as client:
            model = steer.find((await client.read()).models, name)
        async with followed(conf) as fleet, Producer(conf.kafka, f"{conf.instance}-steer") as producer:
            asked = wish(fleet, model)
            offset = await steer.send(producer, asked)
            if not wait:
                typer.echo(f"asked to {asked.kind.value} {model.id} ({asked.id})")
                return
            began = _now_ms()
            typer.echo(f"{await came_true(fleet, Awaited(asked, offset))} after {units.age(_now_ms() - began)}")

    with plain_failures(HeadraceError):
        asyncio.run(run())


def pin(name: Name, data_dir: DataDir = None) -> None:
    """Load a model and keep it in memory for ever (until the next `headrace apply` says otherwise)."""
    _set_pinned(data_dir, name, pinned=True)


def unpin(name: Name, data_dir: DataDir = None) -> None:
    """Let a model give way to others again."""
    _set_pinned(data_dir, name, pinned=False)


def _set_pinned(data_dir: Path | None, name: str, *, pinned: bool) -> None:
    word = "pinned" if pinned else "unpinned"

    async def run() -> Model:
        async with control_client(resolve(data_dir), timeout=10.0) as client:
            model = steer.find((await client.read()).models, name)
            await client.submit([command(steer.pin(model, pinned=pinned), actor=ACTOR, reason=word)])
            return model

    with plain_failures(HeadraceError):
        before = asyncio.run(run())
    typer.echo(f"{before.id} was {word} before" if before.pinned is pinned else f"{word} {before.id}")


# --- workers and leases -------------------------------------------------------------------------------------------


def workers(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List workers: whether they are heard, what memory they have, and what is on it."""
    views: list[WorkerView] = _look(data_dir, lambda fleet, _: fleet.worker_views(_now_ms()))
    if as_json:
        return _json(views)
    table = _table("worker", "pool", "status", "heard", "running", "memory", "models")
    for view in views:
        memory = (
            f"{units.size(one.held_bytes)} of {units.size(one.bytes)} ({one.id}{_busy(one.utilisation)})"
            for one in view.devices
        )
        table.add_row(
            view.id,
            view.pool,
            view.status,
            f"{units.age(view.age_ms)} ago",
            str(view.running),
            ", ".join(memory) or "not counted",
            ", ".join(f"{held.model} ({held.state})" for held in view.residents),
        )
    typer.echo(drawn(table))
    return None


def _busy(utilisation: float | None) -> str:
    return f", {utilisation:.0%} busy" if utilisation is not None else ""


def leases(context: typer.Context, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List the leases that have not ended."""
    if context.invoked_subcommand is not None:
        return None
    views: list[LeaseView] = _look(data_dir, lambda fleet, _: fleet.lease_views())
    if as_json:
        return _json(views)
    typer.echo(drawn(_lease_table(views)))
    return None


def _lease_table(views: Sequence[LeaseView]) -> Table:
    table = _table("worker", "model", "state", "for", "memory", "device", "epoch", "reason")
    for view in views:
        since, size = units.age(_now_ms() - view.since_ms), units.size(view.bytes)
        table.add_row(view.worker, view.model, view.state, since, size, view.device, str(view.epoch), view.reason)
    return table


def release(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="Id of the worker.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id of the model.")],
    reason: Annotated[str, typer.Option("--reason", help="How you know that the bytes are free; it is kept.")],
    data_dir: DataDir = None,
) -> None:
    """Say that the quarantined bytes of a lease are free, so that they are granted again."""

    async def run() -> None:
        conf = resolve(data_dir)
        async with followed(conf) as fleet, Producer(conf.kafka, f"{conf.instance}-steer") as producer:
            asked = steer.release(fleet, worker, model, actor=ACTOR, reason=reason)
            typer.echo(await came_true(fleet, Awaited(asked, await steer.send(producer, asked))))

    if not reason.strip():
        raise stop("say how you know that the bytes are free: --reason TEXT")
    with plain_failures(HeadraceError):
        asyncio.run(run())
