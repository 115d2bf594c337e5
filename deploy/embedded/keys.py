"""The secrets of a stack: given by the environment, or made at the first start, and kept in its data directory."""

from __future__ import annotations

import secrets
from pathlib import Path

from deploy.embedded.files import write_private

ADMIN_KEY_FILE = "admin.key"
JWT_SECRET_FILE = "jwt.secret"  # noqa: S105
INGRESS_SECRET_FILE = "ingress.secret"  # noqa: S105 - the name of a file


def admin_key(data_dir: Path, given: str | None) -> tuple[str, bool]:
    """The key, and whether it was made just now, so that it can be shown once. The file has mode 0600."""
    path = data_dir / ADMIN_KEY_FILE
    known = path.read_text().strip() if path.exists() else ""
    key = given or known or f"hr-{secrets.token_urlsafe(32)}"
    if key != known:
        write_private(path, key + "\n")
    return key, not given and not known


def jwt_secret(data_dir: Path) -> str:
    """What a stack signs access tokens with, where the environment names nothing."""
    return _kept(data_dir / JWT_SECRET_FILE)


def make_ingress_secret(data_dir: Path) -> None:
    """Make the secret of this stack's ingresses, once: what was sealed before a restart must still be known."""
    _kept(data_dir / INGRESS_SECRET_FILE)


def _kept(path: Path) -> str:
    """A secret that is made once. The file has mode 0600."""
    known = path.read_text().strip() if path.exists() else ""
    if not known:
        known = secrets.token_urlsafe(48)
        write_private(path, known + "\n")
    return known
