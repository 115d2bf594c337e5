"""`/admin/dead-letters`: what could not be handled and why, and sending it again; looks are written down."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiokafka.errors import KafkaError
from fastapi import Path, Query, Request

from headrace import audit, letters
from headrace.access import Permission
from headrace.errors import Conflict, NotFound, Unavailable
from headrace.letters import CannotReplay, Letter, Wanted
from ingress import guard
from ingress.admin.records import CONFLICT, UNKNOWN
from ingress.guard import Who
from ingress.services import Services
from schemas.control import Replay
from schemas.operate import LetterReplay, Letters, LetterSent, LetterView, WholeLetter

router = guard.router(prefix="/admin/dead-letters", tags=["admin: dead letters"])

KIND = "dead-letters"
Name = Annotated[str, Query(max_length=500)]
Number = Annotated[int, Path(ge=0, le=2**53)]


@router.get("")
@guard.needs(Permission.LETTERS_READ)
async def list_letters(
    request: Request,
    *,
    topic: Name = "",
    role: Name = "",
    reason: Name = "",
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[int | None, Query(ge=0, le=2**53)] = None,
) -> Letters:
    """The newest letters from `topic`, by `role`, and with `reason` in their reason; without their content."""
    services: Services = request.app.state.services
    try:
        found, following = await letters.page(
            services.settings, Wanted(topic, role, reason), limit=limit, before=before
        )
    except KafkaError as error:
        raise _away() from error
    replays = await _replays(services, found)
    return Letters(data=[view(letter, replays.get(letters.key_of(letter))) for letter in found], next=following)


@router.get("/{number}", responses=UNKNOWN)
@guard.needs(Permission.LETTERS_READ)
async def get_letter(request: Request, number: Number, who: Who, *, body: bool = False) -> WholeLetter:
    """One letter with its headers, and with its body if that is asked for."""
    services: Services = request.app.state.services
    letter = await _find(services, number)
    await _readable(services, letter)
    about = letters.whose(letter)
    said = audit.note(
        "read", KIND, str(number), actor=who.actor, body=str(body).lower(), tenant=about.tenant,
        request_id=about.request_id,
    )  # fmt: skip
    await audit.record(services.producer, said)
    known = (await _replays(services, [letter])).get(letters.key_of(letter))
    return WholeLetter(
        **view(letter, known).model_dump(),
        key=letter.key.decode(errors="backslashreplace") if letter.key is not None else None,
        headers=[(name, value.decode(errors="backslashreplace")) for name, value in letter.headers],
        body=(letter.value or b"").decode(errors="backslashreplace") if body else None,
    )


@router.post("/{number}/replay", responses=UNKNOWN | CONFLICT)
@guard.needs(Permission.LETTERS_WRITE)
async def replay(request: Request, number: Number, wanted: LetterReplay, who: Who) -> LetterSent:
    """Send a letter again, once: a request under a new id, any other message as it was; edited if there is a body."""
    services: Services = request.app.state.services
    letter = await _find(services, number)
    await _readable(services, letter)
    try:
        sent = await letters.replay(
            services.control,
            services.producer,
            letter,
            seals=services.seals,
            actor=who.actor,
            reason=wanted.reason,
            body=_bytes(wanted.body),
            again=wanted.again,
        )
    except CannotReplay as error:
        raise Conflict(f"{error}.") from error
    except KafkaError as error:
        raise Unavailable("The letter could not be sent now (Kafka does not answer); ask again.") from error
    return LetterSent(number=number, topic=sent.topic, request_id=sent.key if sent.partition is None else None)


def _bytes(body: dict[str, object] | str | None) -> bytes | None:
    if body is None:
        return None
    return body.encode() if isinstance(body, str) else msgspec.json.encode(body)


async def _find(services: Services, number: int) -> Letter:
    try:
        letter = await letters.find(services.settings, number)
    except KafkaError as error:
        raise _away() from error
    if letter is None:
        raise NotFound(f"There is no dead letter {number} (any more).")
    return letter


async def _readable(services: Services, letter: Letter) -> None:
    """Raises `Erased` when the letter's content is."""
    await services.erasures.check(*letters.whose(letter))


async def _replays(services: Services, found: list[Letter]) -> dict[str, Replay]:
    raw = await services.projection.some("replays", [letters.key_of(letter) for letter in found])
    return {replay.letter: replay for replay in (msgspec.json.decode(one, type=Replay) for one in raw)}


def view(letter: Letter, known: Replay | None) -> LetterView:
    """A letter as it is listed."""
    about, owner = letter.about, letters.whose(letter)
    return LetterView(
        number=letter.number,
        at_ms=about.at_ms,
        topic=about.source_topic,
        partition=about.partition,
        offset=about.offset,
        role=about.role,
        times_seen=about.times_seen,
        reason=about.reason,
        bytes=len(letter.value or b""),
        tenant=owner.tenant,
        request_id=owner.request_id,
        replayed_as=known.new_id if known is not None and known.sent else None,
    )


def _away() -> Unavailable:
    return Unavailable("The dead letters cannot be read now (Kafka does not answer).")
