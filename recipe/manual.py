"""Settings for people: all keys, what they may be and what they mean, from the classes that check them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from textwrap import fill
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from recipe.settings import Settings

WORDS = {"integer": "whole number", "boolean": "true, false", "string": "text", "object": "mapping"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


class Row(NamedTuple):
    """One key: what it may be, its default as a YAML writes it, and its meaning."""

    key: str
    allowed: str
    default: str
    meaning: str


def rows(section: type[Settings]) -> Iterator[Row]:
    """Every key of the section and of those below it; an objective's keys say whose they are."""
    schema = TypeAdapter(section).json_schema()
    yield from _rows(schema, schema.get("$defs", {}), "")


def _rows(schema: dict[str, Any], known: dict[str, Any], prefix: str) -> Iterator[Row]:
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        key, branches = f"{prefix}{name}", field.get("oneOf", field.get("anyOf", [field]))
        branches = [] if "errorMessage" in field else branches
        nested = [known[part["$ref"].rpartition("/")[2]] for part in branches if "$ref" in part]
        if not nested or len(nested) < len(branches):
            default = "" if name in required else as_yaml(field["default"])
            yield Row(key, allowed(field), default, field["description"])
        for one in nested:
            whose = f" ({one['properties']['name']['const']})" if len(nested) > 1 else ""
            for row in _rows(one, known, f"{key}."):
                yield row._replace(key=f"{row.key}{whose}")


def as_yaml(value: Any) -> str:  # noqa: ANN401
    """A default as a YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def allowed(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "errorMessage" in schema:
        return schema["errorMessage"].removeprefix("must be ")
    if "anyOf" in schema or "oneOf" in schema:
        parts = schema.get("anyOf") or schema["oneOf"]
        if parts[0].get("items") == parts[-1]:
            return f"{allowed(parts[-1])}; one or a list" + (" that is not empty" * ("minItems" in parts[0]))
        return " or ".join(dict.fromkeys(map(allowed, parts)))
    if "enum" in schema or "const" in schema:
        return ", ".join(schema.get("enum") or [schema["const"]])
    if "$ref" in schema:
        return "section"
    if schema["type"] == "array":
        return f"list of {schema.get('minItems', '')} [{allowed(schema['items'])}]".replace("  ", " ")
    limits = [f"{sign} {schema[name]:.10g}" for name, sign in BOUNDS.items() if name in schema]
    return " ".join([WORDS.get(schema["type"], schema["type"]), ", ".join(limits)]).strip()


def table(section: type[Settings]) -> str:
    """All keys as a Markdown table."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for row in rows(section):
        default = f"`{row.default}`" if row.default else "must be given"
        lines.append(f"| `{row.key}` | {row.allowed} | {default} | {row.meaning} |")
    return "\n".join(lines) + "\n"


def manual(section: type[Settings], below: str = "") -> str:
    """All keys as text for a terminal, or those that begin with `below`; empty where there are none."""
    lines = []
    for row in rows(section):
        if row.key == below or row.key.startswith(f"{below}." if below else ""):
            default = f"default {row.default}" if row.default else "must be given"
            lines += [f"{row.key}: {row.allowed} ({default})", fill(row.meaning, 100, **_indent)]
    return "\n".join(lines)


_indent = {"initial_indent": "    ", "subsequent_indent": "    "}
