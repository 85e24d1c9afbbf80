"""`python -m eval.import_sit FILE --out WEIGHTS`: a published SiT (arXiv 2401.08740), nothing in it executed.

FILE is a state dict, or a training checkpoint whose `ema` is taken; both read as data (`eval.torch_file`).
The arguments of a training run are passed over, and what such files do not hold is refused by name.
SiT's time runs from noise (0) to data (1) and its velocity with it: F(x, t, 0) = -SiT(x, 1 - t). The sign
goes into the last layer, the time is an option of our network. The second time and the guidance weight, which
SiT does not know, change nothing to begin with; their weights are drawn with a fixed seed, so that one file
always gives the same.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.import_official import architecture
from eval.torch_file import open_torch_file
from recipe.dit import PRESETS, DiTConfig, ScalarEmbedder, position_embedding
from recipe.objectives import FlowMatching
from recipe.restricted import Node, RefusedPickle
from recipe.settings import make
from recipe.weights import save_weights, shapes

SCALE = 0.18215  # of the latents of sd-vae-ft-ema that SiT is trained on
NEW = ("s_embedder", "guidance_embedder")
NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in the file, or its `ema`, in float32. Raises OSError, RefusedPickle."""
    with open_torch_file(path) as file:
        content = file.content
        state = content.get("ema", content) if type(content) is dict else None
        if type(state) is not dict or not all(type(x) is Node for x in state.values()):
            raise RefusedPickle("neither a state dict of tensors nor a checkpoint that holds one as `ema`")
        if wrong := [name for name in state if type(name) is not str or not NAME.fullmatch(name)]:
            raise RefusedPickle(f"{str(wrong[0])[:50]!r} is not the name of a parameter")
        return {name.removeprefix("module."): file.tensor(node, name) for name, node in state.items()}


def configuration(state: dict[str, Tensor], heads: int | None) -> DiTConfig:
    """Return the architecture that the shapes show; `heads`, which they do not, as published.

    Raises ValueError.
    """
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
    """Return weights of our network that give the negative of SiT's output. Raises ValueError by name."""
    side, features = config.size // config.patch, (config.patch, config.patch, -1, config.channels)
    state, table = dict(state), state["pos_embed"]
    rows = config.patch**2 * config.channels
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name not in state or len(state[name]) not in (rows, 2 * rows):
            raise ValueError(f"{name}: does not give {config.channels} channels, nor twice as many")
        state[name] = -state[name].unflatten(0, features)[:, :, 0].flatten(0, 2)  # drops a variance
    state |= new_embedders(config.width)
    theirs = {name: tuple(x.shape) for name, x in state.items()}
    ours = {**shapes(config), "pos_embed": (1, side**2, config.width)}
    for name in sorted(ours.keys() | theirs.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(f"{name}: shape {theirs.get(name)}, expected {ours.get(name)}")
    if not torch.allclose(table, position_embedding(config.width, side), atol=1e-5):
        raise ValueError("pos_embed: not the fixed sine-cosine embedding of DiT")
    del state["pos_embed"]
    return state


def new_embedders(width: int) -> dict[str, Tensor]:
    """Return the weights of what SiT does not have, as `DiT.init_weights` makes them; their output is zero.

    They are drawn with a fixed seed.
    """
    state, generator = {}, torch.Generator().manual_seed(0)
    for name in NEW:
        embedder = ScalarEmbedder(width).requires_grad_(False)
        for parameter in embedder.parameters():
            parameter.zero_()
        embedder.mlp[0].weight.normal_(std=0.02, generator=generator)
        state |= {f"{name}.{key}": x for key, x in embedder.state_dict().items()}
    return state


def import_sit(path: str | Path, heads: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights in a published file and what describes them. Raises OSError, ValueError."""
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
    """Run the command line."""
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
