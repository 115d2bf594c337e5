"""Whether a statement only reads, and reads only what is in the database: judged on ClickHouse's own parse of it. Pure.

`readonly` alone does not do: `file('/etc/passwd')` is a function like any other to it, and the embedded engine, which
has no users, would also open sockets and write files. What EXPLAIN AST prints has no quotes, escapes or comments to
hide behind.
"""

from __future__ import annotations

import re

READS = (
    "SelectWithUnionQuery", "SelectIntersectExceptQuery", "ShowTables", "ShowColumns", "ShowFunctions",
    "ShowCreateTableQuery", "ShowCreateViewQuery", "ShowCreateDatabaseQuery", "DescribeQuery", "ExistsTableQuery",
    "ExistsViewQuery", "ExistsDatabaseQuery", "Explain",
)  # fmt: skip
"""What a statement may be."""
TABLE_FUNCTIONS = frozenset(
    ("numbers", "numbers_mt", "zeros", "zeros_mt", "generateseries", "generate_series", "values", "null", "view")
)
"""All others reach files, other servers, or other engines."""
FORBIDDEN = re.compile(r"file|catboostevaluate|dict.*|.*python.*|.*executable.*")
"""Functions that read files or run what lies outside of the database."""

_FUNCTION = re.compile(r"Function (\S+)")


class NotReadOnly(ValueError):
    """The statement would write, or reach outside of the database; the message says what is not allowed."""


def check(ast: str) -> None:
    """Judge what `EXPLAIN AST` printed of a statement. Raises `NotReadOnly`."""
    lines = ast.splitlines()
    first = lines[0].split(" ", 1)[0] if lines else ""
    if first not in READS:
        raise NotReadOnly("only statements that read are allowed: SELECT, WITH, SHOW, DESCRIBE, EXISTS, EXPLAIN")
    before = ""
    for line in lines:
        words = line.strip()
        if re.match(r" Literal ", line):
            raise NotReadOnly("INTO OUTFILE is not allowed; take --format and redirect what is printed")
        found = _FUNCTION.match(words)
        name = found[1].lower() if found else ""
        if name and before.startswith("TableExpression") and name not in TABLE_FUNCTIONS:
            raise NotReadOnly(f"the table function {name} is not allowed: it reaches outside of the database")
        if name and FORBIDDEN.fullmatch(name):
            raise NotReadOnly(f"the function {name} is not allowed: it reaches outside of the database")
        before = words
