"""API keys: how they are made and filed, and where a stack's admin key is found."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from headrace.errors import HeadraceError
from headrace.settings import Settings
from schemas.control import OWNER, Key

PREFIX = "hr-"
ADMIN_KEY_FILE = "admin.key"
ADMIN_ID = "admin-"
"""Ids of admin keys that `headrace apply` filed begin with this; only the newest stays enabled."""


class NoAdminKey(HeadraceError):
    """Neither the environment nor the data directory has an admin key."""

    status = 400
    code = "no_admin_key"


def new_key() -> str:
    """The text of a new API key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def sha256(text: str) -> str:
    """What is filed of a key's text. Keys are random, so that no slow hash is needed (unlike passwords)."""
    return hashlib.sha256(text.encode()).hexdigest()


def admin_record(text: str, app: str) -> Key:
    """The record of the admin key: an owner, as whoever runs the stack."""
    digest = sha256(text)
    return Key(id=ADMIN_ID + digest[:12], sha256=digest, name="admin", app=app, role=OWNER)


def find_admin_key(settings: Settings) -> str:
    """The admin key from `HEADRACE_ADMIN_KEY`, else from the data directory. Raises `NoAdminKey`."""
    if settings.admin_key is not None and settings.admin_key.get_secret_value().strip():
        return settings.admin_key.get_secret_value().strip()
    path = Path(settings.data_dir) / ADMIN_KEY_FILE
    try:
        found = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        found = ""
    if not found:
        raise NoAdminKey(f"No admin key: set HEADRACE_ADMIN_KEY, or write one to {path}.")
    return found
