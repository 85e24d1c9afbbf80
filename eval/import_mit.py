"""Released weights of iMF, pMF and FD-loss (which finished those), for `eval.import_weights`.

All of them are one network (recipe/mit.py). Its files differ in how a wrapped layer is called, and inference
files lack the blocks of the auxiliary head, so that the velocity is u's there.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from recipe.mit import MiTConfig
from recipe.objectives import IMF
from recipe.settings import make
from recipe.weights import shapes

WRAPPER = re.compile(r"\.(_flax_)?(linear|embedding)(?=\.\w+$)")
NAMES = {
    r"^time_tokens$": "tokens.time",
    r"^class_tokens$": "tokens.label",
    r"^omega_tokens$": "tokens.guidance",
    r"^t_min_tokens$": "tokens.start",
    r"^t_max_tokens$": "tokens.end",
    r"^pos_embed$": "positions",
    r"^x_embedder\.proj1\.": "x_embedder.proj.",
    r"^x_embedder\.proj2\.": "x_embedder.out.",
    r"^h_embedder\.": "s_embedder.",
    r"^omega_embedder\.": "guidance_embedder.",
    r"^cfg_t_start_embedder\.": "start_embedder.",
    r"^cfg_t_end_embedder\.": "end_embedder.",
    r"^shared_blocks\.": "blocks.",
    r"^v_heads\.": "v_blocks.",
    r"^u_final_layer\.": "final_layer.",
    r"\.attn\.out_proj\.": ".attn.proj.",
    r"\.mlp\.w2\.": ".mlp.fc2.",
}
JOINED = {
    ".attn.qkv.weight": (".attn.q_proj.weight", ".attn.k_proj.weight", ".attn.v_proj.weight"),
    ".mlp.fc1.weight": (".mlp.w1.weight", ".mlp.w3.weight"),
}
GUIDANCE = {"sequence": [1.0, 9.0], "grid": [1.0, 8.0]}  # of iMF and of pMF
TIMES = {"sequence": {}, "grid": {"t_mean": 0.8, "t_std": 0.8}}
# (pixels from 512 on, width) => standard deviation of pMF's noise where it is not 1
NOISE = {(False, 1280): 2.0, (True, 768): 2.0, (True, 1024): 4.0, (True, 1280): 4.0}


def is_mit(state: dict[str, Tensor]) -> bool:
    """Return True if the names are those of this network."""
    return any(".u_heads." in f".{name}" for name in state)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the names of `recipe.mit.MiT`, joined where that has one for several.

    Raises ValueError for a part of one that is missing, or does not fit the others.
    """
    named = [(WRAPPER.sub("", name.removeprefix("net.")), x) for name, x in state.items()]
    shared = count(dict(named), "shared_blocks")
    found: dict[str, Tensor] = {}
    for name, x in named:
        name = re.sub(r"^u_heads\.(\d{1,4})\.", lambda m: f"blocks.{shared + int(m[1])}.", name)
        for pattern, ours in NAMES.items():
            name = re.sub(pattern, ours, name)
        found[name] = x.flatten(1) if name == "x_embedder.out.weight" else x
        if name.startswith("tokens.") and x.dim() == 3:
            found[name] = x.flatten(0, 1)
    if len(found) < len(state):
        raise ValueError("two of its names mean the same tensor")
    for joined, parts in JOINED.items():
        for stem in [n.removesuffix(parts[0]) for n in found if n.endswith(parts[0])]:
            if missing := [stem + part for part in parts if stem + part not in found]:
                raise ValueError(f"{missing[0]}: is missing")
            tensors = [found.pop(stem + part) for part in parts]
            if len({x.shape[1:] for x in tensors}) > 1:
                raise ValueError(f"{stem}{parts[0]}: has another width than {stem}{parts[1]}")
            found[stem + joined] = torch.cat(tensors)
    if not any(name.startswith("v_blocks.") for name in found):
        found = {name: x for name, x in found.items() if not name.startswith("v_final_layer.")}
    return found


def count(state: dict[str, Tensor], group: str) -> int:
    """Return the number of blocks whose names begin with `group`."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{group}.")})


def configuration(state: dict[str, Tensor], shared: int, size: int | None) -> MiTConfig:
    """Return what names and shapes say; `size`, where no positions tell it, is 32. Raises ValueError."""
    try:
        features, channels, patch, _ = state["x_embedder.proj.weight"].shape
        context = [len(state[f"tokens.{name}"]) for name in ("label", "guidance", "start", "time")]
        width, depth = len(state["final_layer.norm.weight"]), count(state, "blocks")
        model = {
            "network": "mit",
            "size": size or 32,
            "channels": channels,
            "classes": len(state["y_embedder.embedding_table.weight"]) - 1,
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": width // len(state["blocks.0.attn.q_norm.weight"]),
            "head_depth": depth - shared,
            "v_head": "v_final_layer.norm.weight" in state,
            "context": context,
            "bottleneck": features if "x_embedder.out.weight" in state else None,
        }
        if "positions" in state:
            model |= {
                "size": patch * math.isqrt(state["positions"].shape[1] - sum(context) - context[2]),
                "output": "x",
            }
            model |= {"rotary": "grid", "learned_positions": True}
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"not a network of iMF or pMF: {error}") from error
    return make(MiTConfig, model, "model")


def read_mit(state: dict[str, Tensor], size: int | None) -> tuple[dict[str, Tensor], MiTConfig, IMF]:
    """Return the weights, their network and their objective. Raises ValueError by name."""
    shared = count({name.removeprefix("net."): x for name, x in state.items()}, "shared_blocks")
    state = rename(state)
    config = configuration(state, shared, size)
    theirs, ours = {name: tuple(x.shape) for name, x in state.items()}, shapes(config)
    for name in sorted(ours.keys() | theirs.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(f"{name}: shape {theirs.get(name)}, expected {ours.get(name)}")
    noise = NOISE.get((config.size >= 512, config.width), 1.0) if config.rotary == "grid" else 1.0
    law = TIMES[config.rotary]
    return state, config, IMF(guidance=GUIDANCE[config.rotary], noise_scale=noise, **law)
