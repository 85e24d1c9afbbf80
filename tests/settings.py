"""`python -m tests.settings` writes docs/settings.md and the JSON Schemas in yamls/ from the settings."""

import json

from pydantic import TypeAdapter

from eval.sweep import SweepConfig
from recipe.config import TrainConfig
from recipe.manual import rows
from recipe.plan import Cluster
from tests.conftest import ROOT

HEAD = """# Settings

Made from the code by `python -m tests.settings`; change the settings' classes instead of this page. In a
terminal, `--help` after any command says the same, and `--help KEY` explains one key or a section, as in
`python -m recipe.train --help objective.guidance`. Editors such as VS Code with its YAML extension
complete and check the files of `yamls/`, whose first line names a JSON Schema that is made from the same.

A configuration is a YAML over the YAML that its key `base` names, and both are overridden by `key=value`.
`a.b` is the key `b` in section `a`, as `a: {b: 1}` or `a.b=1`. `???` must be given by a YAML above or by an
argument; `${folder}` is the value of another key. Times are Composer's: `2400ba` (batches, which are steps),
`3ep` (epochs), `32000sp` (samples), `600sec`. An unknown key, a wrong type and a value out of range are one
line that names the key, before anything is read.
"""
PAGES = {
    "Training": ("`recipe/train.py`, `recipe.preflight`, `recipe.plan`", TrainConfig),
    "Sweeps": ("`eval/sweep.py`", SweepConfig),
    "Plans": ("`recipe.plan` and, but for `gpus`, `per_node` and `hop`, `benchmarks.compiled`", Cluster),
}

LATER = {"type": "string", "pattern": r"^\?\?\?$|\$\{"}  # a value that another YAML gives, or another key
BASE = {"type": "string", "description": "Path of the YAML that this one changes, relative to this one."}


def tables(section):
    """Return all keys as Markdown tables: the section's own, then a table for each section below it."""
    groups = {}
    for row in rows(section):
        above = row.key.partition(".")[0] if "." in row.key else ""
        groups.setdefault(f"{above} ({row.whose})" if row.whose else above, []).append(row)
    lines = []
    for title, group in groups.items():
        if title:
            meaning = section.__pydantic_fields__[group[0].key.partition(".")[0]].description
            lines += [f"### {title}", "", meaning, ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        for row in group:
            default = f"`{row.default}`" if row.default else "must be given"
            value, meaning = (text.replace("*", r"\*") for text in (row.allowed, row.meaning))
            lines.append(f"| `{row.key}` | {value} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def editor_schema(section, title):
    """Return the JSON Schema by which editors complete and check a YAML of the section.

    Any key may be left to `base` or stay ???, and any value may refer to other keys, ${folder}. Which
    objective a YAML means may be up to its base: keys of any one are taken where none is named.
    """
    schema = TypeAdapter(section).json_schema()
    for one in (schema, *schema.get("$defs", {}).values()):
        one.pop("required", None)
        one["properties"] = {name: left_open(field) for name, field in one["properties"].items()}
    schema["properties"] = {"base": BASE, **schema["properties"]}
    schema |= {"$schema": "http://json-schema.org/draft-07/schema#", "title": title}
    schema["$defs"] = {**schema.get("$defs", {}), "later": LATER}
    return schema


def left_open(field):
    """Return the schema of a key that may be left to others; of a section, whose keys may be, as it is."""
    about = {name: field[name] for name in ("description", "default") if name in field}
    rule = {name: part for name, part in field.items() if name not in (*about, "title", "discriminator")}
    if "$ref" in rule:
        return {**about, **rule}
    if "oneOf" in rule:
        return {**about, "anyOf": rule["oneOf"]}
    parts = rule["anyOf"] if rule.keys() == {"anyOf"} else [rule]
    return {**about, "anyOf": [*parts, {"$ref": "#/$defs/later"}]}


def page():
    """The text of docs/settings.md."""
    parts = [f"## {title}\n\n{what}.\n\n{tables(section)}" for title, (what, section) in PAGES.items()]
    return "\n".join([HEAD, *parts])


def files():
    """Path below the root and text of all that is made from the settings."""
    schemas = {
        "yamls/schema.json": editor_schema(TrainConfig, "A training run"),
        "yamls/eval/schema.json": editor_schema(SweepConfig, "A table of scores"),
    }
    return {"docs/settings.md": page()} | {
        path: json.dumps(schema, indent=1) + "\n" for path, schema in schemas.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        (ROOT / path).write_text(text)
        print(path)
