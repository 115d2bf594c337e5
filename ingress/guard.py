"""The one mechanism of access: every route says what it needs, and nothing of a request is read before that is granted.

A route that says nothing cannot be made. docs/api.md has the table of routes and roles, which a test compares with
what the routes do.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from headrace.access import Permission, Principal
from headrace.errors import Forbidden
from ingress.auth import authenticate
from schemas.openai import ErrorBody

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
_NEEDS = "__headrace_needs__"
PUBLIC = "public"
"""What a route needs that everybody may ask."""

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is malformed; `param` says where."},
    401: {"model": ErrorBody, "description": "No key or token, or one that is not known, revoked or expired."},
    403: {"model": ErrorBody, "description": "Its role may not do this."},
    503: {"model": ErrorBody, "description": "A part is away or not ready; `retry-after` says when to come again."},
}
"""Errors of every guarded route, for OpenAPI."""
SECURITY: list[dict[str, list[str]]] = [{"bearer": []}]


def needs(permission: Permission) -> Callable[[Endpoint], Endpoint]:
    """Let an endpoint be called by principals that have a permission."""

    def declared(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _NEEDS, permission)
        return endpoint

    return declared


def public(endpoint: Endpoint) -> Endpoint:
    """Let an endpoint be called by everybody."""
    setattr(endpoint, _NEEDS, PUBLIC)
    return endpoint


def needed(endpoint: Callable[..., Any]) -> Permission | str:
    """What an endpoint needs. Raises `TypeError` when it does not say."""
    found = getattr(endpoint, _NEEDS, None)
    if found is None:
        raise TypeError(f"{endpoint.__module__}.{endpoint.__name__} must say what it needs: @needs(…) or @public")
    return cast("Permission | str", found)


class GuardedRoute(APIRoute):
    """A route that asks who is there first."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if needed(endpoint) != PUBLIC:
            options["responses"] = REFUSALS | (options.get("responses") or {})
            options["openapi_extra"] = {"security": SECURITY} | (options.get("openapi_extra") or {})
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, behind its guard."""
        handler = super().get_route_handler()
        permission = needed(self.endpoint)
        if not isinstance(permission, Permission):
            return handler

        async def guard(request: Request) -> Response:
            request.state.principal = await admitted(request, permission)
            return await handler(request)

        return guard


async def admitted(request: Request, permission: Permission) -> Principal:
    """Who asks, if that may do this. Raises as `authenticate` does, and `Forbidden`."""
    principal = await authenticate(request)
    if not principal.may(permission):
        raise _refusal(principal, permission)
    return principal


def _refusal(principal: Principal, permission: Permission) -> Forbidden:
    if permission is Permission.SESSION:
        return Forbidden("This is for signed-in users: POST /auth/token gives a token.")
    return Forbidden(f"The role {principal.role!r} may not do this; it needs the permission {permission.value!r}.")


def router(**options: Any) -> APIRouter:
    """A router of guarded routes."""
    return APIRouter(route_class=GuardedRoute, **options)


def principal_of(request: Request) -> Principal:
    """Who asks, of a route that is not public."""
    return cast(Principal, request.state.principal)


Who = Annotated[Principal, Depends(principal_of)]
