"""Answers and bodies of the admin API on what operators look after: the audit trail, dead letters, erasures.

Times are Unix milliseconds.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.admin import Text
from schemas.admin_records import Page


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


class LetterView(BaseModel):
    """A dead letter, without its content."""

    number: int
    at_ms: int
    """When it was buried."""
    topic: str
    """Where the message was, with partition and offset."""
    partition: int
    offset: int
    role: str
    """Which role could not handle it."""
    times_seen: int
    reason: str
    bytes: int
    tenant: str
    """Whose it is, with the request's id; both empty where that cannot be told."""
    request_id: str
    replayed_as: str | None
    """Id under which it was sent again; null when it was not."""


class Letters(BaseModel):
    """The answer of `GET /admin/dead-letters`, the newest first."""

    object: Literal["list"] = "list"
    data: list[LetterView]
    next: int | None
    """`before` of the next page; null when nothing older is kept."""


class WholeLetter(LetterView):
    """The answer of `GET /admin/dead-letters/{number}`."""

    key: str | None
    headers: list[tuple[str, str]]
    body: str | None
    """The message, where it was asked for; what is not UTF-8 stands as `\\x…`."""


class LetterReplay(BaseModel):
    """The body of `POST /admin/dead-letters/{number}/replay`."""

    model_config = ConfigDict(extra="forbid")

    reason: Text
    body: dict[str, Any] | str | None = None
    """What is sent in place of the message: an object, which is sent as JSON, or a text."""
    again: bool = False
    """Whether to send it though it was replayed before."""


class LetterSent(BaseModel):
    """A letter was sent again; what becomes of it is told as of any other message."""

    number: int
    topic: str
    request_id: str | None
    """Id of the new request; null where the message was none."""


class ErasureWanted(BaseModel):
    """The body of `POST /admin/erasures`: one of the three, and why."""

    model_config = ConfigDict(extra="forbid")

    user: Text | None = None
    app: Text | None = None
    request: Text | None = None
    reason: Text


class ErasureView(BaseModel):
    """An erasure, and how far it is."""

    subject: str
    """`user/ID`, `app/ID`, `request/ID`, or `key/ID` for each key of a user."""
    of: str
    """The user, of a key's."""
    asked_ms: int
    applied: dict[str, int | None]
    """Since when each projection holds none of it; null while it still may."""
    gone_ms: dict[str, int] = Field(description="By topic, when Kafka's own copies are gone at the latest.")


class ErasureViews(Page):
    """The answer of `GET /admin/erasures`, the newest first."""

    data: list[ErasureView]
