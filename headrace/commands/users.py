"""`headrace users`: who may sign in. Passwords come from a prompt or from stdin, never from the command line."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
import uuid_utils
from rich.console import Console

from headrace import audit, passwords, records
from headrace.commands.failures import plain_failures, stop
from headrace.commands.records import (
    ACTOR,
    AsJson,
    DataDir,
    OnlyApp,
    OnlyEnabled,
    Reason,
    Search,
    ask_password,
    body,
    change,
    create,
    print_json,
    print_one,
    read,
    table_of,
    with_client,
    yes,
)
from headrace.control_client import ControlClient, ControlPlane
from headrace.errors import HeadraceError
from headrace.local import resolve
from schemas.admin_records import UserCreate, UserPatch
from schemas.control import User

Which = Annotated[str, typer.Argument(metavar="USER", help="Id or e-mail address.")]
Role = Annotated[str | None, typer.Option("--role", help="owner, admin, member or viewer.")]
Apps = Annotated[
    list[str] | None, typer.Option("--app", help="App that it belongs to; may be repeated; none for none.")
]
Name = Annotated[str | None, typer.Option("--name", help="Name for people.")]


def group() -> typer.Typer:
    """The commands."""
    made = typer.Typer(help="Users, who sign in with e-mail address and password.", no_args_is_help=True)
    for name, work in (
        ("create", new), ("list", list_all), ("show", show), ("update", update), ("password", password),
        ("disable", disable),
    ):  # fmt: skip
        made.command(name)(work)
    return made


def new(
    email: Annotated[str, typer.Argument(metavar="EMAIL", help="E-mail address.")],
    role: Role = None,
    app: Apps = None,
    name: Name = None,
    no_password: Annotated[bool, typer.Option("--no-password", help="One who cannot sign in (yet).")] = False,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Create a user. The password is asked for, or read from stdin."""
    secret = None if no_password else ask_password(f"Password of {email}")
    asked = body(UserCreate, {"email": email, "password": secret, "role": role, "apps": app, "name": name})
    filed = passwords.hashed(secret) if secret is not None else ""
    user = records.new_user(asked, f"user-{uuid_utils.uuid7().hex[-16:]}", filed)

    async def work(client: ControlClient) -> User:
        await create(client, user, reason=reason)
        return (await client.read()).users[user.id]

    print_one(records.user_view(with_client(data_dir, work)), as_json)


def list_all(
    app: OnlyApp = None,
    role: Role = None,
    enabled: OnlyEnabled = None,
    search: Search = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List users."""
    _noted(data_dir, "all", **audit.only({"app": app, "role": role, "enabled": enabled, "q": search}))
    views = [
        records.user_view(user)
        for user in read(data_dir).users.values()
        if records.is_wanted(user, search, enabled, app=app, role=role)
    ]
    if as_json:
        return print_json(views)
    table = table_of("user", "e-mail", "role", "apps", "signs in", "enabled")
    for view in views:
        table.add_row(
            view.id, view.email, view.role, ", ".join(view.apps), yes(view.can_sign_in), yes(view.enabled)
        )  # fmt: skip
    Console().print(table)
    return None


def show(user: Which, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Show one user."""
    found = _find(read(data_dir), user)
    if found is None:
        raise stop(_missing(user))
    _noted(data_dir, found.id)
    print_one(records.user_view(found), as_json)


def update(
    user: Which,
    email: Annotated[str | None, typer.Option("--email", help="E-mail address.")] = None,
    role: Role = None,
    app: Apps = None,
    name: Name = None,
    enabled: Annotated[bool | None, typer.Option("--enabled/--disabled", help="Whether it may sign in.")] = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Change a user, in force at once. Another role ends its sessions."""
    patch = body(UserPatch, {"email": email, "role": role, "apps": app, "name": name, "enabled": enabled})
    if not patch.model_fields_set:
        raise stop("say what to change; see --help")
    _change(data_dir, user, patch, reason, as_json)


def password(user: Which, reason: Reason = "password set", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Set a user's password, asked for or read from stdin. Its sessions end."""
    patch = body(UserPatch, {"password": ask_password(f"New password of {user}")})
    _change(data_dir, user, patch, reason, as_json)


def disable(user: Which, reason: Reason = "disabled", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Disable a user: its sessions are refused at once, its answers end. Its keys stay."""
    _change(data_dir, user, UserPatch(enabled=False), reason, as_json)


def _change(data_dir: DataDir, user: str, patch: UserPatch, reason: str, as_json: bool) -> None:
    filed = passwords.hashed(patch.password) if patch.password is not None else None
    _, after = change(
        data_dir,
        lambda plane: _find(plane, user),
        lambda before, _: records.changed_user(before, patch, filed),
        missing=_missing(user),
        reason=reason,
    )
    print_one(records.user_view(after), as_json)


def _noted(data_dir: DataDir, which: str, **detail: str) -> None:
    """Write down who is looked at: a name and an address are somebody's."""
    with plain_failures(HeadraceError):
        asyncio.run(audit.record_alone(resolve(data_dir), audit.note("read", "users", which, actor=ACTOR, **detail)))


def _find(plane: ControlPlane, user: str) -> User | None:
    by_email = (held for held in plane.users.values() if held.email == user.lower())
    return plane.users.get(user) or next(by_email, None)


def _missing(user: str) -> str:
    return f"there is no user {user!r}; `headrace users list` shows them"
