"""What an error of ClickHouse means: is the server away or busy, or is a row at fault."""

from __future__ import annotations

import re
import struct

import aiohttp
from clickhouse_connect.driver.exceptions import DataError, Error

Away = (Error, aiohttp.ClientError, OSError, TimeoutError)
"""What a call may raise because of the server or the way to it; trying again later is right, unless `is_data_error`."""

DATA_CODES = frozenset({
    6,  # CANNOT_PARSE_TEXT
    26,  # CANNOT_PARSE_QUOTED_STRING
    27,  # CANNOT_PARSE_INPUT_ASSERTION_FAILED
    38,  # CANNOT_PARSE_DATE
    41,  # CANNOT_PARSE_DATETIME
    69,  # ARGUMENT_OUT_OF_BOUND
    70,  # CANNOT_CONVERT_TYPE
    72,  # CANNOT_PARSE_NUMBER
    117,  # INCORRECT_DATA
    131,  # TOO_LARGE_STRING_SIZE
    321,  # VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE
    349,  # CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN
    407,  # DECIMAL_OVERFLOW
    469,  # VIOLATED_CONSTRAINT
})  # fmt: skip
"""Codes of ClickHouse's ErrorCodes.cpp that only the inserted data can cause. All others are tried again for ever."""

_CODE = re.compile(r"Code:\s*(\d+)")
_MESSAGE = re.compile(r"DB::Exception:\s*(.*?)\s*(?:\(version .*)?$", re.DOTALL)
_REASON = re.compile(r"\[Errno -?\d+\] ([^\"')]+)")


def code(error: BaseException) -> int | None:
    """ClickHouse's number of an error, or None when the server did not answer."""
    known = getattr(error, "code", None)
    if isinstance(known, int):
        return known
    found = _CODE.search(str(error))
    return int(found[1]) if found else None


def is_data_error(error: BaseException) -> bool:
    """Whether an insert failed because of what was inserted, so that trying it again is of no use."""
    if isinstance(error, Error) and not isinstance(error, DataError):
        return code(error) in DATA_CODES
    return isinstance(error, DataError | struct.error | ArithmeticError | ValueError | TypeError)


def sentence(error: BaseException) -> str:
    """An error in one sentence for the operator, without the driver's and the server's decoration."""
    text = str(error).strip() or type(error).__name__
    found = _MESSAGE.search(text)
    if found:
        return " ".join(found[1].split())
    if code(error) is None and isinstance(error, Away):
        reason = _REASON.search(text)
        return f"ClickHouse does not answer: {reason[1] if reason else ' '.join(text.split())}"
    return " ".join(text.split())
