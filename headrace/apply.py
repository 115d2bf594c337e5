"""Making the control plane match `headrace.toml`: which commands that takes, and sending them.

What the file names, the file decides, at every apply, but for prices that were set by themselves, and limits of models
that it leaves out. What was made by the admin API or the command line and is not in the file is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from headrace import passwords
from headrace.api_keys import ADMIN_ID, admin_record, sha256
from headrace.config import DEFAULT_APP, Config
from headrace.control_client import ControlPlane, command, control_client, deletion
from headrace.errors import InvalidRequest
from headrace.settings import Settings
from schemas.control import API, OWNER, App, ControlCommand, Limited, Model, User

ACTOR = "headrace apply"


def plan(current: ControlPlane, config: Config, admin_key: str, owner: User | None = None) -> list[ControlCommand]:
    """The commands, in order, after which the control plane is as the configuration says; none when it is already.

    Every step is valid by itself: a name is given up by one model before another takes it, a provider is there before
    its models and goes after them. `owner` is the first user, who is made only where nobody has that address.
    """
    models = {model.id: _as_it_stands(model.record(), current.models.get(model.id)) for model in config.models}
    providers = {provider.name: provider.record() for provider in config.providers}
    commands: list[ControlCommand] = []
    if DEFAULT_APP not in current.apps:
        commands.append(command(App(id=DEFAULT_APP, name="Default"), actor=ACTOR))
    commands += _admin_key(current, admin_key)
    if owner is not None and all(user.email != owner.email for user in current.users.values()):
        commands.append(command(owner, actor=ACTOR, reason="the first owner"))
    commands += [command(new, actor=ACTOR) for name, new in providers.items() if current.providers.get(name) != new]
    for old in current.models.values():
        if old.id not in models and old.origin != API and (old.enabled or old.fallbacks):
            reason = "no longer in the configuration"
            # Its fallbacks go with it: what is gone from the file is gone, what is disabled in it may fall back.
            gone = msgspec.structs.replace(old, enabled=False, fallbacks=())
            commands.append(command(gone, actor=ACTOR, reason=reason))
    commands += _released_names(current, models)
    for model in models.values():
        if not same_model(current.models.get(model.id), model):
            commands.append(command(model, actor=ACTOR))
    commands += [
        deletion("providers", name, actor=ACTOR, reason="no longer in the configuration")
        for name in current.providers
        if name not in providers and name not in _used_by_others(current, models)
    ]
    return commands


def _as_it_stands(wanted: Model, current: Model | None) -> Model:
    """A model as the file has it, with what was set by itself: its price, and limits of which the file says nothing.

    Whoever takes a limit out of the file says no more about it: to end it is for whoever sets limits elsewhere.
    """
    if current is None:
        return wanted
    limits = {name: getattr(current, name) for name in Limited.__struct_fields__ if getattr(wanted, name) is None}
    wanted = msgspec.structs.replace(wanted, **limits)
    if not any(price.origin == API for price in (current.price, *current.prices)):
        return wanted
    return msgspec.structs.replace(wanted, price=current.price, prices=current.prices)


def _used_by_others(current: ControlPlane, models: Mapping[str, Model]) -> set[str]:
    """Providers of models that the file has no say in."""
    return {old.provider for old in current.models.values() if old.id not in models and old.origin == API}


def first_owner(settings: Settings) -> User | None:
    """The user that HEADRACE_ADMIN_EMAIL and HEADRACE_ADMIN_PASSWORD name, if they do. Raises `InvalidRequest`."""
    email, password = (settings.admin_email or "").strip().lower(), settings.admin_password
    if not email or password is None:
        return None
    try:
        filed = passwords.hashed(password.get_secret_value())
    except passwords.WeakPassword as weak:
        raise InvalidRequest(f"HEADRACE_ADMIN_PASSWORD: {weak}.") from None
    return User(id=f"user-{sha256(email)[:16]}", email=email, role=OWNER, password_hash=filed)


def _admin_key(current: ControlPlane, admin_key: str) -> list[ControlCommand]:
    wanted = admin_record(admin_key, DEFAULT_APP)
    known = current.keys.get(wanted.sha256)
    same = known is not None and msgspec.structs.replace(wanted, created=known.created) == known
    commands = [] if same else [command(wanted, actor=ACTOR)]
    for key in current.keys.values():
        if key.id.startswith(ADMIN_ID) and key.sha256 != wanted.sha256 and key.enabled:
            replaced = msgspec.structs.replace(key, enabled=False)
            commands.append(command(replaced, actor=ACTOR, reason="replaced by another admin key"))
    return commands


def _released_names(current: ControlPlane, models: Mapping[str, Model]) -> list[ControlCommand]:
    """Commands that take aliases away from models which another one is going to have."""
    claims = {name: model.id for model in models.values() for name in (model.id, *model.aliases)}
    commands = []
    for old in current.models.values():
        if old.id not in models or not old.enabled:
            continue
        kept = tuple(alias for alias in old.aliases if claims.get(alias, old.id) == old.id)
        if kept != old.aliases:
            commands.append(command(msgspec.structs.replace(old, aliases=kept), actor=ACTOR, reason="its name moves"))
    return commands


def same_model(current: Model | None, wanted: Model) -> bool:
    """Whether a model in force is the wanted one, but for what the control processor sets."""
    if current is None:
        return False
    set_by_others = {"price": current.price, "prices": current.prices, "created": current.created}
    return wanted.price.same_amounts(current.price) and msgspec.structs.replace(wanted, **set_by_others) == current


async def apply_config(settings: Settings, config: Config, *, admin_key: str, timeout: float = 30.0) -> list[str]:
    """Make the control plane match the configuration and wait until it is in force; says what was changed.

    Raises `CommandsRefused` or `Unavailable`.
    """
    async with control_client(settings, timeout=timeout) as client:
        current = await client.read()
        commands = plan(current, config, admin_key, first_owner(settings))
        await client.submit(commands)
    names = {key.sha256: f"{key.name} ({key.id})" for key in current.keys.values()}
    return [_say(sent, names) for sent in commands]


def _say(sent: ControlCommand, names: Mapping[str, str]) -> str:
    what = names.get(sent.key, "admin") if sent.kind == "keys" else sent.key
    verb = "delete" if sent.value is None else "set"
    return f"{verb} {sent.kind[:-1]} {what}" + (f" ({sent.reason})" if sent.reason else "")
