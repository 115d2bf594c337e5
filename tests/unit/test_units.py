"""Durations and sizes, as people write and read them."""

from __future__ import annotations

import pytest

from headrace import units


@pytest.mark.parametrize(
    ("text", "ms"),
    [("0s", 0), ("250ms", 250), ("30s", 30_000), ("5m", 300_000), ("1.5h", 5_400_000), (" 2 d ", 172_800_000)],
)
def test_durations(text: str, ms: int) -> None:
    assert units.parse_duration(text) == ms


@pytest.mark.parametrize(
    ("text", "count"),
    [("0B", 0), ("1 kB", 1000), ("1 KiB", 1024), ("800 MB", 800_000_000), ("1.5GiB", 1_610_612_736), ("1TB", 10**12)],
)
def test_sizes(text: str, count: int) -> None:
    assert units.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "5", "m", "-5s", "5 M", "1e3s", "1h30m", "5m!"])
def test_what_is_no_duration_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="write a duration such as"):
        units.parse_duration(text)


@pytest.mark.parametrize("text", ["", "4", "4 Gib", "4 GiB/s", "-1 MB", "GiB"])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="write a size such as"):
        units.parse_size(text)


def test_shown_sizes_and_ages() -> None:
    assert [units.size(count) for count in (0, 1023, 1024, 98_362_432, 2**40 * 3)] == [
        "0 B", "1023 B", "1.0 KiB", "93.8 MiB", "3.0 TiB",
    ]  # fmt: skip
    assert [units.age(ms) for ms in (-5, 800, 12_400, 119_999, 300_000, 7_200_000, 345_600_000)] == [
        "0.0 s", "0.8 s", "12 s", "119 s", "5 min", "2.0 h", "4.0 d",
    ]  # fmt: skip
