"""`/admin/keys`: API keys. Their texts are shown once, when they are made; only the SHA-256 is kept."""

from __future__ import annotations

from fastapi import Request, Response

from headrace import api_keys, records
from headrace.access import Permission, check_change, check_grant
from headrace.errors import NotFound
from ingress import guard
from ingress.admin.records import (
    After,
    Enabled,
    Limit,
    Search,
    Text,
    all_of,
    change,
    changes,
    create,
    makes,
    page,
    shows,
    tag,
)
from ingress.guard import Who
from ingress.services import Services
from schemas.admin_records import KeyCreate, KeyMade, KeyPatch, KeyView, KeyViews
from schemas.control import Key

router = guard.router(prefix="/admin/keys", tags=["admin: keys"])


async def _find(services: Services, key_id: str) -> Key:
    [found] = await services.registry.callers([("id", key_id)])
    if not isinstance(found, Key):
        raise NotFound(f"There is no key {key_id!r}.")
    return found


@router.post("", **makes())
@guard.needs(Permission.KEYS_WRITE)
async def create_key(request: Request, body: KeyCreate, who: Who, response: Response) -> KeyMade:
    """Make a key. It works, on every replica, when this answers; `key` is its text, this once."""
    services: Services = request.app.state.services
    check_grant(who, body.role)
    text = api_keys.new_key()
    key = records.new_key(body, text, services.registry.snapshot.models)
    await create(request, key)
    made = await _find(services, key.id)
    tag(response, made)
    response.headers["cache-control"] = "no-store"
    return KeyMade(**records.key_view(made).model_dump(), key=text)


@router.get("")
@guard.needs(Permission.KEYS_READ)
async def list_keys(
    request: Request, limit: Limit = 100, after: After = None, app: Text = None, owner_id: Text = None,
    enabled: Enabled = None, q: Search = None,
) -> KeyViews:  # fmt: skip
    """Keys, by id; revoked ones too."""
    services: Services = request.app.state.services
    found = [
        key for key in await all_of(services, Key) if records.is_wanted(key, q, enabled, app=app, owner_id=owner_id)
    ]
    part = page(found, lambda key: key.id, limit, after)
    return KeyViews(data=[records.key_view(key) for key in part.items], has_more=part.has_more, last_id=part.last_id)


@router.get("/{key_id}", **shows())
@guard.needs(Permission.KEYS_READ)
async def get_key(request: Request, key_id: str, response: Response) -> KeyView:
    """One key."""
    found = await _find(request.app.state.services, key_id)
    tag(response, found)
    return records.key_view(found)


@router.patch("/{key_id}", **changes())
@guard.needs(Permission.KEYS_WRITE)
async def update_key(request: Request, key_id: str, body: KeyPatch, response: Response) -> KeyView:
    """Change a key; in force when this answers."""
    services: Services = request.app.state.services
    models = services.registry.snapshot.models
    made = await change(
        request,
        lambda: _find(services, key_id),
        lambda key: records.changed_key(key, body, models),
        allow=check_change,
    )
    tag(response, made)
    return records.key_view(made)


@router.delete("/{key_id}", **changes())
@guard.needs(Permission.KEYS_WRITE)
async def revoke_key(request: Request, key_id: str, response: Response) -> KeyView:
    """Revoke a key: refused at once, its answers end, what it has queued is cancelled. Its record stays."""
    services: Services = request.app.state.services
    patch = KeyPatch(enabled=False)
    made = await change(
        request,
        lambda: _find(services, key_id),
        lambda key: records.changed_key(key, patch, {}),
        allow=check_change,
        reason="revoked",
    )
    tag(response, made)
    return records.key_view(made)
