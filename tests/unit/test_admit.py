"""Whose rights a publisher's request has: its app's, or those of an API key of its app that is in force."""

from __future__ import annotations

import msgspec
import pytest

from headrace.errors import Forbidden, Unauthorized
from headrace.registry import snapshot_of
from headrace.senders import sender
from processors.router.admit import key_of
from schemas.control import App, Key
from tests.support.publishing import PUBLIC, SEALS, Sample, publisher_headers, signed
from topics.envelope import Published

APPS = {
    "shop": App("shop", "Shop", publishers={"p1": PUBLIC}),
    "rival": App("rival", "Rival"),
    "off": App("off", "Off", enabled=False, publishers={"p1": PUBLIC}),
}
SNAPSHOT = snapshot_of([], [], [msgspec.json.encode(app) for app in APPS.values()], 1)
NOW_S = 1_000.0


def key(app: str, **fields: object) -> Key:
    return Key(id="key-1", sha256="0" * 64, name="k", app=app, **fields)  # type: ignore[arg-type]


def published(app: str = "shop", *, api_key_id: str | None = None) -> Published:
    headers = publisher_headers(app, hr_api_key_id=api_key_id)
    found = sender(Sample(signed(headers, b"{}"), b"{}"), SEALS, APPS).published
    assert found is not None
    return found


def test_an_api_key_of_the_app_gives_its_rights_and_without_one_the_app_does() -> None:
    mine = key("shop", expires_at=NOW_S + 1)
    assert key_of(published(api_key_id="key-1"), mine, SNAPSHOT, NOW_S) is mine
    apps_own = key_of(published(), None, SNAPSHOT, NOW_S)
    assert (apps_own.id, apps_own.app) == ("publisher:p1", "shop")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "names no API key of this app"),
        (key("rival"), "names no API key of this app"),
        (key("shop", enabled=False), "names no API key of this app"),
        (key("shop", expires_at=NOW_S), "has expired"),
        (key("rival", expires_at=NOW_S), "names no API key of this app"),
    ],
    ids=["nobody's", "another app's", "revoked", "expired", "another app's that has expired"],
)
def test_a_key_that_is_not_the_apps_or_not_in_force_is_refused(found: Key | None, says: str) -> None:
    with pytest.raises(Unauthorized, match=says) as refused:
        key_of(published(api_key_id="key-1"), found, SNAPSHOT, NOW_S)
    assert refused.value.param == "hr-api-key-id"


def test_an_app_that_is_off_has_no_rights() -> None:
    with pytest.raises(Forbidden, match="app is not enabled"):
        key_of(published("off", api_key_id="key-1"), key("off"), SNAPSHOT, NOW_S)
