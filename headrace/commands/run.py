"""`headrace run ROLE`: one role as a process of its own."""

from __future__ import annotations

import typer

from headrace.process import ROLES, run_role


def register(app: typer.Typer) -> None:
    """Add `run`."""

    @app.command()
    def run(role: str = typer.Argument(help="One of: " + ", ".join(ROLES) + ".")) -> None:
        """Run one role in the foreground, configured by HEADRACE_* variables, until SIGTERM."""
        if role not in ROLES:
            raise typer.BadParameter(f"{role!r} is none of {', '.join(ROLES)}", param_hint="ROLE")
        raise typer.Exit(run_role(role))
