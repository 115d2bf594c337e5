"""Where in a TOML file a field stands: Python's `tomllib` gives values without lines, and errors should name them."""

from __future__ import annotations

import re
import tomllib

Path = tuple[str | int, ...]

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(
    r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


def locate(source: str) -> dict[Path, int]:
    """The 1-based line of every table and field of a valid TOML document that begins a line."""
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    pending = ""
    for number, line in enumerate(source.splitlines(), start=1):
        if pending:
            pending = _unfinished(f"{pending}\n{line}")
            continue
        header, assignment = _HEADER.match(line), _ASSIGNMENT.match(line)
        if header is not None:
            table = _enter(_names(header[2]), counts, array=header[1] == "[[")
            lines.setdefault(table, number)
        elif assignment is not None:
            path = table + _names(assignment[1])
            lines[path] = number
            pending = _unfinished(line)
    return lines


def line_of(lines: dict[Path, int], path: Path) -> int:
    """The line of a field; of what surrounds it, if it has none of its own; 1 at last."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1


def _names(dotted: str) -> Path:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


def _enter(names: Path, counts: dict[Path, int], *, array: bool) -> Path:
    """The path of the table that a header opens; inside an array of tables that is its newest element."""
    path: Path = ()
    for name in names[:-1]:
        path = (*path, name)
        if path in counts:
            path = (*path, counts[path] - 1)
    path = (*path, names[-1])
    if array:
        counts[path] = counts.get(path, 0) + 1
        path = (*path, counts[path] - 1)
    return path


def _unfinished(text: str) -> str:
    """The text itself while its value goes on in the next line, else nothing."""
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return text
    return ""
