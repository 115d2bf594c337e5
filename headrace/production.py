"""What a production start is refused for: secrets that are missing, short, or known from examples. Pure.

Two are missed elsewhere, in production or not: the seals of requests (`Settings.seals`), and the admin key, which no
role uses and `headrace apply` files (`api_keys.find_admin_key`).
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr
from redis.asyncio.connection import parse_url

from headrace.settings import Settings

MIN_SECRET, MIN_KEY, MIN_PASSWORD = 32, 20, 12
MAKES_PARTS, FILES_KEYS = "up", "apply"
"""What is started beside the roles: a stack with parts of its own, and the command that files the admin key."""
ASK_CLICKHOUSE = ("ingress", "sink")
"""Roles that connect to ClickHouse; each of them connects to Kafka and Redis."""
_KNOWN = ("change", "example", "secret", "default", "password", "admin", "test", "your", "headrace", "12345678")
"""What examples and defaults are made of; a secret that is little else is known to everybody."""
_MADE = "python3 -c 'import secrets; print(secrets.token_urlsafe(48))' makes one"


def faults(settings: Settings, process: str) -> list[str]:
    """Why `process` (a role, `up` or `apply`) does not start with these settings: a sentence each, with what to set."""
    if settings.env != "production":
        return []
    found = list(_secrets(settings, process))
    if process not in (MAKES_PARTS, FILES_KEYS):
        found += _parts(settings, process)
    return found


def _secrets(settings: Settings, process: str) -> Iterator[str]:
    """What is wrong with our own secrets: each that is set, and those that are not and that the process uses."""
    jwt, key, password = _text(settings.jwt_secret), _text(settings.admin_key).strip(), _text(settings.admin_password)
    if process == "ingress" and not jwt:
        yield f"HEADRACE_JWT_SECRET is not set: production needs one of its own; {_MADE}"
    elif jwt and _weak(jwt, MIN_SECRET):
        yield f"HEADRACE_JWT_SECRET must be random, {MIN_SECRET} characters or more; {_MADE}"
    seals = [one.strip() for one in _text(settings.ingress_secret).split(",")]
    if any(_weak(one, MIN_SECRET) for one in seals if one):
        yield f"HEADRACE_INGRESS_SECRET must be random, {MIN_SECRET} characters or more; {_MADE}"
    if key and _weak(key.removeprefix("hr-"), MIN_KEY):
        yield f"HEADRACE_ADMIN_KEY must be random, {MIN_KEY} characters or more; {_MADE}"
    if password and _weak(password, MIN_PASSWORD):
        yield f"HEADRACE_ADMIN_PASSWORD must be {MIN_PASSWORD} characters or more, and none from an example"
    if settings.admin_email and not password:
        yield "HEADRACE_ADMIN_PASSWORD is not set: HEADRACE_ADMIN_EMAIL needs it"


def _parts(settings: Settings, role: str) -> Iterator[str]:
    """What is wrong with how a role is let into Kafka, Redis and ClickHouse, but for what may be open."""
    may_be_open = settings.open_parts
    if "kafka" not in may_be_open:
        yield from _kafka(settings)
    if "redis" not in may_be_open:
        given = _of_redis(settings.redis_url)
        yield from _password("HEADRACE_REDIS_URL", "redis", given, "rediss://:PASSWORD@HOST:PORT/0")
    if "clickhouse" not in may_be_open and role in ASK_CLICKHOUSE:
        given = unquote(urlsplit(settings.clickhouse_url).password or "")
        yield from _password("HEADRACE_CLICKHOUSE_URL", "clickhouse", given, "https://USER:PASSWORD@HOST:PORT")


def _kafka(settings: Settings) -> Iterator[str]:
    allowed = "where its network is yours alone, HEADRACE_OPEN_PARTS=kafka allows it"
    protocol = settings.kafka_security_protocol
    if protocol not in ("SSL", "SASL_SSL"):
        yield (
            f"HEADRACE_KAFKA_SECURITY_PROTOCOL={protocol} does not encrypt: set SASL_SSL, with "
            f"HEADRACE_KAFKA_SASL_USERNAME and HEADRACE_KAFKA_SASL_PASSWORD; {allowed}"
        )
    if protocol == "SSL" and settings.kafka_ssl_certfile is None:
        yield (
            "HEADRACE_KAFKA_SSL_CERTFILE is not set: without it brokers with "
            f"HEADRACE_KAFKA_SECURITY_PROTOCOL=SSL let everybody in, or not us; {allowed}"
        )
    if settings.kafka.sasl and _weak(_text(settings.kafka_sasl_password), MIN_PASSWORD):
        yield f"HEADRACE_KAFKA_SASL_PASSWORD must be random, {MIN_PASSWORD} characters or more; {_MADE}"


def _password(variable: str, part: str, password: str, form: str) -> Iterator[str]:
    if not password:
        yield (
            f"{variable} has no password: set {form}; where its network is yours alone, "
            f"HEADRACE_OPEN_PARTS={part} allows it"
        )
    elif _weak(password, MIN_PASSWORD):
        yield f"The password in {variable} must be random, {MIN_PASSWORD} characters or more; {_MADE}"


def _of_redis(url: str) -> str:
    """The password of a Redis URL, wherever it stands in it; none in one that is no such URL."""
    try:
        return str(parse_url(url).get("password") or "")
    except ValueError:
        return ""


def _text(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret is not None else ""


def _weak(secret: str, length: int) -> bool:
    """Whether a secret is short, has hardly any different characters, or is made of words that examples have."""
    rest = secret.lower()
    for word in _KNOWN:
        rest = rest.replace(word, "")
    told = "".join(letter for letter in rest if letter.isalnum())
    return len(secret) < length or len(set(secret)) < 8 or len(told) < length // 2
