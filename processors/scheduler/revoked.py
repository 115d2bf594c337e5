"""Which requests nobody may have any more: those of keys, users, publishers and apps that were revoked. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.access import USER_PREFIX, app_refusal, key_refusal, user_refusal
from headrace.registry import Caller
from schemas.control import App, Key, User
from schemas.events import Routed

REVOKED = "The key, its user, its publisher or its app was revoked."

Name = tuple[str, str]


def name_of(routed: Routed) -> Name:
    """By what the registry finds who asked for a request; it knows no publishers, which are their app's."""
    if routed.key_id.startswith(USER_PREFIX):
        return "user", routed.key_id.removeprefix(USER_PREFIX)
    return "id", routed.key_id


def is_revoked(routed: Routed, found: Mapping[Name, Caller | None], apps: Mapping[str, App]) -> bool:
    """Whether a request is to be ended. A key or user that is not found tells nothing: their records are kept."""
    if app_refusal(routed.tenant, apps) is not None:
        return True
    if routed.publisher and routed.publisher not in apps[routed.tenant].publishers:
        return True
    match found.get(name_of(routed)):
        case User() as user:
            return user_refusal(user) is not None
        case Key() as key:
            return key_refusal(key, apps, now_s=0) is not None
        case None:
            return False
