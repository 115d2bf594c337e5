"""`headrace apps`: the tenants, to which keys, limits and bills belong."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from rich.console import Console

from headrace import records
from headrace.commands.failures import stop
from headrace.commands.records import (
    AsJson,
    Budget,
    Concurrency,
    DataDir,
    OnlyEnabled,
    Reason,
    Rpm,
    Search,
    Tpm,
    body,
    change,
    create,
    limit,
    limits,
    merged,
    pair,
    print_json,
    print_one,
    read,
    table_of,
    with_client,
    yes,
)
from headrace.control_client import ControlClient
from schemas.admin_records import AppCreate, AppPatch
from schemas.control import MAX_WEIGHT, MIN_WEIGHT, App

_WEIGHT = "Its share of a model that several apps wait for."
Which = Annotated[str, typer.Argument(metavar="ID", help="The app.")]
Weight = Annotated[float | None, typer.Option("--weight", help=_WEIGHT, min=MIN_WEIGHT, max=MAX_WEIGHT)]
Publishers = Annotated[
    list[str] | None,
    typer.Option(
        "--publisher", metavar="NAME=KEY", help="Ed25519 public key in base64, or a PEM file of it; may be repeated."
    ),
]
ByteRate = Annotated[
    int | None, typer.Option("--producer-byte-rate", min=1, help="Bytes a second of its publishers, on each broker.")
]


def group() -> typer.Typer:
    """The commands."""
    made = typer.Typer(help="Apps: the tenants that keys belong to.", no_args_is_help=True)
    for name, work in (("create", new), ("list", list_all), ("show", show), ("update", update), ("disable", disable)):
        made.command(name)(work)
    return made


def new(
    app_id: Annotated[str, typer.Argument(metavar="ID", help="Short name that keys, limits and bills refer to.")],
    name: Annotated[str | None, typer.Option("--name", help="Name for people; default: the id.")] = None,
    weight: Weight = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    monthly_budget: Budget = None,
    publisher: Publishers = None,
    producer_byte_rate: ByteRate = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Create an app."""
    fields = {
        "id": app_id, "name": name or app_id, "weight": weight, "producer_byte_rate": producer_byte_rate,
        "publishers": dict(map(_publisher, publisher or ())), **limits(rpm, tpm, concurrency, monthly_budget),
    }  # fmt: skip
    app = records.new_app(body(AppCreate, fields))

    async def work(client: ControlClient) -> App | None:
        if app_id in (await client.read()).apps:
            return None
        await create(client, app, reason=reason)
        return (await client.read()).apps[app_id]

    made = with_client(data_dir, work)
    if made is None:
        raise stop(f"there is an app {app_id!r} already")
    if as_json:
        return print_json(records.app_view(made))
    typer.echo(f"created app {app_id}")
    return None


def list_all(
    enabled: OnlyEnabled = None, search: Search = None, as_json: AsJson = False, data_dir: DataDir = None
) -> None:
    """List apps, with the number of their enabled keys."""
    plane = read(data_dir)
    apps = [app for app in plane.apps.values() if records.is_wanted(app, search, enabled)]
    if as_json:
        return print_json([records.app_view(app) for app in apps])
    table = table_of("app", "name", "weight", "keys", "rpm", "tpm", "at once", "budget", "enabled")
    for found in apps:
        count = sum(key.app == found.id and key.enabled for key in plane.keys.values())
        caps = map(limit, (found.rate_limit_rpm, found.rate_limit_tpm, found.concurrency_limit, found.monthly_budget))
        table.add_row(found.id, found.name, f"{found.weight:g}", str(count), *caps, yes(found.enabled))
    Console().print(table)
    return None


def show(app_id: Which, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Show one app."""
    found = read(data_dir).apps.get(app_id)
    if found is None:
        raise stop(_missing(app_id))
    print_one(records.app_view(found), as_json)


def update(
    app_id: Which,
    name: Annotated[str | None, typer.Option("--name", help="Name for people.")] = None,
    weight: Weight = None,
    enabled: Annotated[bool | None, typer.Option("--enabled/--disabled", help="Whether its keys are good.")] = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    monthly_budget: Budget = None,
    publisher: Publishers = None,
    without_publisher: Annotated[
        list[str] | None, typer.Option("--without-publisher", metavar="NAME", help="Take a publisher's key away.")
    ] = None,
    producer_byte_rate: ByteRate = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Change an app, in force at once."""
    caps = limits(rpm, tpm, concurrency, monthly_budget)
    changes = {"name": name, "weight": weight, "enabled": enabled, "producer_byte_rate": producer_byte_rate, **caps}
    added, keys = list(map(_publisher, publisher or ())), bool(publisher or without_publisher)
    if not body(AppPatch, changes).model_fields_set and not keys:
        raise stop("say what to change, as --name or --weight; see --help")

    def patch(before: App) -> AppPatch:
        held = {"publishers": merged(before.publishers, added, without_publisher)} if keys else {}
        return body(AppPatch, changes | held)

    after = _change(data_dir, app_id, patch, reason)
    if as_json:
        return print_json(records.app_view(after))
    typer.echo(f"updated app {app_id}")
    return None


def disable(app_id: Which, reason: Reason = "disabled", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Disable an app: its keys are refused at once, its answers end. Its id stays its own."""
    after = _change(data_dir, app_id, lambda _: AppPatch(enabled=False), reason)
    if as_json:
        return print_json(records.app_view(after))
    typer.echo(f"disabled app {app_id}")
    return None


def _change(data_dir: DataDir, app_id: str, patch: Callable[[App], AppPatch], reason: str) -> App:
    _, after = change(
        data_dir,
        lambda plane: plane.apps.get(app_id),
        lambda before, _: records.changed_app(before, patch(before)),
        missing=_missing(app_id),
        reason=reason,
    )
    return after


def _publisher(text: str) -> tuple[str, str]:
    """The id and the public key, base64, of `NAME=KEY`; the key itself, or a PEM file of it."""
    key_id, key = pair(text, "NAME=KEY")
    path = Path(key)
    if not path.is_file():
        return key_id, key
    try:
        found = load_pem_public_key(path.read_bytes())
    except ValueError as error:
        raise stop(f"{path}: no public key in PEM: {error}") from None
    if not isinstance(found, Ed25519PublicKey):
        raise stop(f"{path}: not an Ed25519 key")
    return key_id, base64.b64encode(found.public_bytes_raw()).decode()


def _missing(app_id: str) -> str:
    return f"there is no app {app_id!r}; `headrace apps list` shows them"
