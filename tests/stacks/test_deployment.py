"""A deployment as docs/operations.md describes it: every role a process of its own, under `HEADRACE_ENV=production`.

The brokers speak TLS, ask for passwords, and let the roles' user do what that page says it needs, and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.gateway.spec import Spec
from deploy.embedded.ports import PortBook
from headrace.parent import die_with_parent
from headrace.publisher import Publisher
from headrace.settings import Settings
from tests.support.chat import body, numbers
from tests.support.publishing import LANGUAGES, run_example
from tests.support.secure_kafka import PASSWORD, USER, SecureKafka, secure_kafka
from tests.support.stacks import HEADRACE, NO_TLS, running_infra
from tests.support.waiting import until

ROLES = ("control", "router", "scheduler", "worker", "metering", "answers", "sink", "ingress")
ROLES_USER = "roles"
STOP_S = 30
CONFIG = """\
[[providers]]
name = "bench"
kind = "openai"
base_url = "{upstream}"
[[models]]
id = "bench"
provider = "bench"
backend_tag = "bench"
context_length = 131072
max_concurrency = 50
price = {{ input = "1.00", output = "10.00" }}
"""


class Deployment:
    """Its environment, its commands and its roles."""

    def __init__(self, home: Path, kafka: SecureKafka, infra: Settings, upstream: str) -> None:
        self.kafka = kafka
        self.home = home
        self.port = PortBook(home / "roles.json").port("ingress")
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin_key = f"hr-{secrets.token_urlsafe(32)}"
        self.password = secrets.token_urlsafe(24)
        config = home / "headrace.toml"
        config.write_text(CONFIG.format(upstream=upstream))
        self.env = kafka.environment("SASL_SSL", sasl_username=ROLES_USER, sasl_password=self.password) | {
            "HEADRACE_ENV": "production", "HEADRACE_REDIS_URL": infra.redis_url,
            "HEADRACE_CLICKHOUSE_URL": infra.clickhouse_url, "HEADRACE_DATA_DIR": str(home / "roles"),
            "HEADRACE_INGRESS_SECRET": secrets.token_urlsafe(48), "HEADRACE_JWT_SECRET": secrets.token_urlsafe(48),
            "HEADRACE_ADMIN_KEY": self.admin_key, "HEADRACE_CONFIG": str(config), "HEADRACE_PORT": str(self.port),
            "HEADRACE_DRAIN_TIMEOUT": "5", "HEADRACE_WORKER_ID": "w1",
        }  # fmt: skip
        self.roles: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *arguments: str, operator: bool = False) -> str:
        """What a command printed, which must succeed; the `operator` may do all on the brokers, the roles may not."""
        env = os.environ | self.env
        if operator:
            env |= {"HEADRACE_KAFKA_SASL_USERNAME": USER, "HEADRACE_KAFKA_SASL_PASSWORD": PASSWORD}
        ran = subprocess.run([HEADRACE, *arguments], env=env, capture_output=True, text=True, timeout=90, check=False)
        assert ran.returncode == 0, (arguments, ran.stdout + ran.stderr)
        return ran.stdout

    def start(self, role: str) -> None:
        with self.log(role).open("ab") as log:
            self.roles[role] = subprocess.Popen(
                [HEADRACE, "run", role], env=os.environ | self.env | {"HEADRACE_INSTANCE": f"{role}-1"}, stdout=log,
                stderr=log, preexec_fn=partial(die_with_parent, os.getpid()),
            )  # fmt: skip

    def log(self, role: str) -> Path:
        return self.home / f"{role}.log"

    def logs(self) -> str:
        return "".join(self.log(role).read_text() for role in self.roles)

    def stop(self) -> dict[str, int | None]:
        """Stop all roles in order; role -> exit code."""
        for process in self.roles.values():
            process.send_signal(signal.SIGTERM)
        codes: dict[str, int | None] = {}
        for role, process in self.roles.items():
            try:
                codes[role] = process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                codes[role] = None
        return codes


def let_in(deployment: Deployment, topics: list[str]) -> None:
    """What docs/operations.md says that the roles' user needs, by Kafka's own means."""
    admin = AdminClient(
        {
            "bootstrap.servers": f"127.0.0.1:{deployment.kafka.ports['SASL_SSL']}",
            "security.protocol": "SASL_SSL", "sasl.mechanism": "SCRAM-SHA-512", "sasl.username": USER,
            "sasl.password": PASSWORD, "ssl.ca.location": str(deployment.kafka.cafile),
        }
    )  # fmt: skip
    credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 8192)
    user = UserScramCredentialUpsertion(ROLES_USER, credential, deployment.password.encode())
    for made in admin.alter_user_scram_credentials([user]).values():
        made.result(20)
    literal, prefixed = ResourcePatternType.LITERAL, ResourcePatternType.PREFIXED
    read, write, describe = AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE
    needed = [(ResourceType.TOPIC, topic, literal, one) for topic in topics for one in (read, write, describe)]
    needed += [(ResourceType.TOPIC, "replies.", prefixed, one) for one in (AclOperation.CREATE, read, write, describe)]
    needed.append((ResourceType.GROUP, "headrace-", prefixed, read))
    needed.append((ResourceType.TRANSACTIONAL_ID, "headrace-control", literal, write))
    bindings = [
        AclBinding(kind, name, pattern, f"User:{ROLES_USER}", "*", operation, AclPermissionType.ALLOW)
        for kind, name, pattern, operation in needed
    ]
    for made in admin.create_acls(bindings).values():
        made.result(20)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, upstream_url: str) -> Iterator[Deployment]:
    """All of it, set up by the commands of the page; ready to answer."""
    home = tmp_path_factory.mktemp("deployment")
    with ExitStack() as parts:
        kafka = parts.enter_context(secure_kafka(home))
        infra = parts.enter_context(running_infra(home / "infra"))
        made = Deployment(home, kafka, infra, upstream_url)
        made.run("topics", "apply", "--worker", "w1", operator=True)
        listed = [line.split()[0] for line in made.run("topics", "list", operator=True).splitlines() if line.strip()]
        let_in(made, [name for name in listed if "." in name])
        made.run("migrate")
        parts.callback(made.stop)
        for role in ROLES:
            made.start(role)
        made.run("apply")
        yield made


@pytest.fixture
async def caller(deployment: Deployment) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {deployment.admin_key}"}
    async with httpx.AsyncClient(base_url=deployment.url, headers=headers, timeout=60, verify=NO_TLS) as made:

        async def ready() -> bool:
            for role, process in deployment.roles.items():
                assert process.poll() is None, f"{role} ended: {deployment.log(role).read_text()[-3000:]}"
            try:
                return (await made.get("/health/ready")).status_code == 200
            except httpx.TransportError:
                return False

        await until(ready, "the ingress is ready", 90)
        yield made


def publisher_of(deployment: Deployment) -> tuple[str, Ed25519PrivateKey, str]:
    """A new app with one publisher `p1`: its id, the private key, and the password of its user."""
    app, key = f"shop-{uuid.uuid4().hex[:8]}", Ed25519PrivateKey.generate()
    public = base64.b64encode(key.public_key().public_bytes_raw()).decode()
    deployment.run("apps", "create", app, "--publisher", f"p1={public}")
    *_, password = deployment.run("topics", "acls", app, "--apply", "--new-passwords", operator=True).split()
    return app, key, password


@pytest.mark.timeout(300)
async def test_callers_are_answered_and_counted_by_all_three_ways(
    deployment: Deployment, caller: httpx.AsyncClient
) -> None:
    # HTTP.
    answer = await caller.post("/v1/chat/completions", json=body(Spec(tokens=7, interval_ms=1)))
    assert answer.status_code == 200, answer.text
    assert numbers(answer.json()["choices"][0]["message"]["content"]) == list(range(7))

    # Kafka.
    app, key, password = await asyncio.to_thread(publisher_of, deployment)
    theirs = deployment.kafka.settings("SASL_SSL", sasl_username=f"publisher-{app}", sasl_password=password)
    async with Publisher(theirs.kafka, app=app, key_id="p1", private_key=key) as publisher:
        result = await publisher.chat(body(Spec(tokens=9, interval_ms=1)))
        assert numbers(result.text) == list(range(9))

    # SQL.
    query = "SELECT tenant, sum(completion_tokens) AS tokens FROM usage GROUP BY tenant"

    async def counted() -> bool:
        told = await asyncio.to_thread(deployment.run, "sql", "--format", "csv", query)
        found = dict(line.replace('"', "").split(",") for line in told.splitlines()[1:])
        return (found.get("default"), found.get(app)) == ("7", "9")

    await until(counted, "usage is in ClickHouse", 30)
    assert "adds up" in await asyncio.to_thread(deployment.run, "ledger")
    assert "not authorized" not in deployment.logs().lower(), "a role asked for what it may not"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("language", LANGUAGES)
async def test_the_examples_are_let_in_by_password_over_tls(
    deployment: Deployment, caller: httpx.AsyncClient, language: str
) -> None:
    app, key, password = await asyncio.to_thread(publisher_of, deployment)
    ran = await run_example(
        language, "bench", f"count\n{Spec(tokens=12, interval_ms=10).line()}",
        KAFKA_BOOTSTRAP=deployment.kafka.settings("SASL_SSL").kafka_bootstrap, KAFKA_USERNAME=f"publisher-{app}",
        KAFKA_PASSWORD=password, KAFKA_CA=str(deployment.kafka.cafile), HEADRACE_APP=app, HEADRACE_PUBLISHER="p1",
        HEADRACE_PRIVATE_KEY=base64.b64encode(key.private_bytes_raw()).decode(),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    *chunks, _ = [line for line in ran.stdout.splitlines() if line.strip()]
    assert numbers("".join(chunks)) == list(range(12)), ran.stdout


@pytest.mark.timeout(120)
async def test_every_role_stops_in_order(deployment: Deployment, caller: httpx.AsyncClient) -> None:
    assert await asyncio.to_thread(deployment.stop) == dict.fromkeys(ROLES, 0), deployment.logs()[-3000:]
