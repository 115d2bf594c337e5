"""`/admin/users`: who may sign in."""

from __future__ import annotations

import uuid_utils
from fastapi import Request, Response

from headrace import audit, records
from headrace.access import Permission, check_change, check_grant
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
    one_of,
    page,
    shows,
    tag,
)
from ingress.guard import Who
from ingress.services import Services
from ingress.signin import hashing
from schemas.admin_records import UserCreate, UserPatch, UserView, UserViews
from schemas.control import User

router = guard.router(prefix="/admin/users", tags=["admin: users"])


@router.post("", **makes())
@guard.needs(Permission.USERS_WRITE)
async def create_user(request: Request, body: UserCreate, who: Who, response: Response) -> UserView:
    """Make a user, who can sign in when this answers. Only an owner makes owners and admins."""
    services: Services = request.app.state.services
    check_grant(who, body.role)
    user_id = f"user-{uuid_utils.uuid7().hex[-16:]}"
    filed = await hashing.hashed(body.password, field="password") if body.password is not None else ""
    user = records.new_user(body, user_id, filed)
    await create(request, user)
    made = await one_of(services, User, user.id)
    tag(response, made)
    return records.user_view(made)


@router.get("")
@guard.needs(Permission.USERS_READ)
async def list_users(
    request: Request, who: Who, limit: Limit = 100, after: After = None, app: Text = None, role: Text = None,
    enabled: Enabled = None, q: Search = None,
) -> UserViews:  # fmt: skip
    """Users, by id; the look is written into the audit trail, since names and addresses are somebody's."""
    services: Services = request.app.state.services
    said = audit.only({"app": app, "role": role, "enabled": enabled, "q": q})
    await audit.record(services.producer, audit.note("read", "users", "all", actor=who.actor, **said))
    found = [user for user in await all_of(services, User) if records.is_wanted(user, q, enabled, app=app, role=role)]
    part = page(found, lambda user: user.id, limit, after)
    return UserViews(data=[records.user_view(one) for one in part.items], has_more=part.has_more, last_id=part.last_id)


@router.get("/{user_id}", **shows())
@guard.needs(Permission.USERS_READ)
async def get_user(request: Request, user_id: str, who: Who, response: Response) -> UserView:
    """One user; the look is written into the audit trail."""
    services: Services = request.app.state.services
    found = await one_of(services, User, user_id)
    await audit.record(services.producer, audit.note("read", "users", user_id, actor=who.actor))
    tag(response, found)
    return records.user_view(found)


@router.patch("/{user_id}", **changes())
@guard.needs(Permission.USERS_WRITE)
async def update_user(request: Request, user_id: str, body: UserPatch, response: Response) -> UserView:
    """Change a user. With another role or password all its sessions are refused when this answers."""
    services: Services = request.app.state.services
    filed = await hashing.hashed(body.password, field="password") if body.password is not None else None
    made = await change(
        request,
        lambda: one_of(services, User, user_id),
        lambda user: records.changed_user(user, body, filed),
        allow=check_change,
    )
    tag(response, made)
    return records.user_view(made)


@router.delete("/{user_id}", **changes())
@guard.needs(Permission.USERS_WRITE)
async def disable_user(request: Request, user_id: str, response: Response) -> UserView:
    """Disable a user: its sessions are refused at once, its answers end. Its record stays, and so do its keys."""
    services: Services = request.app.state.services
    patch = UserPatch(enabled=False)
    made = await change(
        request,
        lambda: one_of(services, User, user_id),
        lambda user: records.changed_user(user, patch, None),
        allow=check_change,
        reason="disabled",
    )
    tag(response, made)
    return records.user_view(made)
