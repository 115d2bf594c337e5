"""Commands on the control plane: `apply`, `providers`, and the groups `apps`, `users`, `keys` and `prices`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr
from rich.console import Console

from headrace import api_keys
from headrace.apply import apply_config
from headrace.commands import apps, keys, prices, users
from headrace.commands.failures import plain_failures, stop
from headrace.commands.records import DataDir, read, table_of
from headrace.config import ConfigError, find_config, load_config
from headrace.errors import HeadraceError
from headrace.local import resolve
from headrace.production import FILES_KEYS, faults


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(apply)
    providers = typer.Typer(help="Places where models run.", no_args_is_help=True)
    providers.command("list")(list_providers)
    app.add_typer(providers, name="providers")
    for name, group in (("apps", apps), ("users", users), ("keys", keys), ("prices", prices)):
        app.add_typer(group.group(), name=name)


def apply(
    config: Annotated[
        Path | None, typer.Option("--config", help="Default: $HEADRACE_CONFIG, ./headrace.toml, the built-in model.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Put what headrace.toml says into force, and wait until it is."""
    with plain_failures(HeadraceError, ConfigError):
        conf = resolve(data_dir)
        admin_key = api_keys.find_admin_key(conf)
        if refused := faults(conf.model_copy(update={"admin_key": SecretStr(admin_key)}), FILES_KEYS):
            raise stop("\n".join(refused))
        path = find_config(config, conf.config)
        found = load_config(path, ollama_models=conf.ollama_models, ollama_base_url=conf.ollama_base_url)
        done = asyncio.run(apply_config(conf, found, admin_key=admin_key))
    for line in done or ["nothing to do"]:
        typer.echo(line)


def list_providers(data_dir: DataDir = None) -> None:
    """List providers, with the models they serve."""
    plane = read(data_dir)
    table = table_of("provider", "kind", "base url", "key from", "models")
    for provider in plane.providers.values():
        served = [model.id for model in plane.models.values() if model.provider == provider.name and model.enabled]
        table.add_row(
            provider.name, provider.kind, provider.base_url or "", provider.api_key_env or "", ", ".join(served)
        )
    Console().print(table)
