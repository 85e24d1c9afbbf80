"""The weights that a sweep names: files, folders and buckets of exports, and averages made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from composer.utils import dist

from eval.export import find_snapshots, save, synthesize
from recipe.posthoc import length_of
from recipe.weights import parse_facts, read_facts
from storage import Folder


class Export(NamedTuple):
    """path: of the JSON; facts: its content."""

    path: Path
    facts: dict[str, Any]


def find_weights(names: list[str], averages: list[str], latest: bool, folder: Path) -> list[Export]:
    """All weights asked for, newest first within each name; `latest` keeps the newest step of each.

    Buckets are copied to FOLDER/downloads, synthesised averages written to FOLDER/posthoc, on each node.

    Raises:
        OSError, ValueError: there are none, or they cannot be read.
    """
    found = []
    with dist.run_local_rank_zero_first():
        for name in names:
            path = mirror(name, folder / "downloads", latest) if "://" in name else Path(name)
            exports = [
                Export(file, read_facts(file)) for file in (path.glob("*.json") if path.is_dir() else [path])
            ]
            wanted = [export for export in exports if export.facts["average"] in averages]
            wanted += synthesized(path, wanted, averages, latest, folder / "posthoc")
            if not wanted:
                raise ValueError(f"weights: {name} holds no weights with average in {averages}")
            wanted.sort(key=lambda export: (export.facts["step"] or 0, export.path.name), reverse=True)
            newest = wanted[0].facts["step"]
            found += [export for export in wanted if not latest or export.facts["step"] == newest]
    return found


def mirror(uri: str, folder: Path, latest: bool) -> Path:
    """Copies the weights of a bucket's folder that are not there yet; returns the local folder.

    `latest` leaves out all but the newest step, and the snapshots that post-hoc averages are made from.
    """
    target = folder / uri.split("://", 1)[1].strip("/").replace("/", "-")
    target.mkdir(parents=True, exist_ok=True)
    source = Folder(uri)
    names = [name for name in sorted(source.names()) if "/" not in name and name.endswith(".json")]
    descriptions = {name: source.read(name) for name in names}
    facts = {name: parse_facts(text, f"{uri}/{name}") for name, text in descriptions.items()}
    newest = max((fact["step"] or 0 for fact in facts.values()), default=0)
    for name, fact in facts.items():
        copy, snapshot = target / name, fact["average"].startswith("posthoc")
        if latest and not snapshot and (fact["step"] or 0) < newest:
            continue
        if not copy.is_file() or copy.read_bytes() != descriptions[name]:
            weights = copy.with_suffix(".safetensors")
            source.get(weights.name, weights)
            copy.write_bytes(descriptions[name])
    return target


def synthesized(
    path: Path, stored: list[Export], averages: list[str], latest: bool, folder: Path
) -> list[Export]:
    """Post-hoc averages of the lengths asked for that training did not store itself."""
    lengths = {
        a: length_of(a) for a in averages if a not in ("ema", "net", *(e.facts["average"] for e in stored))
    }
    if not path.is_dir() or not lengths:
        return []
    exports = []
    steps = sorted({facts["step"] for _, facts in find_snapshots(path)}, reverse=True)
    for step in steps[:1] if latest else steps:
        digests = [facts["sha256"] for _, facts in find_snapshots(path, step)]
        for length in lengths.values():
            file = folder / f"{path.parent.name}-{digests[-1][:8]}-ba{step:07d}-posthoc_{length:g}.json"
            if not file.is_file() or json.loads(file.read_text()).get("snapshots") != digests:
                save(file, *synthesize(path, length, step))
            exports.append(Export(file, read_facts(file)))
    return exports
