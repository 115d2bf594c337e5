"""What a migration is, and the list of all of them."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from dataclasses import dataclass

from clickhouse import migrations


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered step. Every statement must be safe to run again: a runner may die between any two of them."""

    number: int
    name: str
    reason: str
    up: tuple[str, ...]
    down: tuple[str, ...]

    @property
    def checksum(self) -> str:
        """SHA-256 over the words of the `up` statements, so that layout does not count."""
        return hashlib.sha256("\n".join(" ".join(text.split()) for text in self.up).encode()).hexdigest()


def load() -> list[Migration]:
    """All migrations by number. Raises `ValueError` when the numbers are not 1, 2, 3 …"""
    found = [
        importlib.import_module(f"{migrations.__name__}.{module.name}").MIGRATION
        for module in pkgutil.iter_modules(migrations.__path__)
    ]
    steps: list[Migration] = sorted(found, key=lambda step: step.number)
    if [step.number for step in steps] != list(range(1, len(steps) + 1)):
        raise ValueError(f"migration numbers have gaps or repeat: {[step.number for step in steps]}")
    return steps
