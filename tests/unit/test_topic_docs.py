"""What is generated from the catalogue, and the rules by which a schema may change."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from schemas.events import Routed
from topics import docs
from topics.catalogue import CATALOGUE, REQUESTS, ROUTED
from topics.compatibility import incompatibilities
from topics.envelope import Envelope
from topics.json_schemas import topic_schema
from topics.signing import SEAL, SIGNATURE


def resolve(document: dict[str, Any], reference: str) -> Any:
    assert reference.startswith("#/")
    found: Any = document
    for part in reference[2:].split("/"):
        found = found[part]
    return found


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for value in node.values() for found in references(value)]
    return [found for value in node for found in references(value)] if isinstance(node, list) else []


def test_the_committed_files_are_as_the_catalogue_says() -> None:
    assert docs.differences() == [], "run `headrace topics docs`"


def test_asyncapi_has_every_topic_and_all_its_references_lead_somewhere() -> None:
    document = docs.asyncapi()
    assert document["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= document["info"].keys()
    addresses = {channel["address"] for channel in document["channels"].values()}
    assert addresses == {topic.name for topic in CATALOGUE} | {"worker.{worker}.commands", "replies.{app}"}
    for reference in references(document):
        resolve(document, reference)
    for operation in document["operations"].values():
        assert operation["action"] in ("send", "receive")
        channel = operation["channel"]["$ref"]
        assert all(message["$ref"].startswith(f"{channel}/messages/") for message in operation["messages"])
    for channel in document["channels"].values():
        named = set(channel.get("parameters", {}))
        assert named == {name for name in ("worker", "app") if f"{{{name}}}" in channel["address"]}


def test_a_channel_says_how_its_topic_is_kept() -> None:
    channel = docs.asyncapi()["channels"]["inference.routed"]
    assert channel["bindings"]["kafka"]["partitions"] == ROUTED.partitions
    assert channel["bindings"]["kafka"]["topicConfiguration"]["retention.ms"] == ROUTED.retention_ms
    assert channel["x-topic-config"] == ROUTED.config()


def test_every_header_of_the_envelope_is_documented_and_no_other() -> None:
    message = docs.asyncapi()["components"]["messages"][REQUESTS.name]
    envelope = Envelope("0" * 32, "/s", 0, "t", "k", 0, "d", 1.0, 5, "batch", "idem", "tp", "other", 0.5, "user")
    written = {name for name, _ in envelope.headers()} | {SEAL, SIGNATURE}
    assert set(message["headers"]["properties"]) == written


def test_schemas_are_valid_and_describe_fields() -> None:
    for topic in docs.documented_topics():
        if topic.schema is not None:
            jsonschema.Draft202012Validator.check_schema(topic_schema(topic))
    fields = topic_schema(ROUTED)["$defs"]["Routed"]["properties"]
    assert fields["deadline_ms"]["description"] == "Unix ms after which nobody waits for an answer."


def test_a_record_as_it_is_written_satisfies_its_schema() -> None:
    record = {
        "request_id": "0" * 32, "tenant": "t", "key_id": "k", "model": "m", "alias": "a", "pool": "p",
        "reply_partition": 1, "ref": {"partition": 0, "offset": 5}, "body": {"model": "a"}, "max_tokens": None,
    }  # fmt: skip
    jsonschema.validate(record, topic_schema(ROUTED))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record | {"reply_partition": "1"}, topic_schema(ROUTED))
    assert set(record) <= {field.encode_name for field in msgspec.structs.fields(Routed)}


def test_check_finds_files_that_are_missing_changed_or_left_over(tmp_path: Path) -> None:
    assert sorted(docs.write(tmp_path)) == sorted(docs.documents())
    assert docs.differences(tmp_path) == []
    (tmp_path / "asyncapi.json").write_text("{}")
    (tmp_path / "usage.events.schema.json").unlink()
    (tmp_path / "gone.topic.schema.json").write_text("{}")
    stale = ["asyncapi.json", "gone.topic.schema.json", "usage.events.schema.json"]
    assert docs.differences(tmp_path) == stale
    assert docs.write(tmp_path) == stale
    assert docs.differences(tmp_path) == []


def test_schemas_follow_the_released_ones() -> None:
    for released in sorted(docs.RELEASED.glob("*.json")):
        current = docs.GENERATED / released.name
        assert current.exists(), f"the topic of {released.name} is gone"
        assert incompatibilities(json.loads(released.read_text()), json.loads(current.read_text())) == []


OLD: dict[str, Any] = {
    "anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
    "$defs": {
        "A": {
            "type": "object",
            "properties": {
                "type": {"enum": ["a"]},
                "id": {"type": "string"},
                "count": {"type": "integer", "default": 0},
                "state": {"$ref": "#/$defs/State"},
                "names": {"type": "array", "items": {"type": "string"}, "default": []},
                "inner": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "default": None},
                "pair": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "minItems": 2},
            },
            "required": ["type", "id"],
        },
        "B": {"type": "object", "properties": {"type": {"enum": ["b"]}}, "required": ["type"]},
        "State": {"enum": ["on", "off"]},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """OLD with one place set to another value, or removed by None."""
    new = copy.deepcopy(OLD)
    *way, last = path.split("/")
    place: Any = new
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if value is None:
        del place[int(last) if isinstance(place, list) else last]
    else:
        place[last] = value
    return new


FIELDS = "$defs/A/properties"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{FIELDS}/more", {"type": "string", "default": ""}),
        (f"{FIELDS}/id", {"type": "string", "description": "said now"}),
        ("$defs/State", {"enum": ["on", "off", "broken"]}),
        ("anyOf", [{"$ref": "#/$defs/B"}, {"$ref": "#/$defs/A"}, {"type": "string"}]),
        (
            f"{FIELDS}/pair",
            {
                "type": "array",
                "prefixItems": [{"type": "string"}, {"type": "integer"}, {"type": "string"}],
                "minItems": 2,
            },
        ),
    ],
)
def test_additions_are_compatible(path: str, value: Any) -> None:
    assert incompatibilities(OLD, changed(path, value)) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{FIELDS}/count", None, "value<a>.count: is gone"),
        (f"{FIELDS}/count", {"type": "string", "default": 0}, 'value<a>.count: type was "integer", is "string"'),
        (f"{FIELDS}/count", {"type": "integer", "default": 1}, "value<a>.count: default was 0, is 1"),
        ("$defs/A/required", ["type", "id", "count"], "value<a>.count: is required now"),
        ("$defs/State", {"enum": ["on"]}, 'value<a>.state: no longer allows "off"'),
        (f"{FIELDS}/names/items/type", "integer", 'value<a>.names[]: type was "string", is "integer"'),
        ("anyOf/1", None, "value: the variant b is gone"),
        (f"{FIELDS}/inner/anyOf/1", None, "value<a>.inner: the variant null is gone"),
        (f"{FIELDS}/pair/prefixItems/1", None, "value<a>.pair: had 2 positions, has 1"),
        (f"{FIELDS}/pair/minItems", 3, "value<a>.pair: needs 3 positions now, needed 2"),
    ],
)
def test_what_breaks_readers_is_found(path: str, value: Any, message: str) -> None:
    assert incompatibilities(OLD, changed(path, value)) == [message]


def test_a_variant_may_not_become_the_only_one() -> None:
    new = copy.deepcopy(OLD)
    new["$ref"] = new.pop("anyOf")[0]["$ref"]
    assert incompatibilities(OLD, new) != []
