"""Whose limits a request must keep to: its key's, its app's and its model's. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import NamedTuple

from schemas.control import App, Budgeted, Key, Limited, Model

KEY, APP, MODEL = "key", "app", "model"


class Scope(NamedTuple):
    """The limits of one key, app or model; None sets none."""

    kind: str
    """`key`, `app` or `model`."""
    id: str
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    budget: Decimal | None = None

    @property
    def name(self) -> str:
        """How Redis knows it."""
        return scope_name(self.kind, self.id)

    @property
    def limited(self) -> bool:
        """Whether it limits anything."""
        return (self.rpm, self.tpm, self.concurrency, self.budget) != (None, None, None, None)


def scope_name(kind: str, identity: str) -> str:
    """How Redis knows a key, app or model."""
    return f"{kind}:{identity}"


def scope_of(kind: str, identity: str, limits: Limited) -> Scope:
    """The scope of a record."""
    budget = limits.monthly_budget if isinstance(limits, Budgeted) else None
    return Scope(kind, identity, limits.rate_limit_rpm, limits.rate_limit_tpm, limits.concurrency_limit, budget)


def scopes_of(key: Key | None, app: App | None, model: Model) -> tuple[Scope, ...]:
    """The scopes that limit a request; empty for most, whose admission then asks nothing of Redis."""
    found = (
        scope_of(KEY, key.id, key) if key is not None else None,
        scope_of(APP, app.id, app) if app is not None else None,
        scope_of(MODEL, model.id, model),
    )
    return tuple(scope for scope in found if scope is not None and scope.limited)


def counts_output(scopes: Iterable[Scope]) -> bool:
    """Whether what is generated counts, so that it must have a cap."""
    return any(scope.tpm is not None or scope.budget is not None for scope in scopes)
