"""Commands on the control plane: `apply`, `providers`, `apps` and `keys`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from headrace import api_keys
from headrace.apply import apply_config
from headrace.commands.failures import plain_failures, stop
from headrace.config import DEFAULT_APP, ConfigError, load_config
from headrace.control_client import ControlClient, ControlPlane, command, control_client
from headrace.errors import HeadraceError
from headrace.local import resolve
from headrace.settings import Settings
from schemas.control import ANY_MODEL, MAX_WEIGHT, MIN_WEIGHT, App, Key

ACTOR = "headrace command line"
DEFAULT_CONFIG = Path("headrace.toml")

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
]
_WEIGHT = "Its share of a model that several apps wait for."
Weight = Annotated[float, typer.Option("--weight", help=_WEIGHT, min=MIN_WEIGHT, max=MAX_WEIGHT)]
T = TypeVar("T")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(apply)
    providers = typer.Typer(help="Places where models run.", no_args_is_help=True)
    providers.command("list")(list_providers)
    app.add_typer(providers, name="providers")
    apps = typer.Typer(help="Apps: the tenants that keys belong to.", no_args_is_help=True)
    apps.command("create")(create_app)
    apps.command("update")(update_app)
    apps.command("list")(list_apps)
    app.add_typer(apps, name="apps")
    keys = typer.Typer(help="API keys.", no_args_is_help=True)
    keys.command("create")(create_key)
    keys.command("list")(list_keys)
    keys.command("revoke")(revoke_key)
    app.add_typer(keys, name="keys")


def apply(
    config: Annotated[
        Path | None, typer.Option("--config", help="Default: $HEADRACE_CONFIG, ./headrace.toml, the built-in model.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Put what headrace.toml says into force, and wait until it is."""
    with plain_failures(HeadraceError, ConfigError):
        conf = resolve(data_dir)
        found = load_config(config_path(config, conf))
        done = asyncio.run(apply_config(conf, found, admin_key=api_keys.find_admin_key(conf)))
    for line in done or ["nothing to do"]:
        typer.echo(line)


def config_path(given: Path | None, settings: Settings) -> Path | None:
    """The file to read: the given one, else that of HEADRACE_CONFIG, else ./headrace.toml; None when there is none."""
    return given or settings.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)


def _with_client(data_dir: Path | None, work: Callable[[ControlClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with control_client(resolve(data_dir), timeout=10.0) as client:
            return await work(client)

    with plain_failures(HeadraceError):
        return asyncio.run(run())


def _read(data_dir: Path | None) -> ControlPlane:
    return _with_client(data_dir, lambda client: client.read())


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    return table


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def list_providers(data_dir: DataDir = None) -> None:
    """List providers, with the models they serve."""
    plane = _read(data_dir)
    table = _table("provider", "kind", "base url", "key from", "models")
    for provider in plane.providers.values():
        served = [model.id for model in plane.models.values() if model.provider == provider.name and model.enabled]
        table.add_row(
            provider.name, provider.kind, provider.base_url or "", provider.api_key_env or "", ", ".join(served)
        )
    Console().print(table)


def create_app(
    app_id: Annotated[str, typer.Argument(metavar="ID", help="Short name that keys, limits and bills refer to.")],
    name: Annotated[str | None, typer.Option("--name", help="Name for people; default: the id.")] = None,
    weight: Weight = 1.0,
    data_dir: DataDir = None,
) -> None:
    """Create an app."""

    async def work(client: ControlClient) -> bool:
        if app_id in (await client.read()).apps:
            return False
        await client.submit([command(App(id=app_id, name=name or app_id, weight=weight), actor=ACTOR)])
        return True

    if not _with_client(data_dir, work):
        raise stop(f"there is an app {app_id!r} already")
    typer.echo(f"created app {app_id}")


def update_app(
    app_id: Annotated[str, typer.Argument(metavar="ID", help="The app.")],
    name: Annotated[str | None, typer.Option("--name", help="Name for people.")] = None,
    weight: Annotated[float | None, typer.Option("--weight", help=_WEIGHT, min=MIN_WEIGHT, max=MAX_WEIGHT)] = None,
    data_dir: DataDir = None,
) -> None:
    """Change an app's name or weight, in force at once."""
    changes = {field: value for field, value in (("name", name), ("weight", weight)) if value is not None}
    if not changes:
        raise stop("say what to change: --name or --weight")

    async def work(client: ControlClient) -> bool:
        found = (await client.read()).apps.get(app_id)
        if found is not None:
            await client.submit([command(msgspec.structs.replace(found, **changes), actor=ACTOR)])
        return found is not None

    if not _with_client(data_dir, work):
        raise stop(f"there is no app {app_id!r}; `headrace apps list` shows them")
    typer.echo(f"updated app {app_id}")


def list_apps(data_dir: DataDir = None) -> None:
    """List apps, with the number of their enabled keys."""
    plane = _read(data_dir)
    table = _table("app", "name", "weight", "keys", "enabled")
    for found in plane.apps.values():
        count = sum(key.app == found.id and key.enabled for key in plane.keys.values())
        table.add_row(found.id, found.name, f"{found.weight:g}", str(count), _yes(found.enabled))
    Console().print(table)


def create_key(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")],
    app: Annotated[str, typer.Option("--app", help="App that it belongs to.")] = DEFAULT_APP,
    model: Annotated[list[str] | None, typer.Option("--model", help="Model it may use; may be repeated.")] = None,
    expires_days: Annotated[int | None, typer.Option("--expires-days", min=1, help="Days until it expires.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Create a key and show it, this once."""
    text = api_keys.new_key()
    digest = api_keys.sha256(text)
    expiry = datetime.now(UTC) + timedelta(days=expires_days) if expires_days is not None else None
    record = Key(
        id=f"key-{digest[:12]}",
        sha256=digest,
        name=name,
        app=app,
        expires_at=expiry.timestamp() if expiry is not None else None,
    )

    async def work(client: ControlClient) -> None:
        allowed = _model_ids(await client.read(), model) if model else (ANY_MODEL,)
        await client.submit([command(msgspec.structs.replace(record, allowed_models=allowed), actor=ACTOR)])

    _with_client(data_dir, work)
    typer.echo(text)
    typer.echo(f"{record.id} is in force. Only its SHA-256 is kept: it is not shown again.", err=True)


def _model_ids(plane: ControlPlane, names: list[str]) -> tuple[str, ...]:
    """The ids of models that are named by id or alias; a name that is none is left for the refusal to name."""
    ids = {alias: model.id for model in plane.models.values() if model.enabled for alias in model.aliases}
    ids |= {model.id: model.id for model in plane.models.values() if model.enabled}
    return tuple(dict.fromkeys(ids.get(name, name) for name in names))


def list_keys(data_dir: DataDir = None) -> None:
    """List keys; never their text."""
    table = _table("key", "name", "app", "role", "models", "expires", "enabled")
    for key in _read(data_dir).keys.values():
        expiry = (
            datetime.fromtimestamp(key.expires_at, UTC).strftime("%Y-%m-%d") if key.expires_at is not None else "never"
        )
        models = "all" if ANY_MODEL in key.allowed_models else ", ".join(key.allowed_models)
        table.add_row(key.id, key.name, key.app, key.role, models, expiry, _yes(key.enabled))
    Console().print(table)


def revoke_key(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Its id, its text, or its name where only one has it.")],
    data_dir: DataDir = None,
) -> None:
    """Revoke a key: it is refused from the moment that this returns."""

    async def work(client: ControlClient) -> list[Key]:
        keys = (await client.read()).keys.values()
        found = [held for held in keys if key == held.id or api_keys.sha256(key) == held.sha256]
        found = found or [held for held in keys if held.name == key and held.enabled]
        if len(found) == 1 and found[0].enabled:
            await client.submit(
                [command(msgspec.structs.replace(found[0], enabled=False), actor=ACTOR, reason="revoked")]
            )
        return found

    found = _with_client(data_dir, work)
    if not found:
        raise stop("there is no such key; `headrace keys list` shows ids")
    if len(found) > 1:
        raise stop(f"{len(found)} keys have this name; say which: {', '.join(held.id for held in found)}")
    typer.echo(f"revoked {found[0].id} ({found[0].name})" if found[0].enabled else f"{found[0].id} was revoked before")
