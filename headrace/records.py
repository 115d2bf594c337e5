"""Records of the control plane made and changed as the admin API and the command line are asked to, and shown. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel

from headrace.api_keys import ADMIN_ID, sha256
from headrace.errors import InvalidRequest
from schemas.admin_records import (
    Amounts,
    AppCreate,
    AppPatch,
    AppView,
    KeyCreate,
    KeyPatch,
    KeyView,
    ModelCreate,
    ModelPatch,
    PriceCreate,
    PriceVersion,
    UserCreate,
    UserPatch,
    UserView,
)
from schemas.control import ANY_MODEL, API, App, Key, Model, Price, User

Changed = TypeVar("Changed", App, Key, Model, User)
_NULLABLE = frozenset(
    (
        *("rate_limit_rpm", "rate_limit_tpm", "concurrency_limit", "monthly_budget", "expires_at"),
        *("default_max_tokens", "keep_alive_ms"),
    )
)
"""Fields that null takes away; of others it is no value."""


def _changes(patch: BaseModel) -> dict[str, Any]:
    """The fields that a change has. Raises `InvalidRequest` for null where that is no value."""
    given = {name: getattr(patch, name) for name in patch.model_fields_set}
    for name, value in given.items():
        if value is None and name not in _NULLABLE:
            raise InvalidRequest(f"{name}: must not be null; leave it out to keep what it is.", param=name)
    return given


def _replaced(record: Changed, changes: Mapping[str, Any]) -> Changed:
    made = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return msgspec.structs.replace(record, **made)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


# --- keys ---------------------------------------------------------------------------------------------------------


def new_key(body: KeyCreate, text: str, models: Mapping[str, Model]) -> Key:
    """The record of a new key whose text is `text`. Raises `InvalidRequest`."""
    digest = sha256(text)
    if body.id is not None and body.id.startswith(ADMIN_ID):
        raise InvalidRequest(f"id: {ADMIN_ID}… names the keys of the stack itself.", param="id")
    return Key(
        id=body.id or f"key-{digest[:12]}",
        sha256=digest,
        name=body.name,
        app=body.app,
        role=body.role,
        allowed_models=allowed(body.allowed_models, models),
        owner_id=body.owner_id,
        expires_at=body.expires_at.timestamp() if body.expires_at is not None else None,
        rate_limit_rpm=body.rate_limit_rpm,
        rate_limit_tpm=body.rate_limit_tpm,
        concurrency_limit=body.concurrency_limit,
        monthly_budget=body.monthly_budget,
    )


def changed_key(key: Key, patch: KeyPatch, models: Mapping[str, Model]) -> Key:
    """A key after a change. Raises `InvalidRequest`."""
    changes = _changes(patch)
    if "allowed_models" in changes:
        changes["allowed_models"] = allowed(changes["allowed_models"], models)
    if changes.get("expires_at") is not None:
        changes["expires_at"] = changes["expires_at"].timestamp()
    return _replaced(key, changes)


def allowed(names: Literal["*"] | list[str], models: Mapping[str, Model]) -> tuple[str, ...]:
    """Ids of models that are named by id or alias; a name that is none is left for the refusal to name."""
    if isinstance(names, str):
        return (ANY_MODEL,)
    ids = {alias: model.id for model in models.values() if model.enabled for alias in model.aliases}
    ids |= {model.id: model.id for model in models.values() if model.enabled}
    return tuple(dict.fromkeys(ids.get(name, name) for name in names))


def key_view(key: Key) -> KeyView:
    """A key as it is shown."""
    return KeyView(
        id=key.id,
        name=key.name,
        app=key.app,
        owner_id=key.owner_id,
        role=key.role,
        allowed_models="*" if ANY_MODEL in key.allowed_models else list(key.allowed_models),
        expires_at=_moment(key.expires_at) if key.expires_at is not None else None,
        enabled=key.enabled,
        created_at=_moment(key.created),
        rate_limit_rpm=key.rate_limit_rpm,
        rate_limit_tpm=key.rate_limit_tpm,
        concurrency_limit=key.concurrency_limit,
        monthly_budget=key.monthly_budget,
    )


# --- users --------------------------------------------------------------------------------------------------------


def new_user(body: UserCreate, user_id: str, password_hash: str) -> User:
    """The record of a new user; `password_hash` is empty for one who cannot sign in."""
    return User(
        id=user_id,
        email=body.email,
        role=body.role,
        name=body.name,
        apps=tuple(body.apps),
        password_hash=password_hash,
    )


def changed_user(user: User, patch: UserPatch, password_hash: str | None) -> User:
    """A user after a change; `password_hash` is of the new password, if there is one. Raises `InvalidRequest`."""
    changes = _changes(patch)
    if changes.pop("password", None) is not None and password_hash is not None:
        changes["password_hash"] = password_hash
    return _replaced(user, changes)


def user_view(user: User) -> UserView:
    """A user as it is shown."""
    return UserView(
        id=user.id,
        email=user.email,
        name=user.name,
        role=user.role,
        apps=list(user.apps),
        can_sign_in=user.enabled and bool(user.password_hash),
        enabled=user.enabled,
        created_at=_moment(user.created),
    )


# --- apps ---------------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """An id made of a name: its letters and digits in lower case, joined by hyphens. Raises `InvalidRequest`."""
    made = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].rstrip("-")
    if not made:
        raise InvalidRequest("id: cannot be made of this name; give one.", param="id")
    return made


def has(text: str | None, *fields: str) -> bool:
    """Whether a search finds its text, in either case, in one of the fields."""
    return text is None or any(text.lower() in field.lower() for field in fields)


def is_wanted(
    record: App | Key | User, text: str | None, enabled: bool | None, *, app: str | None = None,
    owner_id: str | None = None, role: str | None = None,
) -> bool:  # fmt: skip
    """Whether a list shows a record: what is None does not matter, and `text` is looked for in its names."""
    if enabled not in (None, record.enabled):
        return False
    match record:
        case App(id=id_, name=name):
            return has(text, id_, name)
        case Key(id=id_, name=name):
            return app in (None, record.app) and owner_id in (None, record.owner_id) and has(text, id_, name)
        case User(id=id_, name=name):
            mine = (app is None or app in record.apps) and role in (None, record.role)
            return mine and has(text, id_, record.email, name)


def new_app(body: AppCreate) -> App:
    """The record of a new app. Raises `InvalidRequest`."""
    return App(
        id=body.id or slug(body.name),
        name=body.name,
        weight=body.weight,
        publishers=dict(body.publishers),
        producer_byte_rate=body.producer_byte_rate,
        rate_limit_rpm=body.rate_limit_rpm,
        rate_limit_tpm=body.rate_limit_tpm,
        concurrency_limit=body.concurrency_limit,
        monthly_budget=body.monthly_budget,
    )


def changed_app(app: App, patch: AppPatch) -> App:
    """An app after a change. Raises `InvalidRequest`."""
    return _replaced(app, _changes(patch))


def app_view(app: App) -> AppView:
    """An app as it is shown."""
    return AppView(
        id=app.id,
        name=app.name,
        weight=app.weight,
        publishers=app.publishers,
        producer_byte_rate=app.producer_byte_rate,
        enabled=app.enabled,
        created_at=_moment(app.created),
        rate_limit_rpm=app.rate_limit_rpm,
        rate_limit_tpm=app.rate_limit_tpm,
        concurrency_limit=app.concurrency_limit,
        monthly_budget=app.monthly_budget,
    )


# --- models and prices --------------------------------------------------------------------------------------------


def new_model(body: ModelCreate) -> Model:
    """The record of a new model, which `headrace apply` leaves alone."""
    model = Model(body.id, body.provider, body.backend_tag, price=_price(body.price), origin=API)
    return _replaced(model, {name: getattr(body, name) for name in ModelCreate.model_fields if name != "price"})


def changed_model(model: Model, patch: ModelPatch) -> Model:
    """A model after a change. Raises `InvalidRequest`."""
    return _replaced(model, _changes(patch))


def _price(amounts: Amounts) -> Price:
    cached = amounts.input if amounts.cached is None else amounts.cached
    return Price(0, input=amounts.input, output=amounts.output, cached=cached, currency=amounts.currency)


def new_price(body: PriceCreate) -> Price:
    """A price as the control processor is asked for it."""
    start_ms = int(body.effective_from.timestamp() * 1000) if body.effective_from is not None else 0
    return msgspec.structs.replace(_price(body), effective_from_ms=start_ms)


def price_view(model: str, price: Price, in_force: int | None) -> PriceVersion:
    """A version of a price as it is shown; `in_force` is the version that is."""
    return PriceVersion(
        id=f"{model}/{price.version}",
        model=model,
        version=price.version,
        input=_money(price.input),
        output=_money(price.output),
        cached=_money(price.cached),
        currency=price.currency,
        effective_from=_moment(price.effective_from_ms / 1000) if price.effective_from_ms else None,
        in_force=price.version == in_force,
        origin="api" if price.origin == API else "model",
    )


def _money(amount: Decimal) -> Decimal:
    return Decimal(f"{amount:f}")


def model_json(model: Model) -> str:
    """The configuration of a model as JSON; how it stands is not part of it."""
    return msgspec.json.format(msgspec.json.encode(model), indent=2).decode()
