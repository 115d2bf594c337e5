"""Whether a schema may follow another: records of either version must be readable by readers of either."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

_MEANING = ("type", "const", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern")


def incompatibilities(old: Schema, new: Schema) -> list[str]:
    """What in `new` breaks readers or records of `old`, one sentence each; empty when it may follow.

    Compatible are: a new field with a default, a new variant or enum value (a producer emits it only when every
    consuming role knows it), and other descriptions. Not compatible are: a field, variant or enum value that is gone,
    another type, a field that is newly required, and another default (records leave defaults out).
    """
    return list(_differences(_Side(old), _Side(new), old, new, "value", frozenset()))


class _Side:
    """A schema document, to follow its references in."""

    def __init__(self, document: Schema) -> None:
        self._definitions: Mapping[str, Schema] = document.get("$defs", {})

    def name(self, schema: Schema) -> str | None:
        reference = schema.get("$ref")
        return reference.rpartition("/")[2] if isinstance(reference, str) else None

    def follow(self, schema: Schema) -> Schema:
        name = self.name(schema)
        return self._definitions[name] if name is not None else schema


def _differences(
    before: _Side, after: _Side, old: Schema, new: Schema, at: str, above: frozenset[tuple[str | None, str | None]]
) -> Iterator[str]:
    names = (before.name(old), after.name(new))
    if names[0] is not None and names in above:
        return  # A type that holds itself.
    within = above | {names}
    yield from _default_change(old, new, at)
    old, new = before.follow(old), after.follow(new)
    for word in _MEANING:
        if old.get(word) != new.get(word):
            yield f"{at}: {word} was {_show(old.get(word))}, is {_show(new.get(word))}"
    gone = [value for value in old.get("enum", ()) if value not in new.get("enum", ())]
    if gone:
        yield f"{at}: no longer allows {', '.join(map(_show, gone))}"
    elif "enum" in new and "enum" not in old:
        yield f"{at}: allows only {', '.join(map(_show, new['enum']))} now"
    yield from _variants(before, after, old, new, at, within)
    yield from _fields(before, after, old, new, at, within)
    for word in ("items", "additionalProperties"):
        inner_old, inner_new = old.get(word), new.get(word)
        if isinstance(inner_old, Mapping) and isinstance(inner_new, Mapping):
            yield from _differences(before, after, inner_old, inner_new, f"{at}[]", within)
        elif inner_old != inner_new:
            yield f"{at}: {word} was {_show(inner_old)}, is {_show(inner_new)}"
    yield from _positions(before, after, old, new, at, within)


def _default_change(old: Schema, new: Schema, at: str) -> Iterator[str]:
    if "default" in old and old["default"] != new.get("default", old["default"]):
        yield f"{at}: default was {_show(old['default'])}, is {_show(new['default'])}"


def _fields(
    before: _Side, after: _Side, old: Schema, new: Schema, at: str, above: frozenset[tuple[str | None, str | None]]
) -> Iterator[str]:
    had, has = old.get("properties", {}), new.get("properties", {})
    for name in sorted(set(new.get("required", ())) - set(old.get("required", ()))):
        yield f"{at}.{name}: is required now"
    for name, schema in had.items():
        if name not in has:
            yield f"{at}.{name}: is gone"
        else:
            yield from _differences(before, after, schema, has[name], f"{at}.{name}", above)


def _positions(
    before: _Side, after: _Side, old: Schema, new: Schema, at: str, above: frozenset[tuple[str | None, str | None]]
) -> Iterator[str]:
    """Structs that travel as arrays: positions keep their meaning, new ones come last and are optional."""
    had, has = old.get("prefixItems", ()), new.get("prefixItems", ())
    if len(has) < len(had):
        yield f"{at}: had {len(had)} positions, has {len(has)}"
    if new.get("minItems", 0) > old.get("minItems", 0):
        yield f"{at}: needs {new['minItems']} positions now, needed {old.get('minItems', 0)}"
    for index, (schema, follower) in enumerate(zip(had, has, strict=False)):
        yield from _differences(before, after, schema, follower, f"{at}[{index}]", above)


def _variants(
    before: _Side, after: _Side, old: Schema, new: Schema, at: str, above: frozenset[tuple[str | None, str | None]]
) -> Iterator[str]:
    had, has = old.get("anyOf", ()), list(new.get("anyOf", ()))
    if had and not has:
        yield f"{at}: was one of {len(had)} variants, is one schema now"
        return
    if has and not had:
        yield f"{at}: was one schema, is one of {len(has)} variants now"
        return
    for variant in had:
        label = _label(before, variant)
        follower = next((other for other in has if _label(after, other) == label), None)
        if follower is None:
            yield f"{at}: the variant {label} is gone"
        else:
            yield from _differences(before, after, variant, follower, f"{at}<{label}>", above)


def _label(side: _Side, variant: Schema) -> str:
    """What a variant is recognised by: the tag of a tagged struct, its name, or its type."""
    followed = side.follow(variant)
    tag = followed.get("properties", {}).get("type", {}).get("enum")
    return str(tag[0]) if tag else side.name(variant) or str(followed.get("type", "anything"))


def _show(value: object) -> str:
    return "nothing" if value is None else json.dumps(value)
