"""What the routes of all kinds of records share: reading one or a page, ETags, and changes that wait until in force."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from fastapi import Query, Request
from starlette.responses import Response

from headrace.access import Principal
from headrace.control_client import PreconditionFailed, command
from headrace.errors import InvalidRequest, NotFound
from ingress.guard import principal_of
from ingress.services import Services
from schemas.control import ABSENT, RECORDS, App, Key, Model, Record, User, digest
from schemas.openai import ErrorBody

UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "There is none of that name."}}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorBody, "description": "It does not go with how things are; the message says why."}
}
STALE: dict[int | str, dict[str, Any]] = {
    412: {"model": ErrorBody, "description": "`If-Match` names another version: read it again."}
}
MAX_REASON = 500
_ETAG = {"headers": {"ETag": {"description": "The record's version, for `If-Match`.", "schema": {"type": "string"}}}}
_REASON = {
    "name": "x-hr-reason", "in": "header", "schema": {"type": "string", "maxLength": MAX_REASON},
    "description": "Why; it stands in the audit trail.",
}  # fmt: skip
_IF_MATCH = {
    "name": "If-Match", "in": "header", "schema": {"type": "string"},
    "description": "The `ETag` that the change is meant for: it is refused if the record is another by now.",
}  # fmt: skip


def shows() -> dict[str, Any]:
    """What a route that answers with one record is declared with."""
    return {"responses": UNKNOWN | {200: _ETAG}}


def makes() -> dict[str, Any]:
    """What a route that makes a record is declared with."""
    return {
        "status_code": 201,
        "responses": CONFLICT | {201: _ETAG},
        "openapi_extra": {"parameters": [_REASON]},
    }


def changes(status: int = 200) -> dict[str, Any]:
    """What a route that changes a record is declared with."""
    return {
        "status_code": status,
        "responses": UNKNOWN | CONFLICT | STALE | {status: _ETAG},
        "openapi_extra": {"parameters": [_REASON, _IF_MATCH]},
    }


Limit = Annotated[int, Query(ge=1, le=1000, description="Most that are given at once.")]
After = Annotated[str | None, Query(max_length=256, description="`last_id` of the page before.")]
Text = Annotated[str | None, Query(max_length=256)]
Enabled = Annotated[bool | None, Query(description="Only those that are enabled, or that are not.")]
Search = Annotated[str | None, Query(max_length=256, description="Only those in whose names this text is.")]

TRIES = 5
"""Times that a change without `If-Match` is made anew because others changed the same record in between."""

T = TypeVar("T")
Kept = TypeVar("Kept", App, Key, Model, User)


class PageOf(NamedTuple):
    """What of a list is given: fields of `schemas.admin_records.Page`, and the items."""

    items: list[Any]
    has_more: bool
    last_id: str | None


def page(items: Sequence[T], id_of: Callable[[T], str], limit: int, after: str | None) -> PageOf:
    """A page of items by id; those after the id `after`, be it there or not."""
    ordered = sorted(items, key=id_of)
    rest = [item for item in ordered if after is None or id_of(item) > after]
    given = rest[:limit]
    return PageOf(given, len(rest) > limit, id_of(given[-1]) if given else None)


async def all_of(services: Services, kind: type[Kept]) -> list[Kept]:
    """All records of a kind, as they are in force. Raises `Unavailable`."""
    name = next(name for name, held in RECORDS.items() if held is kind)
    return [msgspec.json.decode(raw, type=kind) for raw in await services.projection.records(name)]


async def one_of(services: Services, kind: type[Kept], key: str) -> Kept:
    """The record with this natural key. Raises `NotFound`, `Unavailable`."""
    name = next(name for name, held in RECORDS.items() if held is kind)
    found = await services.projection.some(name, [key])
    if not found:
        raise NotFound(f"There is no {name[:-1]} {key!r}.")
    return msgspec.json.decode(found[0], type=kind)


def tag(response: Response, record: Record) -> None:
    """Name the version of the record that an answer shows."""
    response.headers["etag"] = f'"{digest(record)}"'


def reason_of(request: Request) -> str:
    """Why the caller asks for a change, as it says in `x-hr-reason`. Raises `InvalidRequest`."""
    reason = request.headers.get("x-hr-reason", "").strip()
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise InvalidRequest(f"x-hr-reason must be at most {MAX_REASON} printable characters.", param="x-hr-reason")
    return reason


def if_match(request: Request) -> frozenset[str] | None:
    """The versions that `If-Match` allows; None for any."""
    header = request.headers.get("if-match")
    if header is None or header.strip() == "*":
        return None
    return frozenset(part.strip().strip('"') for part in header.split(","))


async def create(request: Request, record: Kept) -> None:
    """Put a new record into force. The same one again changes nothing. Raises `CommandsRefused`, `Unavailable`."""
    services: Services = request.app.state.services
    actor, reason = principal_of(request).actor, reason_of(request)
    await services.control.submit([command(record, actor=actor, reason=reason, if_match=ABSENT)])


async def change(
    request: Request,
    read: Callable[[], Awaitable[Kept]],
    make: Callable[[Kept], Kept],
    *,
    allow: Callable[[Principal, Kept, Kept], None] = lambda who, before, after: None,
    reason: str = "",
) -> Kept:
    """Change a record and return it as it is then in force.

    The control processor compares versions, so that of two who change the same record at once neither undoes the
    other: with `If-Match` the second is refused, without it its change is made to what the first left. `allow` raises
    where the caller may not do this. Raises `PreconditionFailed`, `CommandsRefused`, `Unavailable`.
    """
    services: Services = request.app.state.services
    who, wanted = principal_of(request), if_match(request)
    reason = reason_of(request) or reason
    for left in reversed(range(TRIES)):
        before = await read()
        if wanted is not None and digest(before) not in wanted:
            raise PreconditionFailed(
                "The record is another than If-Match says; read it again, and change what you find."
            )
        after = make(before)
        allow(who, before, after)
        if after == before:
            return before
        try:
            sent = command(after, actor=who.actor, reason=reason, if_match=digest(before))
            await services.control.submit([sent])
        except PreconditionFailed:
            if wanted is not None or not left:
                raise
            continue
        return await read()
    raise AssertionError("the last try returns or raises")
