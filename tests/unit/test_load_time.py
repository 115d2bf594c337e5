"""How much of a wait its model was being loaded."""

from __future__ import annotations

import pytest

from headrace.asked import images_of
from processors.generation.attempt import overlap_ms


@pytest.mark.parametrize(
    ("wait", "loads", "expected"),
    [
        ((100, 200), [], 0),
        ((100, 200), [(0, 100)], 0),
        ((100, 200), [(50, 150)], 50),
        ((100, 200), [(120, 130)], 10),
        ((100, 200), [(50, 110), (190, 400)], 20),
    ],
)
def test_only_the_common_part_counts(wait: tuple[int, int], loads: list[tuple[int, int]], expected: int) -> None:
    assert overlap_ms(*wait, loads) == expected


def test_pictures_are_counted_in_every_shape_of_a_body() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    text = {"type": "text", "text": "and"}
    assert (
        images_of({"messages": [{"content": [picture, text, picture]}, {"content": "plain"}, {"content": None}]}) == 2
    )
    assert images_of({}) == 0 == images_of({"messages": [{"content": [1]}, 5]})
