"""How soon a revoked key is out everywhere: `python -m bench.revocation --url … --key …`.

Each try makes a key, opens a stream on every ingress and asks for short answers there again and again, and revokes the
key at one of them. From the moment that the admin API has answered, it takes the time until the last stream has ended,
and until every ingress has refused the key and accepted nothing of it any more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.gateway.spec import Spec

INTERVAL_MS = 20
SURE = 3
"""Refusals in a row, after which an ingress is asked no more in a try. All keys are tried again after the last one."""


@dataclass
class Figures:
    """What was measured, a value a try, in seconds from the answer to the revocation; 0 for what came before it."""

    ended: list[float] = field(default_factory=list)
    """Until the last of the key's streams had ended."""
    refused: list[float] = field(default_factory=list)
    """Until every ingress refused it."""
    asked: list[float] = field(default_factory=list)
    """How long the revocation itself took to be answered; it comes before the others."""
    errors: Counter[str] = field(default_factory=Counter)
    """Code of the error that ended a stream -> how often; `done` for one that ended by itself."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Code of the errors that ingresses refused the key with -> how often."""
    accepted_again: int = 0
    """Revoked keys that an ingress took once more after the last try."""

    @property
    def seconds(self) -> list[float]:
        """Of each try, until the key was out: all streams ended, and refused everywhere."""
        return [max(pair) for pair in zip(self.ended, self.refused, strict=True)]

    def line(self) -> str:
        """The figures in one line of JSON, in milliseconds."""
        named = {"out": self.seconds, "ended": self.ended, "refused": self.refused, "asked": self.asked}
        shown = {
            name: {
                f"p{share * 100:.0f}_ms": round(quantile(found, share) * 1000, 1) for share in (0.5, 0.95, 0.99, 1.0)
            }
            for name, found in named.items()
        }
        counts = {"errors": dict(self.errors), "refusals": dict(self.refusals), "accepted_again": self.accepted_again}
        return json.dumps({"tries": len(self.ended), **shown, **counts})


def quantile(seconds: Sequence[float], share: float) -> float:
    """What this share of the values does not exceed."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def revoke_often(urls: Sequence[str], admin_key: str, *, times: int, model: str = "bench") -> Figures:
    """Revoke `times` keys, one after the other, each under running streams and while it is being used."""
    figures = Figures()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, trust_env=False, limits=limits) as client:
        keys = [
            await _one(client, urls, urls[number % len(urls)], admin_key, model, figures) for number in range(times)
        ]
        for key in keys:
            for url in urls:
                figures.accepted_again += (await client.get(f"{url}/v1/models", headers=_bearer(key))).is_success
    return figures


async def _one(
    client: httpx.AsyncClient, urls: Sequence[str], far: str, admin_key: str, model: str, figures: Figures
) -> str:
    """One try; returns the key's text."""
    admin = _bearer(admin_key)
    made = (await client.post(f"{far}/admin/keys", json={"name": "to be revoked"}, headers=admin)).json()
    key: str = made["key"]
    begun = [asyncio.Event() for _ in urls]
    revoked = asyncio.Event()
    async with asyncio.TaskGroup() as running:
        streams = [
            running.create_task(_stream(client, url, key, model, event)) for url, event in zip(urls, begun, strict=True)
        ]
        for event in begun:
            await event.wait()
        probes = [running.create_task(_probe(client, url, key, model, revoked, figures.refusals)) for url in urls]
        asked_at = time.perf_counter()
        (await client.delete(f"{far}/admin/keys/{made['id']}", headers=admin)).raise_for_status()
        answered_at = time.perf_counter()
        revoked.set()
    figures.asked.append(answered_at - asked_at)
    figures.ended.append(max(0.0, max(task.result()[0] for task in streams) - answered_at))
    figures.refused.append(max(0.0, max(task.result() for task in probes) - answered_at))
    figures.errors.update(task.result()[1] for task in streams)
    return key


async def _stream(client: httpx.AsyncClient, url: str, key: str, model: str, begun: asyncio.Event) -> tuple[float, str]:
    """Read a stream to its end; when that was, and the code of its error."""
    code = "broken"
    asked = _body(model, Spec(tokens=3000, interval_ms=INTERVAL_MS)) | {"stream": True}
    async with client.stream("POST", f"{url}/v1/chat/completions", json=asked, headers=_bearer(key)) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                begun.set()
            elif line.startswith("data: {") and "error" in (event := json.loads(line[6:])):
                code = event["error"]["code"]
            elif line == "data: [DONE]":
                code = "done"
    begun.set()
    return time.perf_counter(), code


async def _probe(
    client: httpx.AsyncClient, url: str, key: str, model: str, revoked: asyncio.Event, refusals: Counter[str]
) -> float:
    """Use a key until it is refused for good; when it was refused first, after it was accepted for the last time."""
    refused: list[float] = []
    while len(refused) < SURE or not revoked.is_set():
        asked = _body(model, Spec(tokens=1, interval_ms=1, ttft_ms=1))
        answer = await client.post(f"{url}/v1/chat/completions", json=asked, headers=_bearer(key))
        if answer.is_success:
            refused.clear()
            continue
        refused.append(time.perf_counter())
        refusals[answer.json()["error"]["code"]] += 1
    return refused[0]


def _body(model: str, spec: Spec) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": f"count\n{spec.line()}"}]}


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def main() -> None:
    """Measure against a stack that runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", action="append", required=True, help="An ingress; may be given several times.")
    parser.add_argument("--key", required=True, help="A key that makes and revokes keys.")
    parser.add_argument("--model", default="bench")
    parser.add_argument("--times", type=int, default=100)
    asked = parser.parse_args()
    print(asyncio.run(revoke_often(asked.url, asked.key, times=asked.times, model=asked.model)).line())


if __name__ == "__main__":
    main()
