"""What the brokers let the publishers of an app do: its user, its access control lists and its quota. Pure.

An app's user may write `inference.requests`, read `replies.<app>` with groups of its own, and nothing else. It may not
use transactions: an open one would hold up all who read after it.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from schemas.control import App
from topics.catalogue import REQUESTS, answers_of

MECHANISM = "SCRAM-SHA-512"
ITERATIONS = 8192


class Resource(IntEnum):
    """Kinds of resources, by their numbers in Kafka's protocol."""

    TOPIC = 2
    GROUP = 3


class Pattern(IntEnum):
    """How a resource is named."""

    LITERAL = 3
    PREFIXED = 4


class Operation(IntEnum):
    """What is done with it."""

    READ = 3
    WRITE = 4
    DESCRIBE = 8


class Acl(NamedTuple):
    """One thing that a user may do, from any host."""

    resource: Resource
    name: str
    pattern: Pattern
    operation: Operation


@dataclass(frozen=True, slots=True)
class Access:
    """All that the brokers know of an app's publishers."""

    app: str
    given: bool
    """False where the app has no publishers, or is disabled: all is taken away then."""
    acls: tuple[Acl, ...]
    byte_rate: int | None

    @property
    def user(self) -> str:
        """The name by which the app's publishers log in."""
        return f"publisher-{self.app}"


def group_prefix(app: str) -> str:
    """What the names of an app's consumer groups begin with; no such id has a slash, so none begins another's."""
    return f"publisher/{app}/"


def access_of(app: App) -> Access:
    """What an app's publishers may do."""
    answers = answers_of(app.id).name
    acls = (
        Acl(Resource.TOPIC, REQUESTS.name, Pattern.LITERAL, Operation.WRITE),
        Acl(Resource.TOPIC, REQUESTS.name, Pattern.LITERAL, Operation.DESCRIBE),
        Acl(Resource.TOPIC, answers, Pattern.LITERAL, Operation.READ),
        Acl(Resource.TOPIC, answers, Pattern.LITERAL, Operation.DESCRIBE),
        Acl(Resource.GROUP, group_prefix(app.id), Pattern.PREFIXED, Operation.READ),
    )
    return Access(app.id, bool(app.publishers) and app.enabled, acls, app.producer_byte_rate)


def salted(password: str, salt: bytes) -> bytes:
    """What the brokers keep of a password (RFC 5802), in place of it."""
    return hashlib.pbkdf2_hmac("sha512", password.encode(), salt, ITERATIONS)


def commands(access: Access, bootstrap: str) -> Iterator[str]:
    """The same by Kafka's own tools; the password is that of the shell's variable PASSWORD."""
    where = f"--bootstrap-server {bootstrap} --command-config admin.properties"
    principal = shlex.quote(f"User:{access.user}")
    change = "--add" if access.given else "--remove --force"
    for acl in access.acls:
        named = f"--{acl.resource.name.lower()} {shlex.quote(acl.name)}"
        pattern = f"--resource-pattern-type {acl.pattern.name.lower()}"
        operation = f"--operation {acl.operation.name.capitalize()}"
        yield f"kafka-acls.sh {where} {change} --allow-principal {principal} {operation} {named} {pattern}"
    alter = f"kafka-configs.sh {where} --alter --entity-type users --entity-name {shlex.quote(access.user)}"
    if access.given:
        yield f'{alter} --add-config "{MECHANISM}=[iterations={ITERATIONS},password=$PASSWORD]"'
    else:
        yield f"{alter} --delete-config {MECHANISM}"
    if access.given and access.byte_rate is not None:
        yield f"{alter} --add-config producer_byte_rate={access.byte_rate}"
    else:
        yield f"{alter} --delete-config producer_byte_rate"
