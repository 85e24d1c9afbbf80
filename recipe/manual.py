"""Settings in words, made from the classes that check them: the help of every program."""

import json
import sys
from collections.abc import Iterator
from textwrap import fill
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from recipe.settings import Settings, limits, suggestion

WORDS = {"integer": "whole number", "boolean": "true, false", "string": "text", "object": "mapping"}
FLAGS = ("-h", "--help")


class Row(NamedTuple):
    """One key: what it may be, its default as in a YAML, its meaning, and the objective that has it."""

    key: str
    allowed: str
    default: str
    meaning: str
    whose: str = ""


def answer(arguments: list[str], usage: str, about: str, *sections: type[Settings]) -> None:
    """End a program here if nothing else is asked of it than help; `about` says what it does.

    Raises SystemExit: with status 0 after help was printed, which an argument after --help restricts to that
    key of `sections` and those below it; with the usage as the message where there are no arguments.
    """
    if not arguments:
        raise SystemExit(f"usage: {usage}")
    asked = next((i for i, argument in enumerate(arguments) if argument in FLAGS), None)
    if asked is None:
        return
    key = "".join(arguments[asked + 1 : asked + 2]).partition("=")[0]
    text = "\n".join(filter(None, (manual(section, key) for section in sections)))
    if key and not text:
        known = f"; {suggestion(sections[-1], key.rpartition('.')[2])}" if sections else ""
        raise SystemExit(f"{key}: is not a setting{known}")
    keys = f"\nKeys, of which --help KEY shows one, or those of a section:\n\n{text}\n" if text else ""
    sys.stdout.write(f"{text}\n" if key else f"{about.strip()}\n\nusage: {usage}\n{keys}")
    raise SystemExit(0)


def rows(section: type[Settings]) -> Iterator[Row]:
    """Yield every key of the section and of those below it; an objective's keys say whose they are."""
    schema = TypeAdapter(section).json_schema()
    yield from _rows(schema, schema.get("$defs", {}), "")


def _rows(schema: dict[str, Any], known: dict[str, Any], prefix: str) -> Iterator[Row]:
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        key, branches = f"{prefix}{name}", field.get("oneOf", field.get("anyOf", [field]))
        branches = [] if "errorMessage" in field else branches
        nested = [known[part["$ref"].rpartition("/")[2]] for part in branches if "$ref" in part]
        if not nested or len(nested) < len(branches):
            default = "" if name in required else field["default"]
            default = default if isinstance(default, str) else json.dumps(default)  # as a YAML writes it
            yield Row(key, allowed(field), default, field["description"])
        for one in nested:
            constants = [part["const"] for part in one["properties"].values() if "const" in part]
            whose = constants[0] if len(nested) > 1 else ""
            for row in _rows(one, known, f"{key}."):
                yield row._replace(whose=whose or row.whose)


def allowed(schema: dict[str, Any]) -> str:
    """Return the values that a setting may have, in words."""
    if "errorMessage" in schema:
        return schema["errorMessage"].removeprefix("must be ")
    if "anyOf" in schema or "oneOf" in schema:
        parts = schema.get("anyOf") or schema["oneOf"]
        if parts[0].get("items") == parts[-1]:
            return f"{allowed(parts[-1])}; one or a list" + (" that is not empty" * ("minItems" in parts[0]))
        nothing_first = sorted(parts, key=lambda part: part.get("type") != "null")
        return " or ".join(dict.fromkeys(map(allowed, nothing_first)))
    if "enum" in schema or "const" in schema:
        return ", ".join(schema.get("enum") or [schema["const"]])
    if "$ref" in schema:
        return "the keys below"
    if schema["type"] == "array":
        return f"list of {schema.get('minItems', '')} [{allowed(schema['items'])}]".replace("  ", " ")
    return f"{WORDS.get(schema['type'], schema['type'])} {limits(schema)}".strip()


def manual(section: type[Settings], below: str = "") -> str:
    """Return all keys as text for a terminal, or one and those below it; an empty text if there are none."""
    lines, indent = [], " " * 4
    for row in rows(section):
        if f"{row.key}.".startswith(f"{below}." if below else ""):
            default = f"default {row.default}" if row.default else "must be given"
            key = f"{row.key} ({row.whose})" if row.whose else row.key
            meaning = fill(row.meaning, 100, initial_indent=indent, subsequent_indent=indent)
            lines += [f"{key}: {row.allowed} ({default})", meaning]
    return "\n".join(lines)
