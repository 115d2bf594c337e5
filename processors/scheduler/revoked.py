"""Which requests nobody may have any more: those of keys, users and apps that were revoked. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.access import USER_PREFIX, app_refusal, key_refusal, user_refusal
from headrace.registry import Caller
from schemas.control import App, User
from schemas.events import Routed

REVOKED = "The key, its user or its app was revoked."

Name = tuple[str, str]


def name_of(routed: Routed) -> Name:
    """By what the registry finds who asked for a request."""
    if routed.key_id.startswith(USER_PREFIX):
        return "user", routed.key_id.removeprefix(USER_PREFIX)
    return "id", routed.key_id


def is_revoked(routed: Routed, found: Mapping[Name, Caller | None], apps: Mapping[str, App]) -> bool:
    """Whether a request is to be ended. One whose sender is not known is not: records of keys are kept."""
    caller = found.get(name_of(routed))
    if caller is None:
        return False
    if isinstance(caller, User):
        return (user_refusal(caller) or app_refusal(routed.tenant, apps)) is not None
    return key_refusal(caller, apps, now_s=0) is not None
