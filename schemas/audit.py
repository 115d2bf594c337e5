"""The audit trail: one event for each thing that was changed, wished for, looked at or refused, chained by hashes."""

from __future__ import annotations

import msgspec

GENESIS = "0" * 64
"""`previous` of the first event that ever was."""
AUDIT = "audit"
"""Kind of the commands that change nothing and are only to be written down."""


class Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """A field's value before and after, each as JSON text; empty where there was, or is, none."""

    before: str = ""
    after: str = ""


class AuditNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value of a command of kind `audit`: what somebody did or saw, as the role says that let them."""

    action: str
    kind: str
    """What it was done to: `requests`, `dead-letters`, `audit`, `models`, …"""
    key: str
    """Which one: a name or an id, never a secret."""
    outcome: str = "done"
    detail: dict[str, str] = {}


class AuditEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event of the audit trail (`audit.events`), written in the transaction that it tells of."""

    seq: int
    """Counts from 1, without a gap."""
    previous: str
    """`hash` of the event before."""
    at_ms: int
    """Append time of the command, by the brokers' clock."""
    command: str
    """Id of the command; each is written down once."""
    actor: str
    action: str
    """`create`, `update`, `delete`, or what a note says: `read`, `load`, `replay`, …"""
    kind: str
    key: str
    """Natural key of what it was about; of an API key its id."""
    outcome: str
    """`applied`, `unchanged`, `refused`, `unreadable`, or what a note says."""
    reason: str = ""
    """Why the actor did it."""
    refusal: str = ""
    """Why it was refused."""
    changes: dict[str, Change] = {}
    """By field; secrets are `"redacted"`."""
    detail: dict[str, str] = {}
    hash: str = ""
    """SHA-256, hex, of this event as JSON without `hash`: keys sorted, no white space, UTF-8."""


class AuditHead(msgspec.Struct, frozen=True):
    """The last event of a UTC day so far (`audit.heads`, key: the day), written in the same transaction."""

    seq: int
    hash: str
    at_ms: int
