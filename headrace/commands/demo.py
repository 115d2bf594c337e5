"""`headrace demo`: the whole stack, one real request through it, what it left behind, and what to try next."""

from __future__ import annotations

from pathlib import Path

import typer

_DATA_DIR = Path(".headrace")
_PORT = 8000


def register(app: typer.Typer) -> None:
    """Add `demo`."""

    @app.command()
    def demo(
        keep: bool = typer.Option(False, "--keep", help="Leave the stack running in the foreground until Ctrl-C."),
        data_dir: Path = typer.Option(_DATA_DIR, envvar="HEADRACE_DATA_DIR", help="Where the stack keeps its data."),
        port: int = typer.Option(_PORT, min=0, max=65535, help="Port of the API; a free one is used if it is taken."),
    ) -> None:
        """Start the stack, stream one chat request, and show its way and its usage row; under half a minute."""
        try:
            from headrace import demo as show
        except ImportError as error:
            typer.echo(f"headrace: {error}: run `just setup`, or `pip install 'headrace[embedded]'`", err=True)
            raise typer.Exit(1) from None
        raise typer.Exit(show.run(data_dir, port, keep=keep))
