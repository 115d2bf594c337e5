"""What other systems read about our topics: an AsyncAPI 3.0 document and a JSON Schema a topic, from the catalogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import schemas
from headrace import __version__
from topics import envelope
from topics.catalogue import CATALOGUE, DEAD_LETTERS, PUBLISHED, REPLIES, REQUESTS, Topic, answers_of, worker_commands
from topics.dead_letters import PREFIX
from topics.frames import Delta
from topics.json_schemas import Schema, components, topic_schema

GENERATED = Path(schemas.__file__).parent / "generated"
RELEASED = Path(schemas.__file__).parent / "released"
"""The schemas of the last release; a schema may only change compatibly with these."""
_ASYNCAPI = "asyncapi.json"
_SUFFIX = ".schema.json"

DESCRIPTION = """\
Headrace serves language models as a stream of events. Topics are created by `headrace topics apply` from the same \
catalogue that this document is made from. A request is accepted when the brokers have acknowledged its record in \
`inference.requests`; it then reaches exactly one terminal in `inference.log`. Delivery is at least once: readers are \
idempotent under (tenant, request_id, attempt, epoch). Fields are only ever added, with a default; unknown ones are to \
be ignored."""

_BODY: Schema = {
    "type": "object",
    "description": "The body of OpenAI's `POST /v1/chat/completions`, as the caller sent it.",
    "required": ["model", "messages"],
    "properties": {
        "model": {"type": "string", "description": "Id or alias of a model."},
        "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
    },
    "additionalProperties": True,
}
_REQUEST_HEADERS: dict[str, str] = {
    "ce_specversion": "Always 1.0.",
    "ce_id": "The request id: a UUID as 32 lower-case hex digits.",
    "ce_type": f"Always {envelope.REQUEST_TYPE}.",
    "ce_source": "The publisher, e.g. /headrace/ingress/ingress-1.",
    "ce_time": "RFC 3339 time of the publisher; informational.",
    "hr-tenant": "Tenant (app) that asks and pays.",
    "hr-key-id": "Id of the API key that was used.",
    "hr-reply-partition": "Partition of inference.replies that the asking ingress reads.",
    "hr-digest": "SHA-256 of the body, hex.",
    "hr-deadline": "Seconds from acceptance after which nobody waits.",
}
_OPTIONAL_REQUEST_HEADERS: dict[str, str] = {
    "content-type": "application/json.",
    "hr-resume": "Seconds that the request outlives its last caller.",
    "hr-priority": "interactive, standard (as without it) or batch.",
    "hr-start-within": "Seconds from acceptance after which an answer need not begin; the deadline without it.",
    "hr-idempotency-key": "The Idempotency-Key, as the caller sent it.",
    "traceparent": "W3C trace context.",
    "hr-replay-of": "The request that this one repeats.",
    "hr-user-id": "Id of the user who owns the API key.",
    "hr-seal": "HMAC-SHA256 of an ingress, base64; a direct publisher signs in its place (docs/publishing.md).",
    "hr-signature": "Ed25519 signature of a direct publisher, base64.",
}
_LETTER_HEADERS: dict[str, str] = {
    f"{PREFIX}topic": "Topic that the message was on.",
    f"{PREFIX}partition": "Its partition.",
    f"{PREFIX}offset": "Its offset.",
    f"{PREFIX}reason": "Why it could not be handled.",
    f"{PREFIX}role": "Role that could not handle it.",
    f"{PREFIX}at-ms": "When, Unix ms.",
    f"{PREFIX}times-seen": "How many times it has been here.",
}


def documented_topics() -> list[Topic]:
    """Every topic of the catalogue, with one worker's commands and one app's answers standing for all."""
    return [*CATALOGUE, worker_commands("{worker}"), answers_of("{app}")]


def _payload_types() -> dict[str, object]:
    return {topic.name: topic.schema for topic in documented_topics() if topic.schema is not None} | {
        REPLIES.name: list[Delta],
        PUBLISHED.name: list[Delta],
    }


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3.0 document."""
    payloads, named = components(_payload_types(), lambda name: f"#/components/schemas/{name}")
    topics = documented_topics()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Headrace",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {_id(topic): _channel(topic) for topic in topics},
        "operations": {f"read.{_id(topic)}": _operation(topic) for topic in topics},
        "components": {
            "messages": {_id(topic): _message(topic, payloads.get(topic.name)) for topic in topics},
            "schemas": named,
        },
    }


def _id(topic: Topic) -> str:
    return topic.name.replace("{worker}", "id").replace("{app}", "app")


def _channel(topic: Topic) -> dict[str, Any]:
    config = topic.config()
    standard: dict[str, Any] = {"cleanup.policy": config["cleanup.policy"].split(",")}
    standard |= {
        name: int(config[name])
        for name in ("retention.ms", "delete.retention.ms", "max.message.bytes")
        if name in config
    }
    binding = {"topic": topic.name, "partitions": topic.partitions, "topicConfiguration": standard}
    channel: dict[str, Any] = {
        "address": topic.name,
        "description": topic.carries,
        "messages": {"record": {"$ref": f"#/components/messages/{_id(topic)}"}},
        "bindings": {"kafka": binding | {"bindingVersion": "0.5.0"}},
        "x-topic-config": config,
    }
    if "{worker}" in topic.name:
        channel["parameters"] = {"worker": {"description": "The worker's stable id (HEADRACE_WORKER_ID)."}}
    if "{app}" in topic.name:
        channel["parameters"] = {"app": {"description": "Id of an app that has publishers."}}
    return channel


def _operation(topic: Topic) -> dict[str, Any]:
    reference = f"#/channels/{_id(topic)}"
    return {
        "action": "receive",
        "channel": {"$ref": reference},
        "messages": [{"$ref": f"{reference}/messages/record"}],
    }


def _message(topic: Topic, payload: Schema | None) -> dict[str, Any]:
    message: dict[str, Any] = {
        "name": _id(topic),
        "summary": topic.carries,
        "bindings": {
            "kafka": {"key": {"type": "string", "description": f"The {topic.key}."}, "bindingVersion": "0.5.0"}
        },
    }
    if topic is REQUESTS:
        message["headers"] = _headers(_REQUEST_HEADERS, _OPTIONAL_REQUEST_HEADERS)
        message["payload"] = _BODY
    elif topic is DEAD_LETTERS:
        message["contentType"] = "application/octet-stream"
        message["headers"] = _headers(_LETTER_HEADERS, {f"{PREFIX}key": "Key of the message, as Latin-1."})
        message["payload"] = {"description": "The message's value, byte for byte."}
    else:
        message["payload"] = payload if payload is not None else {}
        if topic in (REPLIES, PUBLISHED):
            message["contentType"] = "application/msgpack"
    return message


def _headers(required: dict[str, str], optional: dict[str, str]) -> Schema:
    every = required | optional
    properties = {name: {"type": "string", "description": text} for name, text in every.items()}
    return {"type": "object", "required": list(required), "properties": properties}


def documents() -> dict[str, str]:
    """File name -> content of everything that is generated."""
    files = {_ASYNCAPI: asyncapi()}
    for topic in documented_topics():
        if topic.schema is not None:
            files[_id(topic) + _SUFFIX] = topic_schema(topic)
    return {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in files.items()}


def write(directory: Path = GENERATED) -> list[str]:
    """Write what is not as it should be; the names of the files that were written or removed."""
    directory.mkdir(parents=True, exist_ok=True)
    wanted = documents()
    stale = differences(directory)
    for name in stale:
        if name in wanted:
            (directory / name).write_text(wanted[name], encoding="utf-8")
        else:
            (directory / name).unlink()
    return stale


def differences(directory: Path = GENERATED) -> list[str]:
    """The names of the files that differ from what the catalogue says, are missing, or are left over."""
    wanted = documents()
    found = {path.name: path.read_text(encoding="utf-8") for path in directory.glob("*.json")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
