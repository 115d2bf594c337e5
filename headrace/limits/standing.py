"""How much of its limits a key, app or model has used: for those who show it. Pure."""

from __future__ import annotations

from decimal import Decimal
from typing import NamedTuple

import msgspec

from headrace.limits.amounts import amount
from headrace.limits.scopes import Scope


class Used(NamedTuple):
    """What one scope has used."""

    requests: int
    """In the last 60 seconds, where a rate limit has it counted."""
    tokens: int
    open: int
    """Requests without a terminal, of those that were admitted under a limit."""
    spent: int
    """Money of this month that is settled, in units of 10⁻¹²."""
    held: int
    """Money that is reserved."""


class Line(msgspec.Struct, frozen=True):
    """One limit and what is used of it; `limit` is None where none is set."""

    limit: Decimal | None
    used: Decimal

    @property
    def left(self) -> Decimal | None:
        """What is left of it; None where none is set."""
        return max(Decimal(0), self.limit - self.used) if self.limit is not None else None


class Standing(msgspec.Struct, frozen=True):
    """How a scope stands to its limits."""

    rate_limit_rpm: Line
    rate_limit_tpm: Line
    concurrency_limit: Line
    monthly_budget: Line
    """`used` is what was spent and what is reserved."""
    spent: Decimal
    """Money of this month that is settled."""


def standing(scope: Scope, used: Used) -> Standing:
    """How a scope stands, from what it has used."""
    return Standing(
        rate_limit_rpm=_line(scope.rpm, used.requests),
        rate_limit_tpm=_line(scope.tpm, used.tokens),
        concurrency_limit=_line(scope.concurrency, used.open),
        monthly_budget=Line(scope.budget, amount(used.spent + used.held)),
        spent=amount(used.spent),
    )


def _line(limit: int | None, used: int) -> Line:
    return Line(Decimal(limit) if limit is not None else None, Decimal(used))
