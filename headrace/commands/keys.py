"""`headrace keys`: API keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import Console

from headrace import api_keys, records
from headrace.commands.failures import stop
from headrace.commands.records import (
    AsJson,
    Budget,
    Concurrency,
    DataDir,
    OnlyApp,
    OnlyEnabled,
    Reason,
    Rpm,
    Search,
    Tpm,
    body,
    change,
    create,
    day,
    limit,
    limits,
    print_json,
    print_one,
    read,
    table_of,
    with_client,
    yes,
)
from headrace.control_client import ControlClient, ControlPlane
from schemas.admin_records import KeyCreate, KeyMade, KeyPatch
from schemas.control import DEFAULT_APP, Key

Which = Annotated[str, typer.Argument(metavar="KEY", help="Its id, its text, or its name where only one has it.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Model it may use (may be repeated); * for all.")]
Role = Annotated[str | None, typer.Option("--role", help="owner, admin, member or viewer.")]
Owner = Annotated[str | None, typer.Option("--owner", metavar="USER", help="Id of the user whose key it is.")]
Expires = Annotated[str | None, typer.Option("--expires-at", metavar="TIME", help="2030-01-31T00:00:00Z, or none.")]
Days = Annotated[int | None, typer.Option("--expires-days", min=1, help="Days until it expires.")]


def group() -> typer.Typer:
    """The commands."""
    made = typer.Typer(help="API keys.", no_args_is_help=True)
    for name, work in (("create", new), ("list", list_all), ("show", show), ("update", update), ("revoke", revoke)):
        made.command(name)(work)
    return made


def new(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")],
    app: Annotated[str, typer.Option("--app", help="App that it belongs to.")] = DEFAULT_APP,
    model: Models = None,
    role: Role = None,
    owner: Owner = None,
    expires_at: Expires = None,
    expires_days: Days = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    monthly_budget: Budget = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Create a key and show it, this once."""
    fields = {
        "name": name, "app": app, "role": role, "owner_id": owner, "allowed_models": _models(model),
        "expires_at": _expiry(expires_at, expires_days), **limits(rpm, tpm, concurrency, monthly_budget),
    }  # fmt: skip
    asked, text = body(KeyCreate, fields), api_keys.new_key()

    async def work(client: ControlClient) -> Key:
        key = records.new_key(asked, text, (await client.read()).models)
        await create(client, key, reason=reason)
        return (await client.read()).keys[key.sha256]

    key = with_client(data_dir, work)
    if as_json:
        print_json(KeyMade(**records.key_view(key).model_dump(), key=text))
        return
    typer.echo(text)
    typer.echo(f"{key.id} is in force. Only its SHA-256 is kept: it is not shown again.", err=True)


def list_all(
    app: OnlyApp = None,
    owner: Owner = None,
    enabled: OnlyEnabled = None,
    search: Search = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List keys; never their text."""
    views = [
        records.key_view(key)
        for key in read(data_dir).keys.values()
        if records.is_wanted(key, search, enabled, app=app, owner_id=owner)
    ]
    if as_json:
        return print_json(views)
    table = table_of("key", "name", "app", "role", "models", "rpm", "tpm", "at once", "budget", "expires", "enabled")
    for view in views:
        models = "all" if view.allowed_models == "*" else ", ".join(view.allowed_models)
        caps = map(limit, (view.rate_limit_rpm, view.rate_limit_tpm, view.concurrency_limit, view.monthly_budget))
        table.add_row(
            view.id, view.name, view.app, view.role, models, *caps, day(view.expires_at), yes(view.enabled)
        )  # fmt: skip
    Console().print(table)
    return None


def show(key: Which, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Show one key; never its text."""
    found = _find(read(data_dir), key)
    if found is None:
        raise stop(_missing(key))
    print_one(records.key_view(found), as_json)


def update(
    key: Which,
    name: Annotated[str | None, typer.Option("--name", help="What the key is for.")] = None,
    model: Models = None,
    role: Role = None,
    owner: Owner = None,
    expires_at: Expires = None,
    expires_days: Days = None,
    enabled: Annotated[bool | None, typer.Option("--enabled/--disabled", help="Whether it is good.")] = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Concurrency = None,
    monthly_budget: Budget = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Change a key, in force at once."""
    fields = {
        "name": name, "role": role, "owner_id": owner, "allowed_models": _models(model), "enabled": enabled,
        "expires_at": _expiry(expires_at, expires_days), **limits(rpm, tpm, concurrency, monthly_budget),
    }  # fmt: skip
    patch = body(KeyPatch, fields)
    if not patch.model_fields_set:
        raise stop("say what to change; see --help")
    _, after = change(
        data_dir,
        lambda plane: _find(plane, key),
        lambda before, plane: records.changed_key(before, patch, plane.models),
        missing=_missing(key),
        reason=reason,
    )
    print_one(records.key_view(after), as_json)


def revoke(key: Which, reason: Reason = "revoked", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Revoke a key: it is refused from the moment that this returns, and its running answers end."""
    patch = KeyPatch(enabled=False)
    before, after = change(
        data_dir,
        lambda plane: _find(plane, key),
        lambda held, _: records.changed_key(held, patch, {}),
        missing=_missing(key),
        reason=reason,
    )
    if as_json:
        return print_json(records.key_view(after))
    typer.echo(f"revoked {after.id} ({after.name})" if before.enabled else f"{after.id} was revoked before")
    return None


def _find(plane: ControlPlane, key: str) -> Key | None:
    keys = plane.keys.values()
    found = [held for held in keys if key == held.id or api_keys.sha256(key) == held.sha256]
    found = found or [held for held in keys if held.name == key and held.enabled]
    if len(found) > 1:
        raise stop(f"{len(found)} keys have this name; say which: {', '.join(held.id for held in found)}")
    return found[0] if found else None


def _missing(_: str) -> str:
    return "there is no such key; `headrace keys list` shows ids"


def _models(names: list[str] | None) -> Any:
    return "*" if names == ["*"] else names or None


def _expiry(at: str | None, days: int | None) -> str | None:
    if at is not None and days is not None:
        raise stop("give --expires-at or --expires-days, not both")
    return (datetime.now(UTC) + timedelta(days=days)).isoformat() if days is not None else at
