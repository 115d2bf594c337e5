"""Writing things down in the audit trail: notes of what somebody did or saw, as commands to the control processor."""

from __future__ import annotations

import asyncio
import time

import msgspec
import uuid_utils
from aiokafka.errors import KafkaError

from headrace.errors import Unavailable
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
