"""The `headrace` command. Operating commands are grouped by subject in `headrace/commands/`."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from headrace import __version__

if TYPE_CHECKING:
    import typer

_GROUPS: dict[str, tuple[str, ...]] = {
    "demo": ("demo",),
    "run": ("run",),
    "up": ("up", "doctor"),
    "control": ("apply", "providers", "apps", "users", "keys", "prices"),
    "fleet": ("models", "workers", "leases"),
    "topics": ("topics",),
    "audit": ("audit",),
    "erasure": ("erase", "erasures"),
    "data": ("migrate", "sql", "rebuild", "ledger", "usage", "reprice", "dead-letters"),
}
"""Modules of `headrace.commands` and their commands, in the order of `--help`; each module has `register(app)`."""


def _show_version(wanted: bool) -> None:
    if wanted:
        import typer

        typer.echo(f"headrace {__version__}")
        raise typer.Exit


def build(groups: Iterable[str] = _GROUPS) -> typer.Typer:
    """The command line with the commands of the given groups."""
    import typer

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


def _run(role: str) -> None:
    """Run a role and end this process; return if there is none of that name.

    Eight of these start at once. Without the command line's libraries, and without rich, which structlog loads for
    tracebacks on a terminal, each costs a fifth less CPU.
    """
    hidden = "rich" not in sys.modules
    if hidden:
        sys.modules["rich"] = None  # type: ignore[assignment]
    from headrace.process import ROLES, run_role

    if role in ROLES:
        sys.exit(run_role(role))
    if hidden:
        del sys.modules["rich"]


def main() -> None:
    """Entry point of the console script. Only the group of the command asked for is imported: roles stay small."""
    # Imports make objects that live for ever; to look through them again and again takes a tenth of a start.
    gc.disable()
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked == "run" and len(sys.argv) == 3 and not sys.argv[2].startswith("-"):
        _run(sys.argv[2])
    groups = [group for group, commands in _GROUPS.items() if asked in commands]
    app = build(groups or _GROUPS)
    gc.enable()
    app()
