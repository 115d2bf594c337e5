"""Bodies that are forms: clickhouse-connect sends long parameters so, since a URL cannot hold them."""

from __future__ import annotations

from collections.abc import Iterator
from email.message import Message
from email.parser import BytesFeedParser

from deploy.embedded.clickhouse_body import BodyError

FIELD_LIMIT = 128 << 10
"""Bytes of one field: `http_max_field_value_size` of a server with its defaults."""
FORM_LIMIT = 16 << 20
"""Bytes of a whole form."""


def is_form(content_type: str) -> bool:
    """Whether a body of this Content-Type holds fields, and not a statement."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def fields(content_type: str, body: Iterator[bytes]) -> dict[str, str]:
    """The fields of a form by name.

    Raises:
        BodyError: it is no form, is too large, or carries a file (an external table, which is not supported here).
    """
    parser = BytesFeedParser()
    parser.feed(f"Content-Type: {content_type}\r\n\r\n".encode("latin-1"))
    size = 0
    for piece in body:
        size += len(piece)
        if size > FORM_LIMIT:
            raise BodyError(f"the form is longer than {FORM_LIMIT} bytes")
        parser.feed(piece)
    form = parser.close()
    if not form.is_multipart() or form.defects:
        raise BodyError("the body is not the multipart form that its Content-Type names")
    return dict(map(_field, form.get_payload()))


def _field(part: Message) -> tuple[str, str]:
    name = part.get_param("name", header="content-disposition")
    if not isinstance(name, str):
        raise BodyError("a part of the form has no name")
    if part.get_filename() is not None:
        raise BodyError(f"the form carries the file {name!r}: external tables are not supported here")
    value = part.get_payload(decode=True)
    if not isinstance(value, bytes):
        raise BodyError(f"the field {name!r} of the form holds a form")
    if len(value) > FIELD_LIMIT:
        raise BodyError(f"the field {name!r} of the form is longer than {FIELD_LIMIT} bytes")
    return name, value.decode("utf-8", "surrogateescape")
