"""Settings for people and editors, from the classes that check them: --help, docs/settings.md, JSON Schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from textwrap import fill
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from recipe.settings import Settings


class Row(NamedTuple):
    """One key: what it may be, its default as YAML writes it (None: must be given), and its meaning."""

    key: str
    allowed: str
    default: str | None
    meaning: str


def rows(section: type[Settings]) -> Iterator[Row]:
    """Every key of the section and of those below it; an objective's keys say whose they are."""
    schema = TypeAdapter(section).json_schema()
    yield from _rows(schema, schema.get("$defs", {}), "")


def _rows(schema: dict[str, Any], known: dict[str, Any], prefix: str) -> Iterator[Row]:
    for name, field in schema["properties"].items():
        key, branches = f"{prefix}{name}", field.get("oneOf", field.get("anyOf", [field]))
        sections = [known[part["$ref"].rpartition("/")[2]] for part in branches if "$ref" in part]
        if not sections or len(sections) < len(branches):
            default = "null" if field.get("default", "") is None else json.dumps(field.get("default"))
            default = default if "default" in field else None
            yield Row(key, allowed(field, known), default, field["description"])
        for one in sections:
            whose = f" ({one['properties']['name']['const']})" if len(sections) > 1 else ""
            yield from (
                row._replace(key=f"{row.key}{whose}") for row in _rows(one, known, f"{key}.")
            )


def allowed(schema: dict[str, Any], known: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "errorMessage" in schema:
        return schema["errorMessage"].removeprefix("must be ")
    if "anyOf" in schema or "oneOf" in schema:
        parts = schema.get("anyOf", schema.get("oneOf"))
        return " or ".join(dict.fromkeys(allowed(part, known) for part in parts))
    if "enum" in schema or "const" in schema:
        return ", ".join(schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return "a section"
    if schema.get("type") == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        count = f"{least} " if least == most else "one or more " if least else ""
        return f"list of {count}[{allowed(schema['items'], known)}]"
    words = {"integer": "whole number", "boolean": "true, false", "string": "text", "object": "a mapping"}
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[name]:.10g}" for name, sign in bounds.items() if name in schema]
    return " ".join([words.get(schema["type"], schema["type"]), ", ".join(limits)]).strip()
