"""`/auth`: signing in and out, refreshing, who one is, and one's own password."""

from __future__ import annotations

import json
import time
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from headrace import audit
from headrace.access import GRANTS, Permission, Principal
from headrace.control_client import command
from headrace.errors import InvalidRequest, InvalidToken, WrongPassword
from ingress import guard
from ingress.guard import Who
from ingress.openai.body import read_body
from ingress.services import Services
from ingress.signin import hashing
from ingress.signin.tokens import LIFE_S
from schemas.control import User, digest
from schemas.openai import ErrorBody
from schemas.signin import Me, PasswordChange, Refresh, SignInBody, Tokens

router = guard.router(prefix="/auth", tags=["sign-in"])

WRONG = "The e-mail address or the password is wrong."
UNKNOWN = "unknown"
"""In the audit trail, for accounts that are not there: they take as long as others, and so are written down too."""
NO_STORE = {"cache-control": "no-store"}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The body is malformed."},
    401: {"model": ErrorBody, "description": "The password is wrong, or the token is not good."},
    429: {"model": ErrorBody, "description": "Too many sign-ins failed; `retry-after` says how long to wait."},
    503: {"model": ErrorBody, "description": "Redis is away; nobody can sign in."},
}
Body = TypeVar("Body", bound=BaseModel)


def _either(model: type[BaseModel], form: dict[str, Any]) -> dict[str, Any]:
    """How OpenAPI tells of a body that is JSON or a form."""
    schema = model.model_json_schema()
    fields = {name: {"type": "string", **more} for name, more in form.items()}
    as_form = {"type": "object", "required": list(fields), "properties": fields}
    content = {"application/json": {"schema": schema}, "application/x-www-form-urlencoded": {"schema": as_form}}
    return {"requestBody": {"required": True, "content": content}}


async def _body(request: Request, model: type[Body], renamed: dict[str, str]) -> Body:
    """The body, JSON or a form whose fields have other names. Raises `InvalidRequest`, and shows no value."""
    raw = await read_body(request)
    is_form = request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded")
    try:
        if is_form:
            fields = dict(parse_qsl(raw.decode(), keep_blank_values=True, strict_parsing=bool(raw)))
            given: object = {renamed[name]: value for name, value in fields.items() if name in renamed}
        else:
            given = json.loads(raw)
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{where or 'body'}: {first['msg']}.", param=where or None) from None
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is neither JSON nor a form.") from None


@router.post(
    "/token",
    response_model=Tokens,
    responses=REFUSALS,
    openapi_extra=_either(SignInBody, {"username": {}, "password": {}}),
)
@guard.public
async def sign_in(request: Request) -> Response:
    """Sign in with e-mail address and password, as JSON or as OAuth 2's form (`username`, `password`)."""
    services: Services = request.app.state.services
    body = await _body(request, SignInBody, {"username": "email", "password": "password"})
    email = body.email.strip().lower()
    address = _address(request)
    attempt = await services.attempts.begin(email, address)
    user = await services.registry.user_by_email(email)
    # An account that is not there takes as long as one that is.
    right = await hashing.is_right(body.password, user.password_hash if user is not None else "")
    if not right or user is None or not user.enabled:
        await _write_down(services, user, "sign_in", outcome="refused", address=address)
        raise WrongPassword(WRONG)
    await services.attempts.succeeded(attempt)
    await _write_down(services, user, "sign_in", address=address)
    return await _begin(services, user)


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""


async def _write_down(
    services: Services, user: User | None, action: str, *, outcome: str = "done", **detail: str
) -> None:
    """Into the audit trail. None is an account that is not there; what was typed may be a password, and is not said."""
    actor = Principal.of_user(user, "").actor if user is not None and outcome == "done" else "nobody"
    key = user.id if user is not None else UNKNOWN
    await audit.record(services.producer, audit.note(action, "sessions", key, actor=actor, outcome=outcome, **detail))


async def _begin(services: Services, user: User) -> Response:
    session_id, refresh = await services.sessions.begin(user)
    return _tokens(services, user, session_id, refresh)


def _tokens(services: Services, user: User, session_id: str, refresh: str) -> Response:
    access = services.signin.issue(user.id, session_id, now_s=time.time())
    made = Tokens(access_token=access, expires_in=LIFE_S, refresh_token=refresh, user=_me(user))
    return Response(made.model_dump_json(), media_type="application/json", headers=NO_STORE)


def _me(user: User) -> Me:
    permissions = sorted({*GRANTS[user.role], Permission.SESSION})
    return Me(
        kind="user", id=user.id, name=user.name, email=user.email, role=user.role, apps=list(user.apps),
        permissions=[permission.value for permission in permissions],
    )  # fmt: skip


@router.post(
    "/refresh", response_model=Tokens, responses=REFUSALS, openapi_extra=_either(Refresh, {"refresh_token": {}})
)
@guard.public
async def refresh(request: Request) -> Response:
    """Take the next access and refresh tokens. A refresh token is good once: used again, it ends the session."""
    services: Services = request.app.state.services
    body = await _body(request, Refresh, {"refresh_token": "refresh_token"})
    session_id, session, following = await services.sessions.refresh(body.refresh_token)
    user = await services.registry.user(session.user, fresh=True)
    if user is None or not user.enabled or not session.is_of(user):
        await services.sessions.end(session_id)
        raise InvalidToken("Your account was changed; sign in again.")
    return _tokens(services, user, session_id, following)


@router.post("/logout", status_code=204)
@guard.needs(Permission.SESSION)
async def sign_out(request: Request, who: Who) -> Response:
    """End this session: its tokens are refused from now on, on every replica within half a second."""
    services: Services = request.app.state.services
    if who.user is not None:
        await _write_down(services, who.user, "sign_out")
    await services.sessions.end(who.session)
    return Response(status_code=204)


@router.get("/me")
@guard.needs(Permission.SELF)
async def me(who: Who) -> Me:
    """Who one is, and what one may do."""
    if who.user is not None:
        return _me(who.user)
    key = who.key
    assert key is not None, "a principal is a key or a user"  # noqa: S101
    granted = sorted(permission.value for permission in GRANTS[key.role])
    return Me(kind="key", id=key.id, name=key.name, role=key.role, apps=[key.app], permissions=granted)


@router.post("/password", response_model=Tokens, responses=REFUSALS)
@guard.needs(Permission.SESSION)
async def change_password(request: Request, body: PasswordChange, who: Who) -> Response:
    """Change one's own password. All sessions end; the answer begins a new one."""
    services: Services = request.app.state.services
    user = who.user
    assert user is not None, "sessions are users'"  # noqa: S101
    attempt = await services.attempts.begin(user.email, _address(request))
    if not await hashing.is_right(body.current_password, user.password_hash):
        await _write_down(services, user, "sign_in", outcome="refused", reason="to change its password")
        raise WrongPassword("The current password is wrong.")
    await services.attempts.succeeded(attempt)
    filed = await hashing.hashed(body.new_password, field="new_password")
    changed = msgspec.structs.replace(user, password_hash=filed)
    sent = command(changed, actor=who.actor, reason="its own password", if_match=digest(user))
    await services.control.submit([sent])
    return await _begin(services, changed)
