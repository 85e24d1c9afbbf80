"""`python -m tests.settings` writes docs/settings.md and the JSON Schemas in yamls/ from the settings."""

import json

from eval.sweep import SweepConfig
from recipe.config import TrainConfig
from recipe.manual import editor_schema, tables
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
