"""The `headrace` command. Operating commands are grouped by subject in `headrace/commands/`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable

import typer

from headrace import __version__

_GROUPS: dict[str, tuple[str, ...]] = {
    "demo": ("demo",),
    "run": ("run",),
    "up": ("up", "doctor"),
    "control": ("apply", "models", "providers", "apps", "keys"),
    "topics": ("topics",),
    "data": ("migrate", "sql", "rebuild", "ledger", "dead-letters"),
}
"""Modules of `headrace.commands` and their commands, in the order of `--help`; each module has `register(app)`."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


def build(groups: Iterable[str] = _GROUPS) -> typer.Typer:
    """The command line with the commands of the given groups."""
    app = typer.Typer(
        name="headrace",
        help="Serve language models on your own machines as a stream of events.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def _options(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", callback=_show_version, is_eager=True
        ),
    ) -> None:
        """Serve language models on your own machines as a stream of events."""

    for name in groups:
        importlib.import_module(f"headrace.commands.{name}").register(app)
    return app


def main() -> None:
    """Entry point of the console script. Only the group of the command asked for is imported: roles stay small."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    groups = [group for group, commands in _GROUPS.items() if asked in commands]
    build(groups or _GROUPS)()
