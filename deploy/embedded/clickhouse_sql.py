"""What an HTTP front has to know of a ClickHouse statement: its kind, its format, and where inline data begins."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_STATEMENT = 262_144
"""Longest statement text in bytes, the server's default `max_query_size`; data of an INSERT does not count."""

CHUNK_SAFE_FORMATS = frozenset(
    {
        "csv",
        "jsoncompacteachrow",
        "jsoneachrow",
        "jsonlines",
        "native",
        "ndjson",
        "rowbinary",
        "tabseparated",
        "tabseparatedraw",
        "tsv",
        "tsvraw",
    }
)
"""Formats without header or footer: their chunks can be sent as they come (the engine ends each chunk like a file)."""

_CONTENT_TYPES = {
    "csv": "text/csv; charset=UTF-8; header=absent",
    "csvwithnames": "text/csv; charset=UTF-8; header=present",
    "csvwithnamesandtypes": "text/csv; charset=UTF-8; header=present",
    "json": "application/json; charset=UTF-8",
    "jsoncompact": "application/json; charset=UTF-8",
    "jsonstrings": "application/json; charset=UTF-8",
    "jsoneachrow": "application/x-ndjson; charset=UTF-8",
    "jsoncompacteachrow": "application/x-ndjson; charset=UTF-8",
    "native": "application/octet-stream",
    "rowbinary": "application/octet-stream",
    "rowbinarywithnamesandtypes": "application/octet-stream",
    "arrow": "application/octet-stream",
    "arrowstream": "application/octet-stream",
    "parquet": "application/octet-stream",
    "xml": "application/xml; charset=UTF-8",
    "markdown": "text/markdown; charset=UTF-8",
}

_SPACE = r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)"
_TOKEN = re.compile(
    rb"(?P<space>(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)+)"
    rb"|(?P<quoted>`(?:[^`\\]|\\.)*`|\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')"
    rb"|(?P<word>\w+)"
    rb"|(?P<other>.)",
    re.DOTALL,
)
_FIRST_WORD = re.compile(rf"{_SPACE}*\(*{_SPACE}*(\w+)", re.DOTALL)
_OUTPUT_FORMAT = re.compile(
    rf"\bFORMAT\b{_SPACE}+(\w+)(?:{_SPACE}+SETTINGS\b[^;]*)?{_SPACE}*;?{_SPACE}*$", re.DOTALL | re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Insert:
    """An INSERT that carries data: the statement without FORMAT or VALUES, the data's format, and its start."""

    statement: str
    format: str
    data_start: int
    """Offset in bytes of the first byte of data."""


def first_word(statement: str) -> str:
    """The first keyword in upper case, past comments and opening brackets; empty if there is none."""
    found = _FIRST_WORD.match(statement)
    return found.group(1).upper() if found else ""


def output_format(statement: str, default: str) -> str:
    """The format that a query's result comes in: its own FORMAT clause, else `default`."""
    found = _OUTPUT_FORMAT.search(statement)
    return found.group(1) if found else default


def content_type(format_name: str) -> str:
    """The media type that ClickHouse sends for a format."""
    return _CONTENT_TYPES.get(format_name.lower(), "text/tab-separated-values; charset=UTF-8")


def parse_insert(head: bytes) -> Insert | None:
    """Split an INSERT from its data, given the first bytes of the text; None when it is no INSERT with data.

    `INSERT … SELECT` carries none and gives None, as does a head that ends before FORMAT or VALUES.
    """
    words = 0
    depth = 0
    position = 0
    while found := _TOKEN.match(head, position):
        start, position = position, found.end()
        if found.lastgroup == "other":
            depth += {b"(": 1, b")": -1}.get(found.group(), 0)
            continue
        if found.lastgroup != "word":
            continue
        word = found.group().upper()
        words += 1
        if words == 1 and word != b"INSERT":
            return None
        if depth:
            continue
        if word in (b"SELECT", b"WITH", b"WATCH"):
            return None
        if word == b"VALUES":
            return Insert(head[:start].decode(), "Values", position)
        if word == b"FORMAT":
            named = re.compile(rb"\s+(\w+)").match(head, position)
            if named is None:
                return None
            return Insert(head[:start].decode(), named.group(1).decode(), _data_start(head, named.end()))
    return None


def _data_start(head: bytes, position: int) -> int:
    """Data begins after the blanks that follow the format's name: through the first line end, or at a visible byte."""
    while position < len(head) and head[position : position + 1] in (b" ", b"\t", b"\r"):
        position += 1
    if head[position : position + 1] == b"\n":
        return position + 1
    return position
