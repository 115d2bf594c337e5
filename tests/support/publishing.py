"""Requests as they may stand on `inference.requests`: sealed by an ingress, or signed by a direct publisher."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.embedded import java
from schemas.ids import new_published_id
from topics.catalogue import REQUESTS
from topics.envelope import REQUEST_TYPE, Envelope
from topics.signing import SIGNATURE, Seals, canonical, sign

SEALS = Seals(["the secret of the tests' ingresses"])
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = base64.b64encode(KEY.public_key().public_bytes_raw()).decode()

EXAMPLES = Path(__file__).parents[2] / "docs/examples/publishing"
LANGUAGES = ("python", "java", "go")

Headers = list[tuple[str, bytes]]


def sealed(envelope: Envelope, body: bytes, seals: Seals = SEALS) -> Headers:
    """The headers of an ingress's request."""
    return seals.sealed(REQUESTS.name, envelope.headers(), hashlib.sha256(body).hexdigest())


def signed(headers: dict[str, str], body: bytes, key: Ed25519PrivateKey = KEY) -> Headers:
    """The same headers, and the signature of a publisher."""
    pairs = [(name, value.encode()) for name, value in headers.items()]
    form = canonical(REQUESTS.name, pairs, hashlib.sha256(body).hexdigest())
    return [*pairs, (SIGNATURE, sign(key, form))]


def publisher_headers(tenant: str, publisher: str = "p1", **more: str | None) -> dict[str, str]:
    """What a publisher says, unsigned; names in `more` have `_` for `-` but after `ce`; None leaves one out."""
    now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    found: dict[str, str | None] = {
        "ce_specversion": "1.0",
        "ce_id": new_published_id(tenant),
        "ce_type": REQUEST_TYPE,
        "ce_source": "/tests",
        "ce_time": now,
        "hr-tenant": tenant,
        "hr-key-id": publisher,
    }
    found |= {name if name.startswith("ce_") else name.replace("_", "-"): value for name, value in more.items()}
    return {name: value for name, value in found.items() if value is not None}


class Sample:
    """A record that nobody wrote to Kafka."""

    topic, partition, offset = REQUESTS.name, 0, 0

    def __init__(self, headers: Headers, value: bytes, *, key: bytes | None = None, timestamp: int = 0) -> None:
        self.headers, self.value, self.timestamp = headers, value, timestamp
        self.key = key if key is not None else dict(headers).get("ce_id")


async def run_example(language: str, model: str, prompt: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the example of a language, with these variables and none of ours; skips the test where it cannot be built."""
    if language == "python":
        command = [sys.executable, "publish.py"]
    elif language == "java":
        if shutil.which("javac") is None or shutil.which("java") is None:
            pytest.skip("there is no Java compiler here")
        jars = ":".join(str(jar) for jar in java.fetch_jars())
        command = ["java", "-cp", jars, "src/main/java/Publish.java"]
    else:
        if shutil.which("go") is None:
            pytest.skip("there is no Go here")
        command = ["go", "run", "."]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "KAFKA_"))}
    return await asyncio.to_thread(
        subprocess.run, [*command, model, prompt], cwd=EXAMPLES / language, env=clean | env, capture_output=True,
        text=True, timeout=150, check=False,
    )  # fmt: skip
