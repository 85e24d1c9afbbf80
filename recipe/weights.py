"""Weights for inference: NAME.safetensors and a readable NAME.json beside it. Nothing is ever pickled.

The JSON holds `model` (the architecture), `method` (objective, scaled, guidance), `data` (column, mean and
std of the normalisation, class names, encoder), `step`, `average` (ema or net: which of the run's weights),
`commit` and `sha256` (of the tensors' file).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipe.dit import DiT, DiTConfig

FORMAT = 1


def commit() -> str:
    """The checkout's commit, with `+` where files differ from it; `unknown` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + ("+" if changes.stdout.strip() else "")


def save_weights(
    path: str | Path, state: dict[str, Tensor], config: DiTConfig, facts: dict[str, Any]
) -> Path:
    """Write PATH.safetensors, then PATH.json, each whole or not at all; returns the JSON's path.

    facts: `method`, `data`, `step`, `average` as described above; `model`, `commit` and `format` are added.
    """
    weights, description = _files(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().cpu() for name, t in state.items()}, f"{weights}.part")
    digest = hashlib.sha256(Path(f"{weights}.part").read_bytes()).hexdigest()
    os.replace(f"{weights}.part", weights)
    facts = {"format": FORMAT, "model": asdict(config), **facts, "commit": commit(), "sha256": digest}
    description.with_suffix(".part").write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(description.with_suffix(".part"), description)
    return description


def read_facts(path: str | Path) -> dict[str, Any]:
    """The JSON of the weights at `path`, with or without suffix. Raises FileNotFoundError or ValueError."""
    weights, description = _files(path)
    for file in (weights, description):
        if not file.is_file():
            raise FileNotFoundError(f"weights: {file} does not exist")
    facts = json.loads(description.read_text())
    if facts.get("format") != FORMAT:
        raise ValueError(f"weights: {description} has format {facts.get('format')}, expected {FORMAT}")
    return facts


def load_weights(path: str | Path, device: str | torch.device = "cpu") -> tuple[DiT, dict[str, Any]]:
    """The network in evaluation mode, without gradients, and its facts."""
    facts = read_facts(path)
    net = DiT(DiTConfig(**facts["model"]), initialize=False).to(device)
    net.load_state_dict(load_file(_files(path)[0], device=str(device)))
    return net.eval().requires_grad_(False), facts


def _files(path: str | Path) -> tuple[Path, Path]:
    stem = str(path).removesuffix(".json").removesuffix(".safetensors")
    return Path(f"{stem}.safetensors"), Path(f"{stem}.json")
