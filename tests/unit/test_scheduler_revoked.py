"""Who may not have an answer any more, also after its request was admitted."""

from __future__ import annotations

import msgspec
import pytest

from processors.scheduler.revoked import is_revoked, name_of
from schemas.control import App, Key, User
from schemas.events import BodyRef, Routed
from topics.envelope import PUBLISHER_PREFIX

PUBLISHERS = {"p1": "…"}
APP, OFF = App("shop", "Shop", publishers=PUBLISHERS), App("shop", "Shop", enabled=False, publishers=PUBLISHERS)
KEY, USER = Key("k", "", "k", "shop"), User("u", "u@example.org")


def asked_by(who: str) -> Routed:
    key_id, _, publisher = who.partition(" by ")
    publisher = publisher or (key_id.removeprefix(PUBLISHER_PREFIX) if key_id.startswith(PUBLISHER_PREFIX) else "")
    return Routed("r", "shop", key_id, "m", "m", "default", 0, BodyRef(0, 0), publisher=publisher)


@pytest.mark.parametrize(
    ("who", "caller", "app", "revoked"),
    [
        ("k", KEY, APP, False),
        ("k", msgspec.structs.replace(KEY, enabled=False), APP, True),
        ("k", msgspec.structs.replace(KEY, expires_at=1), APP, False),
        ("k", KEY, OFF, True),
        ("k", None, APP, False),
        ("k", None, OFF, True),
        ("user:u", USER, APP, False),
        ("user:u", msgspec.structs.replace(USER, enabled=False), APP, True),
        ("user:u", USER, OFF, True),
        ("publisher:p1", None, APP, False),
        ("publisher:p2", None, APP, True),
        ("publisher:p1", None, OFF, True),
        ("k by p1", KEY, APP, False),
        ("k by p1", msgspec.structs.replace(KEY, enabled=False), APP, True),
        ("k by p2", KEY, APP, True),
        ("k", KEY, None, True),
    ],
)
def test_who_is_revoked(who: str, caller: Key | User | None, app: App | None, revoked: bool) -> None:
    routed = asked_by(who)
    assert is_revoked(routed, {name_of(routed): caller}, {"shop": app} if app is not None else {}) is revoked
