"""Published SiT (arXiv 2401.08740) and those trained by REPA (arXiv 2410.06940), for `eval.import_weights`.

SiT's time runs from noise (0) to data (1) and its velocity with it: F(x, t, 0) = -SiT(x, 1 - t). The sign
goes into the last layer, the time is an option of our network. REPA's SiT has our time and velocity; which of
the two a file holds, its tensors do not tell. The second time and the guidance weight, which SiT does not
know, change nothing to begin with; their weights are drawn with a fixed seed, so that one file always gives
the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.import_official import architecture
from recipe.dit import PRESETS, DiTConfig, ScalarEmbedder, position_embedding
from recipe.settings import make
from recipe.weights import shapes

SCALE = 0.18215  # of the latents of sd-vae-ft-ema that SiT is trained on
NEW = ("s_embedder", "guidance_embedder")


def configuration(state: dict[str, Tensor], heads: int | None, convention: str) -> DiTConfig:
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
    unlike = {"norm": "layer", "modulation_norm": False, "qk_norm": False}
    unlike["reverse_time"] = convention == "sit"
    return make(DiTConfig, {**model, "heads": heads or published[0], **unlike}, "model")


def convert(state: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Return weights of our network, which give the negative of SiT's output where that has its own time.

    Raises ValueError by name.
    """
    sign = -1 if config.reverse_time else 1
    side, features = config.size // config.patch, (config.patch, config.patch, -1, config.channels)
    state, table = dict(state), state["pos_embed"]
    rows = config.patch**2 * config.channels
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name not in state or len(state[name]) not in (rows, 2 * rows):
            raise ValueError(f"{name}: does not give {config.channels} channels, nor twice as many")
        state[name] = sign * state[name].unflatten(0, features)[:, :, 0].flatten(0, 2)  # drops a variance
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
