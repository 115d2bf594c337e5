"""`headrace reprice`: shows what pricing a month anew changes, and does it."""

from __future__ import annotations

import asyncio
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from headrace import sql
from headrace.commands.failures import plain_failures
from headrace.commands.records import ACTOR
from headrace.local import resolve
from headrace.reprice import BadPrices, Difference, NewPrice, load_prices, month
from headrace.reprice import reprice as run_reprice
from schemas.control import Price


def reprice(
    of: Annotated[str, typer.Option("--month", help="Of the acceptance, UTC: 2026-11.")],
    prices: Annotated[Path | None, typer.Option("--prices", help="TOML or JSON: prices by model.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="One model, priced by the options below.")] = None,
    input_price: Annotated[str | None, typer.Option("--input", help="A million prompt tokens.")] = None,
    output_price: Annotated[str | None, typer.Option("--output", help="A million completion tokens.")] = None,
    cached_price: Annotated[str | None, typer.Option("--cached", help="A million cached ones; as --input.")] = None,
    currency: Annotated[str, typer.Option("--currency")] = "USD",
    version: Annotated[int | None, typer.Option("--version", help="Number of the price.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write it; without this it is only shown.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit trail.")] = "",
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Data directory of a local stack; default ./.headrace.")
    ] = None,
) -> None:
    """Price a month's usage anew: a new revision of each line, the old ones stay in `usage_history`."""
    with plain_failures(BadPrices, ValueError):
        span = month(of)
        new = load_prices(prices) if prices is not None else {}
        if model is not None:
            new[model] = _one(input_price, output_price, cached_price, currency, version)
        if not new:
            raise BadPrices("give --prices FILE, or --model with --input, --output and --version")
        found = asyncio.run(run_reprice(resolve(data_dir), span, new, write=write, actor=ACTOR, reason=reason))
    typer.echo(shown(found))
    if found and not write:
        typer.echo("nothing was written; run it again with --write")
    elif found:
        typer.echo(f"wrote {sum(one.lines for one in found.values())} new revisions")


def _one(
    input_price: str | None, output_price: str | None, cached: str | None, currency: str, version: int | None
) -> Price:
    if input_price is None or output_price is None or version is None:
        raise BadPrices("--model needs --input, --output and --version")
    try:
        given = NewPrice(
            version, Decimal(input_price), Decimal(output_price), Decimal(cached) if cached else None, currency
        )
    except InvalidOperation:
        raise BadPrices("prices are decimal numbers such as 0.15") from None
    return given.price()


def shown(found: dict[str, Difference]) -> str:
    """The difference of each tenant and currency as a table."""
    if not found:
        return "nothing changes"
    table = Table("tenant", "lines", "currency", "before", "after", "difference", header_style="bold")
    for tenant, one in found.items():
        for currency in sorted({*one.before, *one.after}):
            before, after = one.before.get(currency, Decimal(0)), one.after.get(currency, Decimal(0))
            table.add_row(tenant, str(one.lines), currency, f"{before:f}", f"{after:f}", f"{after - before:+f}")
    return sql.drawn(table)
