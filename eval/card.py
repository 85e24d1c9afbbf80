"""A folder of weights for others: model.safetensors, model.json, and a README that says what they are.

The README is a model card in the form of the Hugging Face hub; `upload` takes the folder there.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import yaml

from eval.report import Row, markdown, plain, read_lines, reportable
from eval.sample import describe
from recipe.adapter import peft_config
from recipe.networks import AnyNetwork
from recipe.objectives import from_facts
from recipe.settings import make
from recipe.weights import adapter_of, check_digest, read_facts, shapes

NAME, ADAPTER = "model", "adapter_model"  # of the two files of weights in the folder; peft's for an adapter
RESULTS, PICTURE = "results.jsonl", "samples.png"  # what a sweep leaves, in the folder of a run


def make_folder(weights: Path, folder: Path, results: Path | None = None) -> Path:
    """Copy weights to `folder`, with a card, and return its path.

    results: folder of a sweep, whose rows about these weights, and whose picture, are taken; None is the run
    of the weights. Raises OSError, ValueError where the weights are damaged or the folder holds other files.
    """
    facts = read_facts(weights)
    check_digest(weights, facts)
    name = ADAPTER if "adapter" in facts else NAME
    known = {f"{name}.json", f"{name}.safetensors", "adapter_config.json", "README.md", PICTURE}
    if folder.is_dir() and (other := {file.name for file in folder.iterdir()} - known):
        raise ValueError(f"--card: {folder} holds other files, such as {min(other)}")
    folder.mkdir(parents=True, exist_ok=True)
    stem = str(weights).removesuffix(".json").removesuffix(".safetensors")
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(f"{stem}{suffix}", folder / f"{name}{suffix}")
    if (adapter := adapter_of(facts)) is not None:
        (folder / "adapter_config.json").write_text(json.dumps(peft_config(adapter), indent=2) + "\n")
    results = results or weights.parent.parent
    rows = [row for row in read_lines(results / RESULTS) if row.get("sha256") == facts["sha256"]]
    rows = list(filter(reportable, rows))
    if picture := (results / PICTURE).is_file():
        shutil.copyfile(results / PICTURE, folder / PICTURE)
    card = folder / "README.md"
    card.write_text(text(folder.name, facts, rows, picture), encoding="utf-8")
    return card


def text(name: str, facts: dict[str, Any], rows: list[Row], picture: bool) -> str:
    """Return the card: what the hub reads, what the weights are, how to use them, and how they score."""
    prompts = facts["model"].get("text") is not None
    task = "text-to-image" if prompts else "unconditional-image-generation"
    about = yaml.safe_dump({"pipeline_tag": task, "tags": ["one-step", facts["method"]["objective"]]})
    lines = ["---", about.rstrip(), "---", "", f"# {plain(name)}", "", *described(facts), ""]
    stem = ADAPTER if "adapter" in facts else NAME
    ask = 'prompts=["a red cat"]' if prompts else "n=8"
    lines += [
        "```python",
        "from recipe import load  # pip install terminal-velocity",
        "",
        f'images = load("{name}/{stem}").sample({ask}, nfe=1)  # uint8 (N, H, W, C)',
        "```",
        "",
    ]
    if picture:
        lines += [f"![Samples]({PICTURE})", ""]
    for protocol in dict.fromkeys((row["protocol"], row["samples"]) for row in rows):
        scored = [row for row in rows if (row["protocol"], row["samples"]) == protocol]
        lines += ["## Scores", "", markdown(scored, describe(*protocol), []), ""]
    return "\n".join(lines)


def described(facts: dict[str, Any]) -> list[str]:
    """Return a table of what weights say of themselves."""
    config, data = make(AnyNetwork, facts["model"], "model"), facts["data"]
    objective, encoder = from_facts(facts["method"]), data.get("encoder") or {}
    images = f"{config.size}x{config.size} of {config.channels} channels"
    if data["column"] == "latents":
        images = f"latents, {images}, of {encoder.get('model') or encoder.get('name')}"
    low, high = objective.guidance_range
    names = data.get("class_names", [])
    classes = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    found = {
        "objective": objective.name,
        "guidance w": f"{low:g}" if low == high else f"{low:g} to {high:g}",
        "images": images,
        "classes": f"{config.classes} ({classes})" if classes else f"{config.classes}",
        "prompts": f"{config.text.encoder}, at most {config.text.tokens} tokens" if config.text else "none",
        "training images": sum(data.get("class_counts", [])) or "not known",
        "steps": facts["step"],
        "weights": f"{facts['average']}, {parameters(config):,} parameters",
        "code": facts["commit"],
    }
    if (adapter := adapter_of(facts)) is not None:
        found["adapter"] = f"of rank {adapter.rank}; needs {Path(adapter.base).name} beside it"
    finished = dict.fromkeys(one["extractor"] for one in facts.get("finished", []))
    found["finished on"] = ", ".join(finished) or "nothing"
    return ["| | |", "|---|---|", *(f"| {key} | {plain(str(value))} |" for key, value in found.items())]


def parameters(config: AnyNetwork) -> int:
    """Return the number of weights of an architecture."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def upload(folder: Path, name: str) -> str:
    """Create the repository `name` (USER/MODEL) on the Hugging Face hub if need be, and upload the folder.

    Return its address. Raises ValueError, in one line, with the command that does it later.
    """
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        address = str(api.create_repo(name, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # requests, the hub and a missing library have their own
        reason = " ".join(str(error).split())[:200]
        later = f"hf upload {name} {folder}"
        raise ValueError(f"--hub: {folder} is written, not uploaded: {reason}. Later: {later}") from error
    return address
