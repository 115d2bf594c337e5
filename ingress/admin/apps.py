"""`/admin/apps`: the tenants, to which keys, limits and bills belong."""

from __future__ import annotations

from fastapi import Request, Response

from headrace import records
from headrace.access import Permission
from ingress import guard
from ingress.admin.records import (
    After,
    Enabled,
    Limit,
    Search,
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
from ingress.services import Services
from schemas.admin_records import AppCreate, AppPatch, AppView, AppViews
from schemas.control import App

router = guard.router(prefix="/admin/apps", tags=["admin: apps"])


@router.post("", **makes())
@guard.needs(Permission.APPS_WRITE)
async def create_app(request: Request, body: AppCreate, response: Response) -> AppView:
    """Make an app; its `id` is made of the name where none is given. The same again is the same app."""
    app = records.new_app(body)
    await create(request, app)
    made = await one_of(request.app.state.services, App, app.id)
    tag(response, made)
    return records.app_view(made)


@router.get("")
@guard.needs(Permission.APPS_READ)
async def list_apps(
    request: Request, limit: Limit = 100, after: After = None, enabled: Enabled = None, q: Search = None
) -> AppViews:
    """Apps, by id."""
    services: Services = request.app.state.services
    found = [app for app in await all_of(services, App) if records.is_wanted(app, q, enabled)]
    part = page(found, lambda app: app.id, limit, after)
    return AppViews(data=[records.app_view(app) for app in part.items], has_more=part.has_more, last_id=part.last_id)


@router.get("/{app_id}", **shows())
@guard.needs(Permission.APPS_READ)
async def get_app(request: Request, app_id: str, response: Response) -> AppView:
    """One app."""
    found = await one_of(request.app.state.services, App, app_id)
    tag(response, found)
    return records.app_view(found)


@router.patch("/{app_id}", **changes())
@guard.needs(Permission.APPS_WRITE)
async def update_app(request: Request, app_id: str, body: AppPatch, response: Response) -> AppView:
    """Change an app; in force when this answers."""
    services: Services = request.app.state.services
    made = await change(
        request, lambda: one_of(services, App, app_id), lambda app: records.changed_app(app, body)
    )  # fmt: skip
    tag(response, made)
    return records.app_view(made)


@router.delete("/{app_id}", **changes())
@guard.needs(Permission.APPS_WRITE)
async def disable_app(request: Request, app_id: str, response: Response) -> AppView:
    """Disable an app: its keys are refused at once, its answers end. Its record stays: nobody else gets its id."""
    services: Services = request.app.state.services
    patch = AppPatch(enabled=False)
    made = await change(
        request,
        lambda: one_of(services, App, app_id),
        lambda app: records.changed_app(app, patch),
        reason="disabled",
    )
    tag(response, made)
    return records.app_view(made)
