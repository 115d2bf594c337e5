"""The tour of a running stack: one streamed request, its lifecycle, its usage row, and what to try next."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from clickhouse_connect.driver.exceptions import ClickHouseError
from rich.console import Console
from rich.table import Table

from deploy.embedded.stack import Endpoints
from headrace import sql
from headrace.api_keys import find_admin_key
from headrace.settings import Settings

_PROMPT = "Write two sentences about a mill that is driven by a river."
_MAX_TOKENS = 64
_STORED_SECONDS = 20.0
_USAGE_SQL = """\
SELECT model, status, prompt_tokens, completion_tokens, cost, currency, ttft_ms
FROM usage WHERE request_id = '{request_id}'"""


class TourFailed(Exception):
    """Something did not answer as it should; the text says what."""


class Tour:
    """Everything the demo shows of a stack that is ready."""

    def __init__(self, console: Console, running: Endpoints) -> None:
        self._console = console
        self._running = running
        self._conf = Settings(
            data_dir=Path(running.data_dir),
            kafka_bootstrap=running.kafka_bootstrap,
            redis_url=running.redis_url,
            clickhouse_url=running.clickhouse_url,
        )
        self._key = find_admin_key(self._conf)

    def run(self, *, stays: bool) -> None:
        """Show all of it; `stays` tells whether the stack will be there afterwards. Raises TourFailed."""
        headers = {"Authorization": f"Bearer {self._key}"}
        try:
            with httpx.Client(base_url=self._running.url, headers=headers, timeout=60, trust_env=False) as client:
                model = self._model(client)
                request_id = self._chat(client, model)
                self._lifecycle(client, request_id)
            self._usage(request_id)
        except httpx.HTTPError as error:
            raise TourFailed(f"{self._running.url} did not answer as expected: {error!r}") from error
        except ClickHouseError as error:
            raise TourFailed(f"ClickHouse did not answer as expected: {error}") from error
        self._next_steps(model, stays=stays)

    def _title(self, text: str) -> None:
        self._console.print(f"\n[bold cyan]{text}[/]")

    def _model(self, client: httpx.Client) -> str:
        models = _checked(client.get("/v1/models"))["data"]
        if not models:
            raise TourFailed("no model is configured")
        return str(models[0]["id"])

    def _chat(self, client: httpx.Client, model: str) -> str:
        """Stream one chat completion to the terminal; its request id."""
        self._title(f"1. A chat request to {model}, its tokens as they arrive")
        self._console.print(f"[dim]> {_PROMPT}[/]")
        body = {
            "model": model,
            "messages": [{"role": "user", "content": _PROMPT}],
            "max_tokens": _MAX_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began = time.monotonic()
        first, done = 0.0, False
        usage: dict[str, int] = {}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise TourFailed(f"HTTP {response.status_code}: {response.text}")
            request_id = response.headers["x-request-id"]
            for event in _events(response):
                if event is None:
                    done = True
                    break
                if "error" in event:
                    raise TourFailed(f"the stream ended with an error: {event['error'].get('message')}")
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        first = first or time.monotonic() - began
                        self._console.print(text, end="", markup=False, style="green")
                        self._console.file.flush()
        took = time.monotonic() - began
        if not done:
            raise TourFailed("the stream ended without [DONE]")
        tokens = usage.get("completion_tokens", 0)
        rate = tokens / (took - first) if took > first else 0.0
        self._console.print(
            f"\n[dim]first token after {first * 1000:.0f} ms, {tokens} tokens in {took:.2f} s ({rate:.0f} a second), "
            "\\[DONE]: the result is durable in Kafka[/]"
        )
        return str(request_id)

    def _lifecycle(self, client: httpx.Client, request_id: str) -> None:
        self._title(f"2. Its way through the stream: GET /v1/requests/{request_id}")
        life = _checked(client.get(f"/v1/requests/{request_id}"))
        deadline = time.monotonic() + _STORED_SECONDS
        while life["finish_ms"] is None and time.monotonic() < deadline:
            time.sleep(0.05)
            life = _checked(client.get(f"/v1/requests/{request_id}"))
        table = Table("stage", "by", "ms since accepted", "ms of this hop", box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        before = 0
        for step in life["steps"]:
            since = step["since_accepted_ms"]
            table.add_row(step["stage"], step["role"], str(since), f"+{since - before}")
            before = since
        self._console.print(table)
        self._console.print(f"[dim]status: {life['status']}, worker: {life['worker']}, attempts: {life['attempts']}[/]")

    def _usage(self, request_id: str) -> None:
        self._title("3. Its usage row, metered from Kafka, read back from ClickHouse by SQL")
        query = _USAGE_SQL.format(request_id=request_id.replace("-", ""))
        self._console.print(f"[dim]{query}[/]")
        deadline = time.monotonic() + _STORED_SECONDS
        began = time.monotonic()
        while not (answer := sql.run(self._conf, query, {})).rows:
            if time.monotonic() > deadline:
                raise TourFailed(f"no usage row after {_STORED_SECONDS:.0f} s: see metering-1.log and sink-1.log")
            time.sleep(0.1)
        self._console.print(sql.render(answer, sql.Format.TABLE), markup=False)
        self._console.print(f"[dim]there {time.monotonic() - began:.1f} s after it was first asked for[/]")

    def _next_steps(self, model: str, *, stays: bool) -> None:
        self._title("4. What to try next")
        url, where = self._running.url, _shown(Path(self._running.data_dir))
        data = "" if where == ".headrace" else f" --data-dir {where}"
        if not stays:
            port = "" if self._running.port == 8000 else f" --port {self._running.port}"
            self._console.print(f"  .venv/bin/headrace up{data}{port}    [dim]# the same stack, until Ctrl-C; then:[/]")
        message = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], "stream": True})
        lines = (
            f"curl -N {url}/v1/chat/completions -H 'Authorization: Bearer {self._key}' \\",
            f"    -H 'Content-Type: application/json' -d '{message}'",
            "",
            f'client = openai.OpenAI(base_url="{url}/v1", api_key="{self._key}")',
            f'client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello"}}])',
            "",
            f".venv/bin/headrace sql usage-by-model{data}",
            f".venv/bin/headrace ledger{data}",
        )
        for line in lines:
            self._console.print(f"  {line}", markup=False)


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != httpx.codes.OK:
        raise TourFailed(f"{response.request.url}: HTTP {response.status_code}: {response.text}")
    found: dict[str, Any] = response.json()
    return found


def _events(response: httpx.Response) -> Iterator[dict[str, Any] | None]:
    """The JSON of each server-sent event; None for `[DONE]`."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield None if data == "[DONE]" else json.loads(data)


def _shown(path: Path) -> str:
    """A path as a person in the current directory would write it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
