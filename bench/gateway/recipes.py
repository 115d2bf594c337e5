"""How other gateways are installed from package registries and started in front of the mock upstream.

Each lives in a directory of its own under `~/.cache/headrace/bench-peers`, never in Headrace's environment.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.gateway.client import Target

HOME = Path.home() / ".cache" / "headrace" / "bench-peers"
INSTALL_SECONDS = 900.0
LITELLM_KEY = "sk-" + secrets.token_hex(16)
"""LiteLLM does not start without a master key that is hard to guess."""


class CannotInstall(RuntimeError):
    """A peer could not be installed; the text says why."""


class Launch(msgspec.Struct, kw_only=True):
    """A command that serves, how to call it, and the URL that answers 200 once it does."""

    command: list[str]
    target: Target
    probe: str
    env: dict[str, str] = {}


class Recipe(msgspec.Struct, kw_only=True, frozen=True):
    """One peer. `install` fills a directory; `launch` takes it, a work directory, the upstream's URL and a port."""

    name: str
    version: str
    install: Callable[[Path], None]
    launch: Callable[[Path, Path, str, int], Launch]

    def home(self) -> Path:
        """Where this version is installed."""
        return HOME / f"{self.name}-{self.version}"

    def ensure(self) -> Path:
        """Install it unless that was done before; returns its home. Raises CannotInstall."""
        home, marker = self.home(), self.home() / ".installed"
        if not marker.exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            self.install(home)
            marker.touch()
        return home


def _run(command: list[str], home: Path) -> None:
    """Run an installer, quietly. Raises CannotInstall with its last words."""
    try:
        done = subprocess.run(command, cwd=home, capture_output=True, timeout=INSTALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotInstall(str(error)) from error
    if done.returncode != 0:
        raise CannotInstall(done.stderr.decode(errors="replace").strip()[-500:])


def _pip(*packages: str) -> Callable[[Path], None]:
    """An installer of Python packages into a new environment."""

    def install(home: Path) -> None:
        _run([sys.executable, "-m", "venv", str(home / "venv")], home)
        _run([str(home / "venv/bin/python"), "-m", "pip", "install", "--quiet", *packages], home)

    return install


def _npm(package: str) -> Callable[[Path], None]:
    """An installer of a Node package."""

    def install(home: Path) -> None:
        if shutil.which("npm") is None:
            raise CannotInstall("npm is not on this machine")
        _run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home), package], home)

    return install


def _litellm(home: Path, work: Path, upstream: str, port: int) -> Launch:
    config = work / "litellm.yaml"
    config.write_text(
        "model_list:\n  - model_name: bench\n    litellm_params:\n      model: openai/bench\n"
        f"      api_base: {upstream}\n      api_key: none\n"
    )
    command = [str(home / "venv/bin/litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    return Launch(
        command=command,
        target=Target(base_url=f"http://127.0.0.1:{port}/v1", api_key=LITELLM_KEY),
        probe=f"http://127.0.0.1:{port}/health/liveliness",
        env={
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_MASTER_KEY": LITELLM_KEY,
        },
    )


def _mlflow(home: Path, work: Path, upstream: str, port: int) -> Launch:
    config = work / "mlflow.yaml"
    config.write_text(
        "endpoints:\n  - name: bench\n    endpoint_type: llm/v1/chat\n    model:\n      provider: openai\n"
        f"      name: bench\n      config:\n        openai_api_key: none\n        openai_api_base: {upstream}\n"
    )
    command = [str(home / "venv/bin/mlflow"), "gateway", "start", "--config-path", str(config)]
    return Launch(
        command=[*command, "--host", "127.0.0.1", "--port", str(port)],
        target=Target(base_url=f"http://127.0.0.1:{port}/v1", sends_done=False),
        probe=f"http://127.0.0.1:{port}/health",
        env={"PATH": f"{home / 'venv/bin'}:/usr/local/bin:/usr/bin:/bin"},
    )


PORTKEY_SHIM = """\
const fetch = globalThis.fetch, Answer = globalThis.Response;
globalThis.fetch = async (...call) => {
  const { body, status, statusText, headers } = await fetch(...call);
  return new Answer(body, { status, statusText, headers: new Headers(headers) });
};
"""
"""Without it Portkey 1.15.2 answers 500 to every streamed request: it appends to the headers of a fetched response,
which are immutable (seen with Node 20 and 22). It copies the headers once a request and leaves the body alone."""


def _portkey(home: Path, work: Path, upstream: str, port: int) -> Launch:
    shim = work / "portkey-shim.mjs"
    shim.write_text(PORTKEY_SHIM)
    server = home / "node_modules/@portkey-ai/gateway/build/start-server.js"
    headers = {"x-portkey-provider": "openai", "x-portkey-custom-host": upstream}
    return Launch(
        command=["node", "--import", str(shim), str(server), f"--port={port}", "--headless"],
        target=Target(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", headers=headers),
        probe=f"http://127.0.0.1:{port}/",
        env={"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"},
    )


RECIPES = [
    Recipe(name="litellm", version="1.106.2", install=_pip("litellm[proxy]==1.106.2"), launch=_litellm),
    Recipe(name="mlflow", version="3.17.2", install=_pip("mlflow[gateway]==3.17.2"), launch=_mlflow),
    Recipe(name="portkey", version="1.15.2", install=_npm("@portkey-ai/gateway@1.15.2"), launch=_portkey),
]
