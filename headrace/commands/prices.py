"""`headrace prices`: what models cost, from when on."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from headrace import records
from headrace.commands.failures import stop
from headrace.commands.records import (
    ACTOR,
    AsJson,
    Cached,
    Currency,
    DataDir,
    Reason,
    body,
    day,
    print_json,
    table_of,
    with_client,
    yes,
)
from headrace.control_client import ControlClient, priced
from headrace.control_log import replay_control
from headrace.local import resolve
from schemas.admin_records import PriceCreate, PriceVersion
from schemas.control import Price
from topics.catalogue import CONTROL_PRICES

Money = Annotated[str, typer.Option(metavar="MONEY", help="For a million tokens.")]


def group() -> typer.Typer:
    """The commands."""
    made = typer.Typer(help="Prices of models, versioned.", no_args_is_help=True)
    made.command("set")(set_price)
    made.command("list")(list_all)
    return made


def set_price(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id of the model.")],
    input_price: Annotated[str, typer.Option("--input", metavar="MONEY", help="A million prompt tokens.")],
    output: Annotated[str, typer.Option("--output", metavar="MONEY", help="A million completion tokens.")],
    cached: Cached = None,
    currency: Currency = None,
    start: Annotated[str | None, typer.Option("--from", metavar="TIME", help="From then on; default: now.")] = None,
    reason: Reason = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Give a model a price, from now or a moment to come on."""
    fields = {"model": model, "input": input_price, "output": output, "cached": cached, "currency": currency}
    price = records.new_price(body(PriceCreate, fields | {"effective_from": start}))

    async def work(client: ControlClient) -> PriceVersion | None:
        if model not in (await client.read()).models:
            return None
        await client.submit([priced(model, price, actor=ACTOR, reason=reason)])
        held, now_ms = (await client.read()).models[model], time.time_ns() // 1_000_000
        made = held.price_at(max(price.effective_from_ms, now_ms))
        return records.price_view(model, made, held.price_at(now_ms).version)

    view = with_client(data_dir, work)
    if view is None:
        raise stop(f"there is no model {model!r}; `headrace models list` shows them")
    if as_json:
        return print_json(view)
    typer.echo(f"{view.id} is in force" if view.in_force else f"{view.id} will be in force from {view.effective_from}")
    return None


def list_all(
    model: Annotated[str | None, typer.Option("--model", help="Only those of this model.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List all versions of prices."""

    async def work(client: ControlClient) -> list[PriceVersion]:
        now_ms = time.time_ns() // 1_000_000
        in_force = {one.id: one.price_at(now_ms).version for one in (await client.read()).models.values()}
        kept = (await replay_control(resolve(data_dir), {"prices": CONTROL_PRICES})).records["prices"]
        named = ((key.rpartition("/")[0], msgspec.json.decode(raw, type=Price)) for key, raw in kept.items())
        found = [records.price_view(name, one, in_force.get(name)) for name, one in named if model in (None, name)]
        return sorted(found, key=lambda view: (view.model, view.version))

    views = with_client(data_dir, work)
    if as_json:
        return print_json(views)
    table = table_of("price", "input", "output", "cached", "currency", "from", "in force")
    for view in views:
        amounts = (f"{view.input:f}", f"{view.output:f}", f"{view.cached:f}")
        table.add_row(view.id, *amounts, view.currency, day(view.effective_from, "the start"), yes(view.in_force))
    Console().print(table)
    return None
