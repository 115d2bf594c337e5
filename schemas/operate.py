"""Answers and bodies of the admin API on what operators look after: the audit trail.

Times are Unix milliseconds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ChangeView(BaseModel):
    """A field's value before and after, each as JSON text; empty where there was, or is, none."""

    before: str
    after: str


class AuditEventView(BaseModel):
    """One event of the audit trail."""

    seq: int
    previous: str
    """`hash` of the event before."""
    hash: str
    at_ms: int
    """When the brokers took the command."""
    command: str
    actor: str
    action: str
    kind: str
    key: str
    outcome: str
    reason: str
    refusal: str
    """Why it was refused."""
    changes: dict[str, ChangeView]
    detail: dict[str, str]


class AuditEvents(BaseModel):
    """The answer of `GET /admin/audit`, the newest event first."""

    object: Literal["list"] = "list"
    data: list[AuditEventView]
    next: int | None
    """`before` of the next page; null when nothing older is kept."""
