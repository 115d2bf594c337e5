"""What a wheel of `pyproject.toml` holds: every package says that it is typed, and no rule leaves that out."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec

ROOT = Path(__file__).parents[2]
WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
PACKAGES: list[str] = WHEEL["packages"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_of_the_wheel_says_that_it_is_typed(package: str) -> None:
    """PEP 561. Hatch takes each file of a package that git does not ignore, and the settings exclude none."""
    marker = f"{package}/py.typed"
    assert (ROOT / marker).is_file(), "type checkers of who installs it look at no annotation"
    ignored = GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text().splitlines())
    assert not ignored.match_file(marker) and WHEEL.keys() == {"packages"}


def test_what_is_typed_uses_nothing_of_ours_that_is_not() -> None:
    ours = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert ours == set(PACKAGES)
