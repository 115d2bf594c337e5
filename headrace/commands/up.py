"""`headrace up`: the whole stack in the foreground; `headrace doctor`: what is missing or broken."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import typer

_DATA_DIR = Path(".headrace")


def register(app: typer.Typer) -> None:
    """Add `up` and `doctor`."""

    @app.command()
    def up(
        config: Path | None = typer.Option(
            None, help="Default: $HEADRACE_CONFIG, ./headrace.toml, the built-in model."
        ),
        data_dir: Path = typer.Option(_DATA_DIR, envvar="HEADRACE_DATA_DIR", help="Where the stack keeps its data."),
        host: str = typer.Option("127.0.0.1", help="Address the API listens on."),
        port: int = typer.Option(8000, min=0, max=65535, help="Port of the API; 0 takes a free one."),
        replicas: list[str] = typer.Option([], help="ROLE=N, more processes of a role; may be given several times."),
    ) -> None:
        """Run the whole stack in the foreground until Ctrl-C; prints `ready http://HOST:PORT` when it serves."""
        from headrace.config import find_config
        from headrace.production import MAKES_PARTS, faults
        from headrace.settings import settings

        try:
            from deploy.embedded import infra, launch, ports, roles, stack
        except ImportError as error:
            raise _refuse(f"{error}: run `pip install 'headrace[embedded]'`") from error
        if config is not None and not config.is_file():
            raise _refuse(f"{config} is not a file: pass the path of a headrace.toml")
        known = settings()
        if refused := faults(known, MAKES_PARTS):
            raise _refuse("\n".join(refused))
        try:
            options = launch.StackOptions(
                data_dir=data_dir,
                host=host,
                port=port,
                config=find_config(config, known.config),
                replicas=roles.parse_replicas(replicas),
                admin_key=known.admin_key.get_secret_value() if known.admin_key else None,
                jwt_secret=known.jwt_secret.get_secret_value() if known.jwt_secret else None,
                drain_seconds=known.drain_timeout,
            )
            code = launch.serve(options, ready=_announce, report=_report)
        except (infra.StartFailed, stack.StackRunning, roles.BadReplicas, ports.NoFreePort) as error:
            raise _refuse(str(error)) from error
        raise typer.Exit(code)

    @app.command()
    def doctor(
        data_dir: Path = typer.Option(_DATA_DIR, envvar="HEADRACE_DATA_DIR", help="Data directory to look at."),
    ) -> None:
        """Say what is missing or broken on this machine and in the stack that runs here, and what to do."""
        import structlog

        from headrace.doctor import examine

        # What looking at devices would log, the findings say.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        findings = examine(data_dir)
        for finding in findings:
            typer.echo(finding.line())
        broken = sum(not finding.good for finding in findings)
        typer.echo("all good" if not broken else f"{broken} of {len(findings)} broken")
        raise typer.Exit(1 if broken else 0)


def _announce(url: str) -> None:
    print(f"ready {url}", flush=True)


def _report(line: str) -> None:
    print(f"headrace: {line}", file=sys.stderr, flush=True)


def _refuse(reason: str) -> typer.Exit:
    typer.echo(f"headrace: {reason}", err=True)
    return typer.Exit(1)
