"""`python -m eval.import_sit FILE --out WEIGHTS`: a published SiT (arXiv 2401.08740), nothing in it executed.

FILE is a state dict, or a training checkpoint whose `ema` is taken; both by torch's reader of tensors alone,
which makes no other objects (the arguments of a training run are passed over) and refuses the rest by name.
SiT's time runs from noise (0) to data (1) and its velocity with it: F(x, t, 0) = -SiT(x, 1 - t). The sign
goes into the last layer, the time is an option of our network. The second time and the guidance weight, which
SiT does not know, change nothing to begin with.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from eval.import_official import architecture
from recipe.dit import PRESETS, DiT, DiTConfig, position_embedding
from recipe.objectives import FlowMatching
from recipe.settings import make
from recipe.weights import save_weights

SCALE = 0.18215  # of the latents of sd-vae-ft-ema that SiT is trained on
NEW = ("s_embedder", "guidance_embedder")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in the file, or its `ema`. Raises FileNotFoundError, ValueError."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise  # as it is, while other OSErrors say what is wrong with the content
    except (UnpicklingError, RuntimeError, OSError, EOFError, KeyError) as error:
        lines = str(error).splitlines() or [repr(error)]
        named = [line for line in lines if "GLOBAL" in line or "WeightsUnpickler" in line]
        raise ValueError(f"{path}: refused: {(named or lines)[0].strip()}") from error
    state = content.get("ema", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path}: neither a state dict of tensors nor a checkpoint that holds one as `ema`")
    return {name.removeprefix("module."): x for name, x in state.items()}


def configuration(state: dict[str, Tensor], heads: int | None) -> DiTConfig:
    """What the shapes say; `heads`, which they do not, is that of the published sizes. Raises ValueError."""
    try:
        model = architecture(state)
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a SiT: {error}") from error
    width, depth = model["width"], model["depth"]
    published = [p["heads"] for p in PRESETS.values() if (p["width"], p["depth"]) == (width, depth)]
    if heads is None and not published:
        raise ValueError(f"--heads: needed, width {width} and depth {depth} are not those of a published SiT")
    unlike = {"norm": "layer", "modulation_norm": False, "qk_norm": False, "reverse_time": True}
    return make(DiTConfig, {**model, "heads": heads or published[0], **unlike}, "model")


def convert(state: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """The weights of our network that give the negative of SiT's output. Raises ValueError by name."""
    state = {name: x.float() for name, x in state.items()}
    table = position_embedding(config.width, config.size // config.patch)
    if not torch.allclose(state.pop("pos_embed"), table, atol=1e-5):
        raise ValueError("pos_embed: not the fixed sine-cosine embedding of DiT")
    features = (config.patch, config.patch, -1, config.channels)  # -1: 2 where a variance is predicted, too
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name].unflatten(0, features)[:, :, 0].flatten(0, 2)
    net = DiT(config)
    for name in NEW:
        embedder = net.get_submodule(name)
        torch.nn.init.zeros_(embedder.mlp[2].weight)
        state |= {f"{name}.{key}": x for key, x in embedder.state_dict().items()}
    ours, theirs = ({name: x.shape for name, x in part.items()} for part in (net.state_dict(), state))
    for name in sorted(ours.keys() | theirs.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(f"{name}: shape {theirs.get(name)}, expected {ours.get(name)}")
    return state


def import_sit(path: str | Path, heads: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and what describes them. Raises OSError, ValueError."""
    state = read_state(path)
    try:
        config = configuration(state, heads)
        weights = convert(state, config)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    mean, std = [0.0] * config.channels, [1 / SCALE] * config.channels
    data = {"column": "latents", "mean": mean, "std": std, "class_names": [], "class_counts": []}
    data["encoder"] = {"name": "stabilityai/sd-vae-ft-ema", "scaling": 1.0}
    facts = {"method": FlowMatching().facts(), "data": data, "average": "ema", "step": None}
    return weights, {"config": config, **facts, "train_seconds": None}


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.import_sit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="state dict or training checkpoint, .pt")
    parser.add_argument("--out", required=True, help="path of the weights to write, without suffix")
    parser.add_argument("--heads", type=int, help="attention heads, where the size is not a published one")
    options = parser.parse_args(arguments)
    try:
        state, facts = import_sit(options.file, options.heads)
        sys.stdout.write(f"{save_weights(options.out, state, facts.pop('config'), facts)}\n")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
