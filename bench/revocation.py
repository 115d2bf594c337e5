"""How soon a running stream ends when its key is revoked: `python -m bench.revocation --url … --key …`.

Each try makes a key, opens a stream on one ingress, revokes the key at another, and takes the time from the moment that
the revocation is asked for to the error that ends the stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from bench.gateway.spec import Spec

INTERVAL_MS = 20


@dataclass
class Figures:
    """What was measured."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    """Code of the error that ended a stream -> how often; `done` for one that ended by itself."""

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the streams had ended."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def line(self) -> str:
        """The figures in one line of JSON, in milliseconds."""
        found = {f"p{share * 100:.0f}_ms": round(self.quantile(share) * 1000, 1) for share in (0.5, 0.95, 0.99, 1.0)}
        return json.dumps({"tries": len(self.seconds), **found, "errors": dict(self.errors)})


async def revoke_often(urls: Sequence[str], admin_key: str, *, times: int, model: str = "bench") -> Figures:
    """Revoke `times` keys, one after the other, each under a running stream."""
    figures = Figures()
    for number in range(times):
        await _one(urls[number % len(urls)], urls[(number + 1) % len(urls)], admin_key, model, figures)
    return figures


async def _one(near: str, far: str, admin_key: str, model: str, figures: Figures) -> None:
    admin = {"authorization": f"Bearer {admin_key}"}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        made = (await client.post(f"{near}/admin/keys", json={"name": "to be revoked"}, headers=admin)).json()
        prompt = f"count\n{Spec(tokens=3000, interval_ms=INTERVAL_MS).line()}"
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": prompt}]}
        headers = {"authorization": f"Bearer {made['key']}"}
        began, revoking = 0.0, None
        async with client.stream("POST", f"{near}/v1/chat/completions", json=body, headers=headers) as answer:
            async for line in answer.aiter_lines():
                if revoking is None and line.startswith("id: "):
                    began = time.perf_counter()
                    path = f"{far}/admin/keys/{made['id']}"
                    revoking = asyncio.create_task(client.delete(path, headers=admin))
                if line.startswith("data: {") and "error" in (event := json.loads(line[6:])):
                    figures.errors[event["error"]["code"]] += 1
                    figures.seconds.append(time.perf_counter() - began)
                elif line == "data: [DONE]":
                    figures.errors["done"] += 1
        if revoking is not None:
            (await revoking).raise_for_status()


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
