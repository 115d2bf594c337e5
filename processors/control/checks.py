"""What records must be like: the rules by which the control processor refuses. Pure."""

from __future__ import annotations

import base64
import binascii
import re

from processors.control.state import ControlState
from schemas.control import (
    ADAPTER_KINDS,
    ADAPTER_NAME,
    ANY_MODEL,
    CAPABILITIES,
    MAX_WEIGHT,
    MIN_WEIGHT,
    ROLES,
    App,
    Budgeted,
    Key,
    Limited,
    Model,
    Provider,
    User,
    is_reserved,
)

PROVIDER_KINDS = ("llama_cpp", "transformers", "ollama", "openai")
EMAIL = re.compile(r"[^@\s]{1,64}@[^@\s]{1,189}")
"""What may be an address; whether mail reaches it is not ours to say."""
SHA256 = re.compile("[0-9a-f]{64}")
PUBLISHER_KEY_BYTES = 32
TOPIC_PART = re.compile(r"[A-Za-z0-9._-]{1,200}")
"""What may stand in a topic's name, as an app's id does in that of its answers."""


class Refusal(Exception):
    """A record or a command is against the rules; the message says to its sender why."""

    def __init__(self, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.code = code
        """Of `CommandOutcome`; empty for what no other command would mend."""


def check(holds: bool, reason: str, code: str = "") -> None:
    """Raise `Refusal` unless it holds."""
    if not holds:
        raise Refusal(reason, code)


def check_provider(key: str, provider: Provider) -> None:
    check(provider.name == key, f"provider {key!r}: its name is {provider.name!r}")
    check(
        provider.kind in PROVIDER_KINDS,
        f"provider {key!r}: unknown kind {provider.kind!r}; known are {', '.join(PROVIDER_KINDS)}",
    )
    check(provider.kind != "openai" or bool(provider.base_url), f"provider {key!r}: kind openai needs a base_url")


def check_app(key: str, app: App) -> None:
    check(app.id == key, f"app {key!r}: its id is {app.id!r}")
    bounds = f"app {key!r}: weight must be {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, not {app.weight:g}"
    check(MIN_WEIGHT <= app.weight <= MAX_WEIGHT, bounds)
    _check_limits(f"app {key!r}", app)
    rate = app.producer_byte_rate
    check(rate is None or rate > 0, f"app {key!r}: producer_byte_rate must be above 0")
    nameable = not app.publishers or TOPIC_PART.fullmatch(app.id) is not None
    check(nameable, f"app {key!r}: with publishers, its id must be at most 200 letters, digits, '.', '_' and '-'")
    for name, text in app.publishers.items():
        try:
            raw = base64.b64decode(text, validate=True)
        except binascii.Error:
            raw = b""
        whole = 0 < len(name) <= 200 and len(raw) == PUBLISHER_KEY_BYTES
        check(whole, f"app {key!r}: publisher {name!r} has no Ed25519 public key of 32 bytes in base64")


def check_user(state: ControlState, key: str, user: User) -> None:
    who = f"user {key!r}"
    check(user.id == key, f"{who}: its id is {user.id!r}")
    check(EMAIL.fullmatch(user.email) is not None, f"{who}: {user.email!r} is no e-mail address")
    check(user.email == user.email.lower(), f"{who}: its e-mail address is not in lower case")
    check(user.role in ROLES, f"{who}: unknown role {user.role!r}; known are {', '.join(ROLES)}")
    check(not user.password_hash or user.password_hash.startswith("$argon2id$"), f"{who}: its password is not argon2id")
    unknown = [name for name in user.apps if name not in state.apps]
    check(not unknown or not user.enabled, f"{who}: there is no app {', '.join(map(repr, unknown))}")
    check(state.emails.get(user.email, key) == key, f"{who}: another user has the e-mail address {user.email!r}")


def _check_limits(who: str, limits: Limited) -> None:
    for name in ("rate_limit_rpm", "rate_limit_tpm", "concurrency_limit"):
        value = getattr(limits, name)
        check(value is None or value >= 0, f"{who}: {name} must not be negative")
    if isinstance(limits, Budgeted) and (budget := limits.monthly_budget) is not None:
        check(budget.is_finite() and budget >= 0, f"{who}: monthly_budget is negative or no number")


def check_key(state: ControlState, key: str, record: Key) -> None:
    check(record.sha256 == key, f"key {record.name!r}: filed under another SHA-256 than its own")
    check(SHA256.fullmatch(key) is not None, f"key {record.name!r}: its SHA-256 is not 64 lower-case hex digits")
    check(record.role in ROLES, f"key {record.name!r}: unknown role {record.role!r}; known are {', '.join(ROLES)}")
    _check_limits(f"key {record.name!r}", record)
    check(state.key_ids.get(record.id, key) == key, f"key {record.name!r}: its id {record.id!r} is another key's")
    owned = not record.owner_id or record.owner_id in state.users or not record.enabled
    check(owned, f"key {record.name!r}: there is no user {record.owner_id!r}")
    check(record.app in state.apps or not record.enabled, f"key {record.name!r}: there is no app {record.app!r}")
    unknown = [name for name in record.allowed_models if name != ANY_MODEL and name not in state.models]
    check(not unknown or not record.enabled, f"key {record.name!r}: there is no model {', '.join(map(repr, unknown))}")


def check_model(state: ControlState, key: str, model: Model) -> None:
    who = f"model {key!r}"
    check(model.id == key, f"{who}: its id is {model.id!r}")
    check(bool(model.backend_tag), f"{who}: has no backend_tag")
    check(model.context_length >= 1, f"{who}: context_length must be at least 1")
    check(model.max_concurrency >= 1, f"{who}: max_concurrency must be at least 1")
    check(
        model.default_max_tokens is None or 1 <= model.default_max_tokens < model.context_length,
        f"{who}: default_max_tokens must be at least 1 and below context_length",
    )
    check(
        min(model.bytes, model.load_ms, model.keep_alive_ms or 0) >= 0,
        f"{who}: bytes, load_ms and keep_alive_ms must not be negative",
    )
    amounts = (model.price.input, model.price.output, model.price.cached)
    check(all(amount.is_finite() and amount >= 0 for amount in amounts), f"{who}: a price is negative or no number")
    _check_limits(who, model)
    unknown = [name for name in model.capabilities if name not in CAPABILITIES]
    check(not unknown, f"{who}: unknown capability {', '.join(map(repr, unknown))}")
    # Whether its fallbacks are there is seen when one is needed: models come and go one by one.
    check(key not in model.fallbacks, f"{who}: is its own fallback")
    for adapter, source in model.adapters.items():
        check(re.match(ADAPTER_NAME, adapter) is not None, f"{who}: {adapter!r} is no name of an adapter")
        check(bool(source), f"{who}: adapter {adapter!r} says not where it is")
    if not model.enabled:
        return
    for name in (model.id, *model.aliases):
        check(not is_reserved(name), f"{who}: the name {name!r} is reserved for a choice by the router")
    check(model.provider in state.providers, f"{who}: there is no provider {model.provider!r}")
    kind = state.providers[model.provider].kind
    check(not model.adapters or kind in ADAPTER_KINDS, f"{who}: a provider of kind {kind} loads no adapters")
    taken = {
        name: other.id
        for other in state.models.values()
        if other.enabled and other.id != key
        for name in (*_names(other), *_adapted(other))
    }
    for name in (*_names(model), *_adapted(model)):
        check(name not in taken, f"{who}: the name {name!r} is taken by model {taken.get(name)!r}")
    check(len({model.id, *model.aliases}) == 1 + len(model.aliases), f"{who}: an alias stands twice")


def _names(model: Model) -> tuple[str, ...]:
    return (model.id, *model.aliases)


def _adapted(model: Model) -> tuple[str, ...]:
    return tuple(f"{model.id}:{adapter}" for adapter in model.adapters)
