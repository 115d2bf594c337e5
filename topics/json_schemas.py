"""JSON Schemas of what topics carry, made from the msgspec types and the docstrings of their fields."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any
from unittest.mock import patch

import msgspec
from msgspec import _json_schema

from schemas import audit, control, events
from topics.catalogue import Topic
from topics.frames import Delta

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_MODULES: tuple[ModuleType, ...] = (audit, control, events, sys.modules[Delta.__module__])


def components(topics: Mapping[str, object], ref: Callable[[str], str]) -> tuple[dict[str, Schema], dict[str, Schema]]:
    """Per topic the schema of its value, and all schemas those refer to, by name; `ref` makes a reference of a name."""
    names = list(topics)
    with patch.object(_json_schema, "to_builtins", _default):
        tops, named = msgspec.json.schema_components([topics[name] for name in names], ref_template=ref("{name}"))
    described = {name: _describe(name, schema) for name, schema in sorted(named.items())}
    return dict(zip(names, tops, strict=True)), described


def _default(value: object, **options: Any) -> object:
    """A field's default as JSON. msgspec itself fails on an absent `Raw`, which no reader can tell from null."""
    return None if isinstance(value, msgspec.Raw) else msgspec.to_builtins(value, **options)


def topic_schema(topic: Topic) -> Schema:
    """The JSON Schema of one topic's values, complete by itself."""
    tops, named = components({topic.name: topic.schema}, lambda name: f"#/$defs/{name}")
    about = {"$schema": DRAFT, "$id": f"urn:headrace:topic:{topic.name}", "title": topic.name}
    return about | {"description": topic.carries} | tops[topic.name] | {"$defs": named}


def _describe(name: str, schema: Schema) -> Schema:
    """A struct's schema with the docstrings of its fields as descriptions."""
    said = _field_docs().get(name, {})
    properties = {
        field: ({"description": said[field]} if field in said else {}) | found
        for field, found in schema.get("properties", {}).items()
    }
    return schema | ({"properties": properties} if properties else {})


@lru_cache(maxsize=1)
def _field_docs() -> dict[str, dict[str, str]]:
    """Class -> field -> the string that stands below the field in the source."""
    found: dict[str, dict[str, str]] = {}
    for module in _MODULES:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ClassDef):
                found[node.name] = dict(_documented(node))
    return found


def _documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, inspect.cleandoc(text).replace("\n", " ")
