"""Durations and sizes as people write and read them. Pure."""

from __future__ import annotations

import re

_DURATION_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SIZES: dict[str, int] = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4} | {
    f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)
}
_AMOUNT = re.compile(r"^(\d+(?:\.\d+)?)\s*([A-Za-z]+)$")


def parse_duration(text: str) -> int:
    """Milliseconds of a duration such as "5m", "30s", "1.5h" or "0s". Raises `ValueError`."""
    found = _AMOUNT.match(text.strip())
    if found is None or found[2] not in _DURATION_MS:
        raise ValueError(f'write a duration such as "30s" or "5m" ({", ".join(_DURATION_MS)})')
    return round(float(found[1]) * _DURATION_MS[found[2]])


def parse_size(text: str) -> int:
    """Bytes of a size such as "4 GiB" or "800 MB" (1 kB is 1000 bytes, 1 KiB is 1024). Raises `ValueError`."""
    found = _AMOUNT.match(text.strip())
    if found is None or found[2] not in _SIZES:
        raise ValueError(f'write a size such as "4 GiB" or "800 MB" ({", ".join(_SIZES)})')
    return round(float(found[1]) * _SIZES[found[2]])


def size(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least one of it: "3.5 GiB"."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def age(ms: int) -> str:
    """A span of time, as exact as people want it: "0.8 s", "12 s", "5 min", "3.2 h", "4.0 d"."""
    if ms < 10_000:
        return f"{max(0, ms) / 1000:.1f} s"
    if ms < 120_000:
        return f"{ms // 1000} s"
    if ms < 7_200_000:
        return f"{ms // 60_000} min"
    return f"{ms / 3_600_000:.1f} h" if ms < 172_800_000 else f"{ms / 86_400_000:.1f} d"
