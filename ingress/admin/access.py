"""Who may use the admin API."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from headrace.errors import Forbidden
from ingress.auth import caller
from ingress.services import Services
from schemas.control import Key
from schemas.openai import ErrorBody


async def admin(request: Request) -> Key:
    """The caller's key. Raises `Unauthorized`, and `Forbidden` unless its role is `admin`."""
    services: Services = request.app.state.services
    key = await caller(request, services.registry)
    if key.role != "admin":
        raise Forbidden("This needs a key of role 'admin'.")
    return key


Admin = Annotated[Key, Depends(admin)]

REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorBody, "description": "No key, or one that is not known."},
    403: {"model": ErrorBody, "description": "The key's role is not `admin`."},
    503: {"model": ErrorBody, "description": "What is asked for is not known yet, or nobody could obey."},
}
"""Errors of every route, for OpenAPI."""
UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "There is none of that name."}}
CONFLICT: dict[int | str, dict[str, Any]] = {409: {"model": ErrorBody, "description": "It does not go with its state."}}
