"""Bodies and answers of the admin API for the records of the control plane: keys, users, apps, models and prices.

Money is written as decimal strings, moments as RFC 3339 in UTC. Unknown fields are refused. In a change (`…Patch`) only
the fields that are there count; null takes a limit away.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from schemas.control import ADAPTER_NAME, MAX_WEIGHT, MIN_WEIGHT

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$"
MAX_COUNT = 2**53 - 1
"""Most that every JSON parser holds exactly."""


def _exact(value: object) -> object:
    """Money that is a JSON number means the digits that stand there."""
    return repr(value) if isinstance(value, float) else value


def _utc(value: datetime) -> datetime:
    return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).astimezone(UTC)


def _moment(value: datetime) -> datetime:
    try:
        value = _utc(value)
    except OverflowError:
        raise ValueError("is out of range") from None
    if not 2000 <= value.year <= 9000:
        raise ValueError("must be a time from the year 2000 on")
    return value


def _plain(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must have no line breaks or control characters")
    return text


def _shown(money: Decimal) -> str:
    return f"{money:f}"


_MONEY = {"type": "string", "pattern": r"^\d{1,10}(\.\d{1,10})?$", "examples": ["12.50"]}
Money = Annotated[
    Decimal, BeforeValidator(_exact), Field(ge=0, max_digits=20, decimal_places=10), PlainSerializer(_shown),
    WithJsonSchema(_MONEY),
]  # fmt: skip
Moment = Annotated[
    datetime, AfterValidator(_moment),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2027-01-01T00:00:00Z"]}),
]  # fmt: skip
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain)]
ModelName = Annotated[str, Field(pattern=MODEL_NAME, max_length=128)]
Email = Annotated[
    str, Field(pattern=r"^[^@\s]{1,64}@[^@\s]{1,189}$", examples=["ada@example.org"]), AfterValidator(str.lower)
]
Password = Annotated[str, Field(min_length=8, max_length=1024)]
Role = Literal["owner", "admin", "member", "viewer"]
AllowedModels = Literal["*"] | Annotated[list[ModelName], Field(max_length=1000)]
Currency = Annotated[str, Field(pattern=r"^[A-Z]{3}$", examples=["USD"])]
Weight = Annotated[float, Field(ge=MIN_WEIGHT, le=MAX_WEIGHT)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(extra="forbid", hide_input_in_errors=True, json_schema_extra={"examples": [values]})


class _Limits(_Strict):
    rate_limit_rpm: Count | None = None
    """Requests in any 60 seconds; null for no limit."""
    rate_limit_tpm: Count | None = None
    """Tokens, of prompt and completion together, in any 60 seconds."""
    concurrency_limit: Count | None = None
    """Requests that have no terminal yet."""


class _Budgets(_Limits):
    monthly_budget: Money | None = None
    """Money for a calendar month (UTC), in the currency of the prices."""


class Page(BaseModel):
    """A part of a list."""

    object: Literal["list"] = "list"
    has_more: bool
    """Whether there is more after `last_id`: ask again with `after`."""
    last_id: str | None


# --- keys ---------------------------------------------------------------------------------------------------------


class KeyCreate(_Budgets):
    """The body of `POST /admin/keys`."""

    model_config = _example(
        name="notebook", app="default", allowed_models=["smollm2"], rate_limit_rpm=60, monthly_budget="25.00"
    )

    name: Label
    """What the key is for."""
    app: Id = "default"
    """The app that it belongs to."""
    id: Id | None = None
    """Made where it is not given. Given, the request may be sent again: the second one answers 409."""
    owner_id: Annotated[str, Field(max_length=64)] = ""
    """The user whose key it is; empty for one that belongs to its app alone."""
    role: Role = "member"
    allowed_models: AllowedModels = "*"
    """Ids or aliases; `*` for all."""
    expires_at: Moment | None = None


class KeyPatch(_Budgets):
    """The body of `PATCH /admin/keys/{id}`."""

    model_config = _example(rate_limit_rpm=120, expires_at=None)

    name: Label | None = None
    owner_id: Annotated[str, Field(max_length=64)] | None = None
    role: Role | None = None
    allowed_models: AllowedModels | None = None
    expires_at: Moment | None = None
    enabled: bool | None = None


class KeyView(_Budgets):
    """A key, without its text."""

    id: str
    name: str
    app: str
    owner_id: str
    role: str
    allowed_models: Literal["*"] | list[str]
    expires_at: datetime | None
    enabled: bool
    created_at: datetime


class KeyMade(KeyView):
    """A new key with its text, this once."""

    key: str


class KeyViews(Page):
    """The answer of `GET /admin/keys`."""

    data: list[KeyView]


# --- users --------------------------------------------------------------------------------------------------------


class UserCreate(_Strict):
    """The body of `POST /admin/users`."""

    model_config = _example(email="ada@example.org", role="member", apps=["default"])

    email: Email
    password: Password | None = None
    """Without one the user cannot sign in."""
    role: Role = "member"
    name: Annotated[str, Field(max_length=200)] = ""
    apps: Annotated[list[Id], Field(max_length=1000)] = []
    """The apps that a member or viewer belongs to; owners and admins see all."""


class UserPatch(_Strict):
    """The body of `PATCH /admin/users/{id}`. A changed role or password ends the user's sessions."""

    model_config = _example(role="viewer")

    email: Email | None = None
    password: Password | None = None
    role: Role | None = None
    name: Annotated[str, Field(max_length=200)] | None = None
    apps: Annotated[list[Id], Field(max_length=1000)] | None = None
    enabled: bool | None = None


class UserView(BaseModel):
    """A user."""

    id: str
    email: str
    name: str
    role: str
    apps: list[str]
    can_sign_in: bool
    """Whether it has a password and is enabled."""
    enabled: bool
    created_at: datetime


class UserViews(Page):
    """The answer of `GET /admin/users`."""

    data: list[UserView]


# --- apps ---------------------------------------------------------------------------------------------------------


class AppCreate(_Budgets):
    """The body of `POST /admin/apps`."""

    model_config = _example(name="Research", weight=2, monthly_budget="500.00")

    name: Label
    id: Id | None = None
    """Short name that keys, limits and bills refer to; made from the name where it is not given."""
    weight: Weight = 1.0
    """Its share of a model that several apps wait for."""
    publishers: Annotated[dict[Id, Annotated[str, Field(max_length=64)]], Field(max_length=100)] = {}
    """Ed25519 public keys (32 bytes, base64) of systems that publish to Kafka for it, by key id."""
    producer_byte_rate: Annotated[int, Field(ge=1, lt=2**53)] | None = None
    """Bytes a second that each broker takes from them."""


class AppPatch(_Budgets):
    """The body of `PATCH /admin/apps/{id}`."""

    model_config = _example(weight=1.5)

    name: Label | None = None
    weight: Weight | None = None
    publishers: Annotated[dict[Id, Annotated[str, Field(max_length=64)]], Field(max_length=100)] | None = None
    producer_byte_rate: Annotated[int, Field(ge=1, lt=2**53)] | None = None
    enabled: bool | None = None


class AppView(_Budgets):
    """An app: a tenant."""

    id: str
    name: str
    weight: float
    publishers: dict[str, str]
    producer_byte_rate: int | None
    enabled: bool
    created_at: datetime


class AppViews(Page):
    """The answer of `GET /admin/apps`."""

    data: list[AppView]


# --- models and prices --------------------------------------------------------------------------------------------


class Amounts(_Strict):
    """Money for a million tokens. `cached` prompt tokens cost as much as others unless said."""

    input: Money
    output: Money
    cached: Money | None = None
    currency: Currency = "USD"


Capability = Literal["chat", "code", "vision", "json", "tools", "long-context"]
Names = Annotated[list[ModelName], Field(max_length=100)]


class _ModelFields(_Limits):
    default_max_tokens: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    keep_alive_ms: Count | None = None
    """How long it keeps its memory unused; null until another model wants it."""


class ModelCreate(_ModelFields):
    """The body of `POST /admin/models`: what callers may name, and how its provider has it."""

    model_config = _example(
        id="coder", provider="gpu-box", backend_tag="Qwen/Qwen3-Coder", aliases=["gpt-4o"],
        context_length=32768, price={"input": "0.50", "output": "2.00"},
    )  # fmt: skip

    id: ModelName
    provider: ModelName
    """Name of a provider that `headrace.toml` has."""
    backend_tag: Annotated[str, Field(min_length=1, max_length=1000)]
    """The model as the provider knows it."""
    aliases: Names = []
    adapters: dict[Annotated[str, Field(pattern=ADAPTER_NAME, max_length=64)], Label] = {}
    context_length: Annotated[int, Field(ge=16, le=16_777_216)] = 4096
    max_concurrency: Annotated[int, Field(ge=1, le=4096)] = 4
    pool: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)] = "default"
    capabilities: Annotated[list[Capability], Field(max_length=6)] = ["chat"]
    fallbacks: Names = []
    enabled: bool = True
    preload: bool = True
    pinned: bool = False
    bytes: Count = 0
    """Device memory that it is expected to take; 0 for an estimate."""
    load_ms: Count = 0
    price: Amounts = Amounts(input=Decimal(0), output=Decimal(0))


class ModelPatch(_ModelFields):
    """The body of `PATCH /admin/models/{id}`. Prices are set by `POST /admin/prices`."""

    model_config = _example(aliases=["gpt-4o"], max_concurrency=8)

    provider: ModelName | None = None
    backend_tag: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    aliases: Names | None = None
    adapters: dict[Annotated[str, Field(pattern=ADAPTER_NAME, max_length=64)], Label] | None = None
    context_length: Annotated[int, Field(ge=16, le=16_777_216)] | None = None
    max_concurrency: Annotated[int, Field(ge=1, le=4096)] | None = None
    pool: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)] | None = None
    capabilities: Annotated[list[Capability], Field(max_length=6)] | None = None
    fallbacks: Names | None = None
    enabled: bool | None = None
    preload: bool | None = None
    pinned: bool | None = None
    bytes: Count | None = None
    load_ms: Count | None = None


class PriceCreate(Amounts):
    """The body of `POST /admin/prices`."""

    model_config = _example(model="smollm2", input="0.12", output="0.45", effective_from="2027-01-01T00:00:00Z")

    model: ModelName
    effective_from: Moment | None = None
    """Requests that are accepted from then on have it; now where it is not given. Not in the past."""


class PriceVersion(BaseModel):
    """One version of a model's price, for a million tokens."""

    id: str
    """`model/version`, as usage rows name it."""
    model: str
    version: int
    input: Money
    output: Money
    cached: Money
    currency: str
    effective_from: datetime | None
    """Null for one that was there before prices had times."""
    in_force: bool
    origin: Literal["api", "model"]
    """Whether it was set by itself or came with its model (as `headrace.toml` has it)."""


class PriceVersions(Page):
    """The answer of `GET /admin/prices`."""

    data: list[PriceVersion]
