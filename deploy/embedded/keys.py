"""The admin key of a stack: given by the environment, or made at the first start, and kept in `DATA_DIR/admin.key`."""

from __future__ import annotations

import secrets
from pathlib import Path

from deploy.embedded.files import write_private

ADMIN_KEY_FILE = "admin.key"


def admin_key(data_dir: Path, given: str | None) -> tuple[str, bool]:
    """The key, and whether it was made just now, so that it can be shown once. The file has mode 0600."""
    path = data_dir / ADMIN_KEY_FILE
    known = path.read_text().strip() if path.exists() else ""
    key = given or known or f"hr-{secrets.token_urlsafe(32)}"
    if key != known:
        write_private(path, key + "\n")
    return key, not given and not known
