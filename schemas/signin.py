"""Bodies and answers of `/auth`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Password = Annotated[str, Field(min_length=1, max_length=1024)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class SignInBody(_Strict):
    """The body of `POST /auth/token`."""

    email: Annotated[str, Field(min_length=1, max_length=254, examples=["ada@example.org"])]
    password: Password


class Refresh(_Strict):
    """The body of `POST /auth/refresh`."""

    refresh_token: Annotated[str, Field(min_length=1, max_length=256)]


class PasswordChange(_Strict):
    """The body of `POST /auth/password`."""

    current_password: Password
    new_password: Annotated[str, Field(min_length=8, max_length=1024)]


class Me(BaseModel):
    """Who asks, and what it may do."""

    kind: Literal["user", "key"]
    id: str
    name: str
    email: str | None = None
    role: str
    apps: list[str]
    """Those whose requests it sees; owners and admins see all, whatever stands here."""
    permissions: list[str]


class Tokens(BaseModel):
    """A session's tokens."""

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105
    expires_in: int
    """Seconds until the access token expires."""
    refresh_token: str
    """Good once; the next one comes with the next access token."""
    user: Me
