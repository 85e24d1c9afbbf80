"""`python -m eval.import_weights FILE --out WEIGHTS`: weights that others have trained, nothing executed.

FILE is a snapshot of TVM (.pkl), or what torch.save wrote of a SiT, of REPA's SiT, of iMF, of pMF or of
FD-loss: a state dict, or a training checkpoint that holds an average of the weights. Which of these it is,
the names in it tell. It is read as data: bounded by the file's size, and refused by name where it holds what
such files do not. One file always gives the same weights.
"""

from __future__ import annotations

import math
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval import command_line
from eval.torch_file import DAMAGE, SNAPSHOT, read_snapshot, read_state
from recipe.dit import PRESETS, DiTConfig, NetworkConfig, ScalarEmbedder, position_embedding
from recipe.mit import MiTConfig
from recipe.objectives import IMF, FlowMatching
from recipe.restricted import read_file
from recipe.settings import Positive, make
from recipe.weights import save_weights, shapes

Weights = dict[str, Tensor]
Statistics = tuple[list[float], list[float]]  # mean and deviation per channel
# What each kind of file is told beside mean and std.
TAKES = {"TVM": {"guidance"}, "SiT": {"heads", "convention", "average"}}
TAKES |= dict.fromkeys(("iMF", "pMF"), {"size", "noise_scale", "average"})
# Latent side => statistics of unscaled sd-vae-ft-ema latents (TVM's runs, and iMF's).
LATENTS: dict[int, Statistics] = {
    32: ([0.86488, -0.27787343, 0.21616915, 0.3738409], [4.85503674, 5.31922414, 3.93725398, 3.9870003]),
    64: ([1.56, -0.695, 0.483, 0.729], [5.27, 5.91, 4.21, 4.31]),
}
SCALE = 0.18215  # of the latents of sd-vae-ft-ema that SiT is trained on

# Names of iMF and pMF => those of recipe/mit.py, which has one tensor where they have those of JOINED.
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
# Published settings of the objective, and the deviation of pMF's noise by (pixels from 512 on, width).
METHOD = {"iMF": {"guidance": [1.0, 9.0]}, "pMF": {"guidance": [1.0, 8.0], "t_mean": 0.8, "t_std": 0.8}}
NOISE = {(False, 1280): 2.0, (True, 768): 2.0, (True, 1024): 4.0, (True, 1280): 4.0}


class Told(NamedTuple):
    """What the command says of a file beside its name; None where that is up to the file."""

    guidance: float | None = None
    heads: int | None = None
    size: int | None = None
    convention: str | None = None
    average: str = "ema"
    noise_scale: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


NOTHING = Told()


class Imported(NamedTuple):
    """Weights by our names, their network, facts of them, and what to say of them."""

    state: Weights
    config: NetworkConfig
    facts: dict[str, Any]
    notes: list[str]


def import_weights(path: str | Path, told: Told = NOTHING) -> Imported:
    """Read a file of any kind. Raises OSError, and ValueError, which names the file."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:
        with naming(path):
            check_told("TVM", told)
        content = read_file(path, SNAPSHOT)  # which names the file itself
    with naming(path):
        if not zipped:
            return import_tvm(content, told)
        state, average, unread = read_state(path, told.average)
        is_mit = any(".u_heads." in f".{name}" for name in state)
        found = import_mit(state, told) if is_mit else import_sit(state, told, repa=bool(unread))
    found.facts["average"] = average
    return found


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn what is wrong with a file, also where it is damaged, into a ValueError that names it."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{path}: damaged ({str(error)[:200]})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_told(kind: str, told: Told) -> None:
    """Raise ValueError for an option that says nothing of this kind of file."""
    for name, value in told._asdict().items():
        if name not in TAKES[kind] | {"mean", "std"} and value != getattr(NOTHING, name):
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not for a file of {kind}")


def about(
    config: NetworkConfig, method: dict[str, Any], told: Told, published: Statistics | None, vae: str = "ema"
) -> dict[str, Any]:
    """Return the facts of weights beside their network. Raises ValueError.

    published: statistics of what the network was trained on, where the command does not give them: of latents
    without scaling, or, with 1 or 3 channels, of pixels in 0..255.
    """
    C = config.channels
    if told.mean is None and published is None:
        raise ValueError(
            f"a network of {C} channels at {config.size}x{config.size}: the normalisation is known for 4 "
            f"channels at {' or '.join(map(str, LATENTS))} pixels only; give --mean and --std"
        )
    mean, std = published if told.mean is None else (told.mean, told.std)
    for name, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, C):
            raise ValueError(f"{name}: {len(values)} numbers for {C} channels")
    column = "image" if C in (1, 3) else "latents"
    encoder = {"name": f"stabilityai/sd-vae-ft-{vae}" if C == 4 else "precomputed", "scaling": 1.0}
    normalization = {name: [*v] * (C // len(v)) for name, v in (("mean", mean), ("std", std))}
    names = {"class_names": [], "class_counts": []}
    data = {"column": column, **normalization, **names, "encoder": encoder}
    return {"method": method, "data": data, "average": "ema", "step": None, "train_seconds": None}


def published_latents(config: NetworkConfig) -> Statistics | None:
    """Return the statistics of latents of the network's size, None where they are not known."""
    return LATENTS.get(config.size) if config.channels == 4 else None


def checked(state: Weights, config: NetworkConfig, **tolerance: float) -> Weights:
    """Return the weights of a network, without the fixed positions of DiT.

    tolerance: rtol and atol of these positions. Raises ValueError, by name, unless names and shapes are
    exactly the network's.
    """
    theirs, ours = {name: tuple(x.shape) for name, x in state.items()}, shapes(config)
    if isinstance(config, DiTConfig):
        positions = position_embedding(config.width, config.size // config.patch)
        ours["pos_embed"] = tuple(positions.shape)
    for name in sorted(ours.keys() | theirs.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(f"{name}: shape {theirs.get(name)}, expected {ours.get(name)}")
    if "pos_embed" in ours and not torch.allclose(state["pos_embed"], positions, **tolerance):
        raise ValueError("pos_embed: not the fixed sine-cosine embedding of DiT")
    return {name: x for name, x in state.items() if name != "pos_embed"}


def count(state: Weights, group: str) -> int:
    """Return the number of blocks whose names begin with `group`."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{group}.")})


# ---------------------------------------------------------------- TVM, SiT and REPA


def dit_settings(state: Weights, kind: str) -> dict[str, Any]:
    """Return the settings of `DiTConfig` that shapes tell. Raises ValueError."""
    try:
        _, tokens, width = state["pos_embed"].shape
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        model = {
            "size": patch * math.isqrt(tokens),
            "channels": channels,
            "classes": len(state["y_embedder.embedding_table.weight"]) - 1,
            "patch": patch,
            "width": width,
            "depth": count(state, "blocks"),
            "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        }
        if kind == "TVM":
            model["heads"] = width // len(state["blocks.0.attn.q_norm.weight"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a network of {kind}: {error}") from error
    return model


def import_tvm(content: object, told: Told) -> Imported:
    """Convert a released snapshot of TVM, whose data are latents without scaling, or pixels."""
    state, said = read_snapshot(content)
    if told.guidance is None:
        raise ValueError("--guidance: needed, the w that this network was trained with")
    model = dit_settings(state, "TVM") | {"patch_init": "xavier"}
    model["time_init"] = "spectral" if said["time_specinit"] else "normal"
    config = make(DiTConfig, model, "model")
    method = {"objective": "tvm", "scaled": said["do_scale_param"], "detach_jvp": said["detach_jvp"]}
    method["guidance"] = [told.guidance]
    facts = about(config, method, told, published_latents(config))
    return Imported(checked(state, config, rtol=0, atol=1e-6), config, facts, [])


def import_sit(state: Weights, told: Told, repa: bool) -> Imported:
    """Convert a published SiT (arXiv 2401.08740), or one trained by REPA (arXiv 2410.06940).

    SiT's time runs from noise (0) to data (1) and its velocity with it: F(x, t, 0) = -SiT(x, 1 - t). The sign
    goes into the last layer, the time is an option of our network. REPA's SiT has our time and velocity;
    which of the two a file holds, its tensors do not tell. repa: what to assume.
    """
    check_told("SiT", told)
    convention = told.convention or ("repa" if repa else "sit")
    model = dit_settings(state, "SiT")
    width, depth = model["width"], model["depth"]
    published = [p["heads"] for p in PRESETS.values() if (p["width"], p["depth"]) == (width, depth)]
    if told.heads is None and not published:
        raise ValueError(f"--heads: needed, width {width} and depth {depth} are not those of a published SiT")
    model |= {"heads": published[0] if told.heads is None else told.heads, "norm": "layer"}
    model |= {"modulation_norm": False, "qk_norm": False, "reverse_time": convention == "sit"}
    config = make(DiTConfig, model, "model")
    whole = {**state, **last_layer(state, config), **new_embedders(config.width)}
    weights = checked(whole, config, atol=1e-5)
    facts = about(config, FlowMatching().facts(), told, ([0.0], [1 / SCALE]))
    how = "as told" if told.convention else "assumed"
    note = f"time and velocity of {'SiT' if convention == 'sit' else 'REPA'}, {how} (--convention)"
    return Imported(weights, config, facts, [note])


def last_layer(state: Weights, config: DiTConfig) -> Weights:
    """Return the last layer of a SiT, negated where it has its own time, without the variance of a DiT.

    Raises ValueError by name.
    """
    features, rows = (config.patch, config.patch, -1, config.channels), config.patch**2 * config.channels
    sign, found = -1 if config.reverse_time else 1, {}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name not in state or len(state[name]) not in (rows, 2 * rows):
            raise ValueError(f"{name}: does not give {config.channels} channels, nor twice as many")
        found[name] = sign * state[name].unflatten(0, features)[:, :, 0].flatten(0, 2)
    return found


def new_embedders(width: int) -> Weights:
    """Return the embedders of the second time and of guidance, which SiT does not have; their output is zero.

    They are as `DiT.init_weights` makes them, drawn with a fixed seed.
    """
    state, generator = {}, torch.Generator().manual_seed(0)
    for name in ("s_embedder", "guidance_embedder"):
        embedder = ScalarEmbedder(width).requires_grad_(False)
        for parameter in embedder.parameters():
            parameter.zero_()
        embedder.mlp[0].weight.normal_(std=0.02, generator=generator)
        state |= {f"{name}.{key}": x for key, x in embedder.state_dict().items()}
    return state


# ---------------------------------------------------------------- iMF, pMF and FD-loss


def import_mit(state: Weights, told: Told) -> Imported:
    """Convert iMF on latents, or pMF on pixels in -1..1, plain or finished by FD-loss.

    Inference files lack the blocks of the auxiliary head, so that the velocity is u's there.
    """
    renamed = rename(state)
    shared = count({name.removeprefix("net."): x for name, x in state.items()}, "shared_blocks")
    config = make(MiTConfig, mit_settings(renamed, shared, told.size), "model")
    weights = checked(renamed, config)
    kind = "pMF" if config.output == "x" else "iMF"
    check_told(kind, told)
    if told.size not in (None, config.size):
        raise ValueError(f"--size: {told.size}, but its positions are those of {config.size}")
    noise = NOISE.get((config.size >= 512, config.width), 1.0) if kind == "pMF" else 1.0
    objective = IMF(**METHOD[kind], noise_scale=told.noise_scale or noise)
    published = ([127.5], [127.5]) if config.channels in (1, 3) else published_latents(config)
    notes = [f"{kind}, noise of deviation {objective.noise_scale:g}"]
    if not config.v_head:
        notes.append("no auxiliary head in the file: iMF trains on with the velocity u(x, t, t) instead")
    return Imported(weights, config, about(config, objective.facts(), told, published, "mse"), notes)


def rename(state: Weights) -> Weights:
    """Return the tensors by the names of `recipe.mit.MiT`, joined where that has one for several.

    Files differ in how a wrapped layer is called. Raises ValueError for a part of one that is missing, or
    does not fit the others.
    """
    named = [(WRAPPER.sub("", name.removeprefix("net.")), x) for name, x in state.items()]
    shared = count(dict(named), "shared_blocks")
    found: Weights = {}
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


def mit_settings(state: Weights, shared: int, size: int | None) -> dict[str, Any]:
    """Return the settings of `MiTConfig` that names and shapes tell. Raises ValueError.

    shared: blocks below the head; size: of an image where no positions tell it, None is 32.
    """
    try:
        features, channels, patch, _ = state["x_embedder.proj.weight"].shape
        context = [len(state[f"tokens.{name}"]) for name in ("label", "guidance", "start", "time")]
        width, depth = len(state["final_layer.norm.weight"]), count(state, "blocks")
        model = {
            "network": "mit",
            "size": 32 if size is None else size,
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
            image = state["positions"].shape[1] - sum(context) - context[2]
            pixels = {"output": "x", "rotary": "grid", "learned_positions": True}
            model |= {"size": patch * math.isqrt(image), **pixels}
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"not a network of iMF or pMF: {error}") from error
    return model


# ---------------------------------------------------------------- the command


def positive(text: str) -> float:
    """Return a positive number from text. Raises ArgumentTypeError."""
    try:
        return make(Positive, float(text))
    except ValueError as error:
        raise ArgumentTypeError(f"{text} must be positive") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = command_line("eval.import_weights", __doc__)
    add = parser.add_argument
    add("file", help="the file that was downloaded")
    add("--out", required=True, help="path of the weights to write, without suffix")
    add("--guidance", type=positive, help="the w that a snapshot of TVM was trained with")
    add("--heads", type=int, help="attention heads of a SiT of a size that is not published")
    add("--size", type=int, help="height of what iMF was trained on (default: 32)")
    whose = "whose time a SiT has (default: REPA's with projectors)"
    add("--convention", choices=("sit", "repa"), help=whose)
    which = "which weights of a checkpoint (default: %(default)s)"
    add("--average", choices=("ema", "net"), default="ema", help=which)
    noise = "deviation of pMF's noise (default: as published for the size)"
    add("--noise-scale", type=positive, help=noise)
    for name, kind in (("mean", float), ("std", positive)):
        text = f"{name} of the training data, one or one per channel (default: as published)"
        add(f"--{name}", type=kind, nargs="+", help=text)
    options = vars(parser.parse_args(argv))
    file, out, told = options.pop("file"), options.pop("out"), Told(**options)
    if (told.mean is None) != (told.std is None) or not all(map(math.isfinite, told.mean or [])):
        parser.error("--mean and --std: give finite numbers for both")
    try:
        found = import_weights(file, told)
        written = save_weights(out, found.state, found.config, found.facts)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stderr.write("".join(f"{note}\n" for note in found.notes))
    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
