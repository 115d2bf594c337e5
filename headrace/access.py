"""Who may do what: permissions, the roles that have them, and principals, who are keys or signed-in users. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from headrace.errors import Forbidden, HeadraceError, InvalidRequest, Unauthorized
from schemas.control import ADMIN, DEFAULT_APP, MEMBER, OWNER, VIEWER, App, Key, User

USER_PREFIX = "user:"
"""Begins what stands in a request's envelope in place of a key's id when a signed-in user sent it; no key's id may."""


class Permission(StrEnum):
    """What a route needs. Values are the names in docs/api.md."""

    GENERATE = "generate"
    """Ask models, and attach to what was asked."""
    MODELS_SEE = "models.see"
    """See what may be asked."""
    REQUESTS_READ = "requests.read"
    """See the life of requests of one's own apps; owners and admins see those of all."""
    SELF = "self"
    """See who one is."""
    SESSION = "session"
    """Act on one's own session and password: for signed-in users, whatever their role."""
    USAGE_OWN = "usage.own"
    """See what one has used."""
    USAGE_READ = "usage.read"
    FLEET_READ = "fleet.read"
    FLEET_STEER = "fleet.steer"
    KEYS_READ = "keys.read"
    KEYS_WRITE = "keys.write"
    USERS_READ = "users.read"
    USERS_WRITE = "users.write"
    APPS_READ = "apps.read"
    APPS_WRITE = "apps.write"
    MODELS_READ = "models.read"
    MODELS_WRITE = "models.write"
    PRICES_READ = "prices.read"
    PRICES_WRITE = "prices.write"
    AUDIT_READ = "audit.read"
    LETTERS_READ = "letters.read"
    LETTERS_WRITE = "letters.write"
    ERASURES_READ = "erasures.read"
    ERASURES_WRITE = "erasures.write"


_SEES = frozenset({Permission.MODELS_SEE, Permission.REQUESTS_READ, Permission.USAGE_OWN, Permission.SELF})
_ALL = frozenset(Permission) - {Permission.SESSION}
GRANTS: Mapping[str, frozenset[Permission]] = {
    OWNER: _ALL,
    ADMIN: _ALL,
    MEMBER: _SEES | {Permission.GENERATE},
    VIEWER: _SEES,
}
"""What each role may do. That only owners name owners and admins is `check_grant`'s."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a key, or a signed-in user."""

    role: str
    apps: tuple[str, ...]
    key: Key | None = None
    user: User | None = None
    session: str = ""
    """Of a signed-in user."""

    @classmethod
    def of_key(cls, key: Key) -> Principal:
        """The principal of an API key, which belongs to one app."""
        return cls(key.role, (key.app,), key=key)

    @classmethod
    def of_user(cls, user: User, session: str) -> Principal:
        """The principal of a user in a session."""
        return cls(user.role, user.apps, user=user, session=session)

    @property
    def actor(self) -> str:
        """How it stands in what it asked for."""
        if self.user is not None:
            return f"user {self.user.id}"
        return f"key {self.key.id}" if self.key is not None else "nobody"

    def may(self, permission: Permission) -> bool:
        """Whether it has a permission."""
        if permission is Permission.SESSION:
            return self.user is not None
        return permission in GRANTS.get(self.role, frozenset())

    def sees(self, app: str) -> bool:
        """Whether it may see what is an app's own."""
        return sees_all(self.role) or app in self.apps

    def asks_for(self, app: str | None) -> Key:
        """The key under which it asks models: its own, or for a user one that stands for it in an app.

        `app` is the one that the caller names, if any. Raises `Forbidden` for another's, `InvalidRequest` for none.
        """
        if self.key is not None:
            if app is not None and app != self.key.app:
                raise Forbidden(f"The key belongs to the app {self.key.app!r}; leave x-hr-app out.")
            return self.key
        if self.user is None:
            raise Forbidden("Nobody asks.")
        chosen = app or (self.apps[0] if self.apps else DEFAULT_APP if sees_all(self.role) else "")
        if not chosen:
            raise Forbidden("You belong to no app; an admin can change that.")
        if not self.sees(chosen):
            raise Forbidden(f"You do not belong to the app {chosen!r}.")
        return as_key(self.user, chosen)


def sees_all(role: str) -> bool:
    """Whether a role sees all apps."""
    return role in (OWNER, ADMIN)


def as_key(user: User, app: str) -> Key:
    """A user as a key of an app: nobody can send it, but requests are asked and billed under its id."""
    return Key(
        id=f"{USER_PREFIX}{user.id}", sha256="", name=user.email, app=app, role=user.role, enabled=user.enabled,
        owner_id=user.id,
    )  # fmt: skip


def check_grant(who: Principal, *roles: str) -> None:
    """Raise `Forbidden` unless `who` may give, take or touch these roles: owners and admins are the owners' affair."""
    named = [role for role in roles if sees_all(role)]
    if named and who.role != OWNER:
        raise Forbidden(f"Only an owner may make, change or remove who has the role {named[0]!r}.")


def check_change(who: Principal, before: Key | User, after: Key | User) -> None:
    """Raise `Forbidden` unless `who` may make a key or a user into what it is `after`."""
    check_grant(who, before.role, after.role)


def key_refusal(key: Key | None, apps: Mapping[str, App], now_s: float) -> HeadraceError | None:
    """Why a key is refused, if it is: it is not there, revoked, expired (`now_s`, Unix seconds), or its app is off."""
    if key is None or not key.enabled:
        return Unauthorized("The API key is not known or was revoked.")
    if key.expires_at is not None and key.expires_at <= now_s:
        return Unauthorized("The API key has expired.")
    return app_refusal(key.app, apps)


def app_refusal(app: str, apps: Mapping[str, App]) -> HeadraceError | None:
    """Why nothing is done for an app, if so."""
    found = apps.get(app)
    return Forbidden("The API key's app is not enabled.") if found is None or not found.enabled else None


def user_refusal(user: User | None) -> HeadraceError | None:
    """Why a user is refused, if so."""
    return Unauthorized("The user is not known or is disabled.") if user is None or not user.enabled else None


def check_app_name(name: str | None) -> str | None:
    """The app that a header names, if it can be one. Raises `InvalidRequest`."""
    if name is not None and not (0 < len(name) <= 128 and name.isprintable()):
        raise InvalidRequest("x-hr-app must be the id of an app.", param="x-hr-app")
    return name
