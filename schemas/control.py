"""Records of the control plane: providers, models, prices, apps, users and keys, and the commands that change them."""

from __future__ import annotations

import hashlib
from decimal import Decimal

import msgspec

ANY_MODEL = "*"
DEFAULT_APP = "default"
"""The app that is there from the start."""
API = "api"
"""Origin of what was made by the admin API or the command line, and not by `headrace.toml`."""
ABSENT = ""
"""What `ControlCommand.if_match` is where the record must not be there yet."""
CONTINUES = ("prefill", "vllm")
"""How a server that speaks OpenAI's API is asked to go on with a text: values of the provider option `continues`."""
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
"""Bounds of an app's weight: none starves, and none has all."""
ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of adapter names: without a colon, so that the last one of `id:adapter` ends the model's id."""
ADAPTER_KINDS = ("llama_cpp", "transformers")
"""Kinds of providers that load LoRA adapters."""

CHAT, CODE, VISION, JSON, TOOLS, LONG_CONTEXT = "chat", "code", "vision", "json", "tools", "long-context"
CAPABILITIES = (CHAT, CODE, VISION, JSON, TOOLS, LONG_CONTEXT)
"""What a model may be declared to be good for."""
LONG_CONTEXT_TOKENS = 32_768
"""A model whose context is at least this long needs no declaration to have `long-context`."""

AUTO = "auto"
TASKS = {AUTO: CHAT} | {f"{AUTO}:{name}": name for name in (CODE, CHAT, LONG_CONTEXT, VISION, JSON)}
"""Names by which a caller leaves the choice of the model to the router -> the capability that it needs."""


OWNER, ADMIN, MEMBER, VIEWER = "owner", "admin", "member", "viewer"
ROLES = (OWNER, ADMIN, MEMBER, VIEWER)
"""What a user or a key may do, from most to least: an owner names other owners and admins, an admin changes everything
else, a member calls models and sees its own app's numbers, a viewer only sees them."""


def is_reserved(name: str) -> bool:
    """Whether no model may have this name: it means a choice, now or in a later version."""
    return name == AUTO or name.startswith(f"{AUTO}:")


class Provider(msgspec.Struct, frozen=True, omit_defaults=True):
    """A place where models run, as workers reach it."""

    name: str
    kind: str
    """`llama_cpp`, `transformers`, `ollama` or `openai`."""
    base_url: str | None = None
    api_key_env: str | None = None
    """Name of the environment variable, on the worker, that holds the key; the key itself is never in a record."""
    options: dict[str, str | int | float | bool] = {}

    @property
    def can_continue(self) -> bool:
        """Whether it goes on with a text that another worker generated; `Provider.can_continue` of the worker's side.

        Ollama does for some models only: it depends on each model's template whether a last message of the assistant
        is closed.
        """
        return self.kind == "llama_cpp" or (self.kind == "openai" and self.options.get("continues") in CONTINUES)


class Limited(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Limits of whoever asks for answers; None sets none."""

    rate_limit_rpm: int | None = None
    """Requests in any 60 seconds."""
    rate_limit_tpm: int | None = None
    """Tokens, of prompt and completion together, in any 60 seconds."""
    concurrency_limit: int | None = None
    """Requests that have no terminal yet."""


class Budgeted(Limited, frozen=True, omit_defaults=True, kw_only=True):
    """Limits of whoever pays."""

    monthly_budget: Decimal | None = None
    """Money for a calendar month (UTC), in the currency of the prices."""


class Price(msgspec.Struct, frozen=True):
    """Money for a million tokens of one model, from a moment on."""

    version: int
    input: Decimal
    output: Decimal
    cached: Decimal
    currency: str = "USD"
    effective_from_ms: int = 0
    """Unix ms from which on requests that are accepted have it."""
    origin: str = ""
    """`API` for one that was set by itself; empty for one that came with its model."""

    def cost(self, prompt: int, cached: int, completion: int) -> Decimal:
        """Exact cost of a request; `cached` prompt tokens are part of `prompt` and cost their own price."""
        million = Decimal(1_000_000)
        return ((prompt - cached) * self.input + cached * self.cached + completion * self.output) / million

    def same_amounts(self, other: Price) -> bool:
        """Whether both cost the same, whatever their versions and times."""
        mine, others = ((p.input, p.output, p.cached, p.currency) for p in (self, other))
        return mine == others


class Model(Limited, frozen=True, omit_defaults=True):
    """A model that callers may name, and how to get it from its provider; its limits are of all callers together."""

    id: str
    provider: str
    backend_tag: str
    aliases: tuple[str, ...] = ()
    adapters: dict[str, str] = {}
    """LoRA adapters by name, each where its provider finds it; callers write `id:name`."""
    context_length: int = 4096
    """Tokens of prompt and completion together, of one request."""
    max_concurrency: int = 4
    pool: str = "default"
    enabled: bool = True
    capabilities: tuple[str, ...] = (CHAT,)
    """What it is declared to be good for, out of `CAPABILITIES`; see `can`."""
    fallbacks: tuple[str, ...] = ()
    """Ids of models that are tried in this order when this one cannot serve."""
    preload: bool = True
    pinned: bool = False
    """Whether it keeps its memory for ever once it has it."""
    keep_alive_ms: int | None = None
    """How long it keeps its memory unused; None until another model wants it. One that is preloaded stays."""
    bytes: int = 0
    """Device memory that it is expected to take; 0 when its provider takes none of ours."""
    load_ms: int = 0
    """How long a load is expected to take."""
    default_max_tokens: int | None = None
    """Cap on the completion of requests that name none; None lets the context be the cap."""
    price: Price = Price(version=0, input=Decimal(0), output=Decimal(0), cached=Decimal(0))
    """The price in force when the record was written; `price_at` tells which one counts."""
    prices: tuple[Price, ...] = ()
    """Other prices that requests may have: those to come, and those that were in force minutes ago, by their time."""
    origin: str = ""
    """`API` for a model that was made by itself; empty for one that `headrace.toml` names."""
    created: int = 0
    """Unix seconds of the record's first version."""

    def price_at(self, at_ms: int) -> Price:
        """The price of a request that was accepted at this Unix ms. No process need be alive when it changes."""
        begun = [price for price in (*self.prices, self.price) if price.effective_from_ms <= at_ms]
        return max(begun, key=lambda price: (price.effective_from_ms, price.version), default=self.price)

    def can(self, capability: str) -> bool:
        """Whether it has a capability: declared, or shown by its context."""
        return capability in self.capabilities or (
            capability == LONG_CONTEXT and self.context_length >= LONG_CONTEXT_TOKENS
        )

    def adapter(self, name: str) -> str:
        """The adapter that `name` asks for behind a colon; empty where it asks for none of this model's."""
        base, _, adapter = name.rpartition(":")
        return adapter if base in (self.id, *self.aliases) and adapter in self.adapters else ""


class App(Budgeted, frozen=True, omit_defaults=True):
    """A tenant: the unit of fairness, limits and billing."""

    id: str
    name: str
    enabled: bool = True
    weight: float = 1.0
    """Its share where tenants wait for the same model: of two that always wait, one of weight 2 is served twice as
    many tokens as one of weight 1."""
    publishers: dict[str, str] = {}
    """Ed25519 public keys (32 bytes, base64) of systems that publish requests to Kafka for this app, by key id."""
    producer_byte_rate: int | None = None
    """Bytes a second that each broker takes from its publishers (`headrace topics acls`); None sets no bound."""
    created: int = 0
    """Unix seconds of the record's first version."""


class User(msgspec.Struct, frozen=True, omit_defaults=True):
    """Somebody who signs in."""

    id: str
    email: str
    """In lower case; no two users have the same."""
    role: str = MEMBER
    """One of `ROLES`."""
    name: str = ""
    apps: tuple[str, ...] = ()
    """The apps that a member or viewer belongs to; owners and admins see all."""
    password_hash: str = ""
    """Argon2id, in PHC's string format; empty for one who cannot sign in."""
    enabled: bool = True
    created: int = 0
    """Unix seconds of the record's first version."""


class Key(Budgeted, frozen=True, omit_defaults=True):
    """An API key; only the SHA-256 of its text is kept."""

    id: str
    sha256: str
    name: str
    app: str
    role: str = MEMBER
    """One of `ROLES`; an `admin` may see every tenant's requests and change the control plane."""
    allowed_models: tuple[str, ...] = (ANY_MODEL,)
    enabled: bool = True
    expires_at: float | None = None
    """Unix seconds, or None for no expiry."""
    owner_id: str = ""
    """The user whose key it is; empty for one that belongs to its app alone."""
    created: int = 0
    """Unix seconds of the record's first version."""

    def may_use(self, model: Model) -> bool:
        """Whether it may have its requests served by a model, named, chosen or fallen back to."""
        return ANY_MODEL in self.allowed_models or model.id in self.allowed_models


class Replay(msgspec.Struct, frozen=True, omit_defaults=True):
    """A dead letter that somebody sends again: first claimed, then sent, so that a retry of one is no other."""

    letter: str
    """`number/at_ms`: its offset in `dead.letters`, and when it was buried there."""
    new_id: str
    """Id of the request that repeats it; of other messages, whose ids stay, of the replay."""
    digest: str
    """SHA-256, hex, of the body that is sent."""
    edited: bool = False
    sent: bool = False
    again: bool = False
    """Whether it is wanted though the letter was replayed before."""
    times: int = 1


REQUEST, APP, USER, KEY = "request", "app", "user", "key"
ERASED = (REQUEST, APP, USER)
"""Whose content may be erased. What a user's keys asked for is the user's: an erasure of one erases that of each."""


class Erasure(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a request, an app or a user asked and was answered is to be read by nobody, and kept by no projection."""

    subject: str
    """`request/ID`, `app/ID`, `user/ID`, or `key/ID` for each key of a user."""
    asked_ms: int = 0
    """Requests accepted before are meant; of a request, all. By the brokers' clock."""
    of: str = ""
    """The user, of a key's."""
    applied: dict[str, int] = {}
    """Projection -> Unix ms since which it holds none of it."""

    @property
    def kind(self) -> str:
        """Whose content it is."""
        return self.subject.partition("/")[0]

    @property
    def id(self) -> str:
        """Which request, app, user or key."""
        return self.subject.partition("/")[2]

    def covers(self, accepted_ms: int) -> bool:
        """Whether a request of the subject is meant that was accepted then."""
        return self.kind == REQUEST or accepted_ms < self.asked_ms


class ControlCommand(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change to the control plane, decided on by the control processor alone."""

    id: str
    """New for each; one that comes again is not done again."""
    kind: str
    """One of `RECORDS`: the topic `control.<kind>` will hold the result. Or `prices`; or `audit`, for a note."""
    key: str
    """Natural key of the record: the provider's or model's name, the app's or user's id, the API key's SHA-256; of a
    price the id of its model."""
    value: msgspec.Raw | None
    """The record as JSON; None deletes it. A price gets its version from the control processor."""
    actor: str = ""
    """Who asks, as `key <id>`, `user <id>` or the name of a command."""
    reason: str = ""
    """Why, in the asker's words."""
    at_ms: int = 0
    if_match: str | None = None
    """`digest` of the record that is to be changed, or `ABSENT` where there must be none yet; None for any."""


Record = Provider | Model | App | User | Key | Replay | Erasure

RECORDS: dict[str, type[Record]] = {
    "providers": Provider,
    "models": Model,
    "apps": App,
    "users": User,
    "keys": Key,
    "replays": Replay,
    "erasures": Erasure,
}
"""Type of the records of each kind."""


def digest(record: Record) -> str:
    """What tells one version of a record from another: of its JSON, which both sides write alike."""
    return hashlib.sha256(msgspec.json.encode(record)).hexdigest()[:32]
