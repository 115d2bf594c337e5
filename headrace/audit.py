"""Writing things down in the audit trail: notes of what somebody did or saw, as commands to the control processor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import msgspec
import uuid_utils
from aiokafka.errors import KafkaError

from headrace.errors import Unavailable
from headrace.settings import Settings
from schemas.audit import AUDIT, AuditNote
from schemas.control import ControlCommand
from topics.catalogue import CONTROL_COMMANDS
from topics.clients import Producer


def note(
    action: str, kind: str, key: str, *, actor: str, reason: str = "", outcome: str = "done", **detail: str
) -> ControlCommand:
    """A command that only writes down what `actor` did to, or saw of, the `kind` named `key`; nothing secret."""
    said = AuditNote(action, kind, key, outcome, detail)
    return ControlCommand(
        id=uuid_utils.uuid7().hex,
        kind=AUDIT,
        key=f"{kind}/{key}",
        value=msgspec.Raw(msgspec.json.encode(said)),
        actor=actor,
        reason=reason,
        at_ms=time.time_ns() // 1_000_000,
    )


def only(asked: Mapping[str, object]) -> dict[str, str]:
    """What somebody looked for, as details of a note; what is None did not matter."""
    return {f"only_{name}": str(value) for name, value in asked.items() if value is not None}


async def record(producer: Producer, *notes: ControlCommand) -> None:
    """Write notes down; they will be in the trail, whatever happens, once this returns. Raises `Unavailable`.

    Call it before the thing itself is done or shown: what cannot be written down must not happen.
    """
    try:
        await asyncio.gather(
            *(
                producer.send(CONTROL_COMMANDS.name, msgspec.json.encode(said), key=f"{said.kind}/{said.key}")
                for said in notes
            )
        )
    except KafkaError as error:
        raise Unavailable("It cannot be written into the audit trail now, and so it is not done.") from error


async def record_alone(settings: Settings, *notes: ControlCommand) -> None:
    """The same for who has no producer: a command line."""
    async with Producer(settings.kafka, f"{settings.instance}-audit") as producer:
        await record(producer, *notes)
