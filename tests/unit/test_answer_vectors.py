"""The golden answers of docs/examples/publishing/vectors.json are what the answers role and the router write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.errors import HeadraceError
from headrace.limits.verdict import Refusal, Verdict, refused
from headrace.published_answers import Answer
from headrace.published_answers import refusal as told_refusal
from headrace.senders import Sent, sender
from processors.answers.delivery import Delivery
from processors.router.admit import not_acceptable
from processors.router.route import refusal
from schemas.control import App
from schemas.events import Status, Terminal, Timings, Usage
from schemas.ids import created_ms
from tests.support.publishing import PUBLIC, SEALS, Sample
from topics.frames import Delta, Kind, Opened

VECTORS = json.loads((Path(__file__).parents[2] / "docs/examples/publishing/vectors.json").read_text())
ASKED = VECTORS["messages"][0]
ID: str = ASKED["key"]
MADE_MS = created_ms(ID) or 0
ACCEPTED_MS, ENDED_MS, DAY_AFTER_MS = MADE_MS + 250, MADE_MS + 1_500, MADE_MS + 86_400_000
REFUSAL = Refusal("requests", "app:shop", "5", "0", 12_000_000)
LIMITED = refused(Verdict("refused", 0, "", "", "", 0, REFUSAL, ()), REFUSAL, 0, 0)
MESSAGE = {"role": "assistant", "content": "Grüße! ☕"}
CHOICES = [{"index": 0, "message": MESSAGE, "finish_reason": "stop", "logprobs": None}]


def asked() -> Sent:
    """The first golden message, as the router reads it."""
    headers = [(name, value.encode()) for name, value in ASKED["headers"].items()]
    return sender(
        Sample(headers, ASKED["body"].encode()), SEALS, {"shop": App("shop", "Shop", publishers={"orders-1": PUBLIC})}
    )


def terminal(status: Status, error: HeadraceError | None = None, **changes: Any) -> Terminal:
    made = refusal(asked().envelope, ACCEPTED_MS, ENDED_MS, LIMITED, stream=True)
    return msgspec.structs.replace(made, status=status, error=error.info() if error is not None else None, **changes)


def written() -> Mapping[str, Answer]:
    """What the roles write, under the names of the vectors."""
    rid = bytes.fromhex(ID)
    opening = msgspec.json.encode(Opened("shop", ACCEPTED_MS, "smollm2")).decode()
    frames = [
        Delta(rid, 0, 0, Kind.OPENED, 0, opening),
        Delta(rid, 1, 1, Kind.TEXT, 0, "Grüße! "),
        Delta(rid, 1, 2, Kind.TEXT, 0, "☕"),
        Delta(rid, 1, 3, Kind.FINISH, 0, "stop"),
    ]
    delivery = Delivery()
    told = [one.answer for delta in frames for one in delivery.frame(delta, 0, decided=False)]
    done = terminal(
        Status.COMPLETED, attempt=1, last_seq=3, model="smollm2", usage=Usage(21, 2),
        choices=msgspec.Raw(msgspec.json.encode(CHOICES)),
        timings=Timings(accepted_ms=ACCEPTED_MS, finished_ms=ENDED_MS),
    )  # fmt: skip
    told += [one.answer for one in delivery.ended(done, 0, 0)]
    [limited] = Delivery().ended(terminal(Status.REJECTED, LIMITED), 0, 0)
    late = not_acceptable(asked(), DAY_AFTER_MS)
    assert late is not None
    names = "chunk, the first of its choice", "chunk", "chunk that ends its choice", "result: completed"
    return dict(zip(names, told, strict=True)) | {
        "result: rejected by a limit": limited.answer,
        "result: refused for its id, and so no request": told_refusal(ID, late.info(), DAY_AFTER_MS),
    }


def test_the_golden_answers_are_those_that_are_written() -> None:
    assert [vector["name"] for vector in VECTORS["answers"]] == list(written())
    assert VECTORS["answers_topic"] == "replies.shop"


@pytest.mark.parametrize("vector", VECTORS["answers"], ids=lambda vector: vector["name"])
def test_golden_answers(vector: dict[str, Any]) -> None:
    answer = written()[vector["name"]]
    assert answer.request_id == vector["key"]
    assert [(name, value.decode()) for name, value in answer.headers] == list(vector["headers"].items())
    assert answer.value.decode() == vector["body"]
