"""A folder of weights for others: model.safetensors, model.json, and a README that says what they are.

The README is a model card in the form of the Hugging Face hub; `upload` takes the folder there.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from eval.report import Row, markdown, plain, read_lines, reportable
from eval.sample import describe
from recipe import load
from recipe.adapter import peft_config
from recipe.features import EXTRACTORS
from recipe.generator import usual_steps
from recipe.networks import AnyNetwork
from recipe.objectives import from_facts
from recipe.pictures import grid
from recipe.settings import make
from recipe.weights import adapter_of, base_files, check_digest, read_facts, shapes

NAME, ADAPTER = "model", "adapter_model"  # of the two files of weights in the folder; peft's for an adapter
PICTURE, COLUMNS = "samples.png", 8
DATA = ("source", "reference", "held_out", "base")  # keys of paths, and of models
MODELS = ("model", "name", "encoder", "extractor")
EXTRACTOR = "|".join(("pixels", *EXTRACTORS))


def make_folder(weights: Path, folder: Path, results: Path | None = None) -> Path:
    """Copy weights to `folder`, with a card and a picture of samples, and return the card's path.

    results: folder of a sweep, whose rows about these weights are taken; None is the run of the weights. Of
    paths in facts and rows the last part is: the base of an adapter is then looked for beside it. Raises
    OSError, ValueError where the weights are damaged or the folder holds other files.
    """
    facts = read_facts(weights)
    check_digest(weights, facts)
    name = ADAPTER if "adapter" in facts else NAME
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if other := there - own_files(name) - set(base_files(facts, there)):
        raise ValueError(f"--card: {folder} holds other files, such as {min(other)}")
    folder.mkdir(parents=True, exist_ok=True)
    stem = str(weights).removesuffix(".json").removesuffix(".safetensors")
    shutil.copyfile(f"{stem}.safetensors", folder / f"{name}.safetensors")
    facts = public(facts)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if (adapter := adapter_of(facts)) is not None:
        (folder / "adapter_config.json").write_text(json.dumps(peft_config(adapter), indent=2) + "\n")
    found = read_lines((results or weights.parent.parent) / "results.jsonl")
    rows = [row for row in found if row.get("sha256") == facts["sha256"] and reportable(row)]
    card = folder / "README.md"
    said = text(folder.name, facts, public(rows), draw(weights, folder / PICTURE))
    card.write_text(said, encoding="utf-8")
    return card


def own_files(name: str) -> set[str]:
    """Return the files that make up a folder; another's, the base of an adapter, may lie beside them."""
    more = {"adapter_config.json"} if name == ADAPTER else set()
    return {f"{name}.json", f"{name}.safetensors", "README.md", PICTURE, *more}


def public(content: Any, key: str = "") -> Any:  # noqa: ANN401
    """Return facts of weights, or rows of results, with the last part alone of every path in them.

    Where somebody's data and models lie is nobody else's business.
    """
    if isinstance(content, dict):
        return {column(name): public(value, name) for name, value in content.items()}
    if isinstance(content, list):
        return [public(value, key) for value in content]
    if not isinstance(content, str) or key not in (*DATA, *MODELS):
        return content
    parts = re.split(rf", (?=(?:{EXTRACTOR})\b)", content) if key == "extractor" else [content]
    return ", ".join(last_part(part, key) for part in parts)


def column(name: str) -> str:
    """Return the name of a column of results, such as floor[EXTRACTOR], with the extractor's `last_part`."""
    return re.sub(r"(?<=\[).*(?=]$)", lambda extractor: last_part(extractor[0], "extractor"), name)


def last_part(text: str, key: str) -> str:
    """Return the last part of a path, which KIND: may precede; a model's USER/MODEL on the hub stays."""
    kind, path = re.fullmatch(r"([\w.-]{2,}:(?!//))?(.*)", text, re.DOTALL).groups("")
    if key in MODELS and re.match(r"\w[\w.-]*/\w[\w.-]*( |$)", path):
        return text
    return kind + re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def draw(weights: Path, file: Path) -> str:
    """Draw samples of the first classes, and return what they are; or say why there are none, and return "".

    None are drawn of weights with prompts, which somebody would have to think of.
    """
    file.unlink(missing_ok=True)
    try:
        model = load(weights)
        if model.prompts is not None:
            raise ValueError("the weights take prompts")
        nfe = usual_steps(model.facts)
        images = model.sample(n=COLUMNS, nfe=nfe).transpose(0, 3, 1, 2)
    except (ValueError, FloatingPointError) as error:
        sys.stderr.write(f"no {PICTURE} on the card: {error}\n")
        return ""
    Image.fromarray(grid(images, COLUMNS, max(1, 64 // images.shape[-1]))).save(file)
    within = " for t from {:g} to {:g}".format(*model.interval) if model.interval else ""
    return f"Not selected: seeds 0 to {len(images) - 1}, steps: {nfe}, w = {model.w:g}{within}"


def text(name: str, facts: dict[str, Any], rows: list[Row], picture: str) -> str:
    """Return the card: what the hub reads, what the weights are, how to use them, and how they score.

    picture: what it shows, empty for none.
    """
    prompts = facts["model"].get("text") is not None
    task = "text-to-image" if prompts else "unconditional-image-generation"
    about = yaml.safe_dump({"pipeline_tag": task, "tags": ["one-step", facts["method"]["objective"]]})
    lines = ["---", about.rstrip(), "---", "", f"# {plain(name)}", "", *described(facts), ""]
    stem = ADAPTER if "adapter" in facts else NAME
    ask = 'prompts=["a red cat"]' if prompts else "n=8"
    lines += [
        "```python",
        "from recipe import load  # from the project's repository: pip install .\n",
        f"images = load({f'{name}/{stem}'!r}).sample({ask}, nfe={usual_steps(facts)})  # uint8 (N, H, W, C)",
        "```",
        "",
    ]
    if picture:
        lines += [f"![Samples]({PICTURE})", "", f"{picture}.", ""]
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
    adapter = adapter_of(facts)
    of = "parameters" if adapter is None else "parameters of the adapter"
    numbers = sum(math.prod(shape) for shape in shapes(config, adapter).values())
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
        "weights": f"{facts['average']}, {numbers:,} {of}",
        "code": facts["commit"],
    }
    if adapter is not None:
        found["adapter"] = f"of rank {adapter.rank}; needs {Path(adapter.base).name} beside it"
    finished = dict.fromkeys(one["extractor"] for one in facts.get("finished", []))
    found["finished on"] = ", ".join(finished) or "nothing"
    return ["| | |", "|---|---|", *(f"| {key} | {plain(str(value))} |" for key, value in found.items())]


def upload(folder: Path, name: str, private: bool) -> str:
    """Upload the folder, without an adapter's base in it, to the repository `name` (USER/MODEL) of the
    Hugging Face hub, which is created if need be; return its address, and who can see it.

    private: not for everyone to see, which a repository that exists must be already; without it the hub's
    default holds. Raises ValueError, in one line, with the command that does it later.
    """
    there = {file.name for file in folder.iterdir()}
    own = own_files(ADAPTER if f"{ADAPTER}.json" in there else NAME)
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        address = str(api.create_repo(name, private=private or None, exist_ok=True))
        hidden = api.model_info(name).private
        if private and not hidden:
            raise ValueError(f"{name} exists and is public")
        api.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=sorted(own))
    except Exception as error:  # requests, the hub and a missing library have their own
        reason = " ".join(str(error).split())[:200]
        left = [f"--exclude={file}" for file in sorted(there - own)]
        later = shlex.join(["hf", "upload", *(["--private"] if private else []), *left, name, str(folder)])
        raise ValueError(f"--hub: {folder} is written, not uploaded: {reason}. Later: {later}") from error
    return f"{address} ({'private' if hidden else 'public: anyone can see it'})"
