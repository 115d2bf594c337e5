"""`/admin/prices`: what models cost, from when on. Versions stay for ever: usage names the one that it has."""

from __future__ import annotations

import time

import msgspec
from aiokafka.errors import KafkaError
from fastapi import Request, Response

from headrace import records
from headrace.access import Permission
from headrace.control_client import PreconditionFailed, priced
from headrace.control_log import replay_control
from headrace.errors import Unavailable
from ingress import guard
from ingress.admin.records import After, Limit, Text, all_of, changes, if_match, one_of, page, reason_of, tag
from ingress.guard import Who
from ingress.services import Services
from schemas.admin_records import PriceCreate, PriceVersion, PriceVersions
from schemas.control import Model, Price, digest
from topics.catalogue import CONTROL_PRICES

router = guard.router(prefix="/admin/prices", tags=["admin: prices"])


@router.get("")
@guard.needs(Permission.PRICES_READ)
async def list_prices(
    request: Request, limit: Limit = 100, after: After = None, model: Text = None
) -> PriceVersions:  # fmt: skip
    """All versions of prices, by model and version; also of models that are gone."""
    services: Services = request.app.state.services
    try:
        kept = (await replay_control(services.settings, {"prices": CONTROL_PRICES})).records["prices"]
    except KafkaError as error:
        raise Unavailable("Prices cannot be read now (Kafka does not answer).") from error
    now_ms = time.time_ns() // 1_000_000
    in_force = {found.id: found.price_at(now_ms).version for found in await all_of(services, Model)}
    views = []
    for key, raw in kept.items():
        name = key.rpartition("/")[0]
        if model is None or name == model:
            views.append(records.price_view(name, msgspec.json.decode(raw, type=Price), in_force.get(name)))
    part = page(views, _order, limit, _position(after))
    return PriceVersions(data=part.items, has_more=part.has_more, last_id=part.items[-1].id if part.items else None)


def _order(view: PriceVersion) -> str:
    return f"{view.model}/{view.version:012}"


def _position(after: str | None) -> str | None:
    """Where a page begins: versions are numbers, and 10 comes after 9."""
    if after is None:
        return None
    model, _, version = after.rpartition("/")
    return f"{model}/{int(version):012}" if version.isascii() and version.isdecimal() else after


@router.post("", **changes(201))
@guard.needs(Permission.PRICES_WRITE)
async def set_price(request: Request, body: PriceCreate, who: Who, response: Response) -> PriceVersion:
    """Give a model a price from a moment on. The same again is the same version. `If-Match` takes the model's ETag."""
    services: Services = request.app.state.services
    reason, wanted = reason_of(request), if_match(request)
    seen = None
    if wanted is not None:
        seen = digest(await one_of(services, Model, body.model))
        if seen not in wanted:
            raise PreconditionFailed("The model is another than If-Match says; read it again.")
    price = records.new_price(body)
    await services.control.submit([priced(body.model, price, actor=who.actor, reason=reason, if_match=seen)])
    model = await one_of(services, Model, body.model)
    tag(response, model)
    now_ms = time.time_ns() // 1_000_000
    made = model.price_at(max(price.effective_from_ms, now_ms))
    return records.price_view(model.id, made, model.price_at(now_ms).version)
