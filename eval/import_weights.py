"""`python -m eval.import_weights FILE --out WEIGHTS`: weights that others have trained, nothing executed.

FILE is a snapshot of TVM (.pkl), or what torch.save wrote of a SiT, of REPA's SiT, of iMF, of pMF or of
FD-loss: a state dict, or a training checkpoint that holds an average of the weights. Which of these it is,
the names in it tell. It is read as data: bounded by the file's size, and refused by name where it holds what
such files do not. One file always gives the same weights.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from eval.import_mit import is_mit, read_mit
from eval.import_official import LATENTS, read_snapshot
from eval.import_sit import SCALE, configuration, convert
from eval.torch_file import read_state
from recipe.dit import DiTConfig, NetworkConfig
from recipe.objectives import FlowMatching
from recipe.restricted import RefusedPickle
from recipe.weights import save_weights

VAE = "stabilityai/sd-vae-ft-{}"


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
TAKES = {
    "TVM": {"guidance"},
    "SiT": {"heads", "convention", "average"},
    "iMF": {"size", "noise_scale", "average"},
    "pMF": {"size", "noise_scale", "average"},
}  # what each kind of file is told beside mean and std


class Imported(NamedTuple):
    """Weights by our names, their network, facts of them, and what to say of them."""

    state: dict[str, Tensor]
    config: NetworkConfig
    facts: dict[str, Any]
    notes: list[str]


def import_weights(path: str | Path, told: Told = NOTHING) -> Imported:
    """Read a file of any kind. Raises OSError, ValueError."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:
        return import_tvm(path, told)
    state, average, unread = read_state(path, told.average)
    try:
        found = (import_mit if is_mit(state) else import_sit)(state, unread, told)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    found.facts["average"] = average
    return found


def import_tvm(path: str | Path, told: Told) -> Imported:
    """Read a released snapshot of TVM, whose data are latents without scaling, or pixels."""
    check_told("TVM", told)
    state, facts = read_snapshot(path)
    if told.guidance is None:
        raise ValueError(f"{path}: --guidance: needed, the w that this network was trained with")
    config = DiTConfig(**facts["model"])
    published = LATENTS.get(config.size) if config.channels == 4 else None
    method = {**facts["method"], "guidance": [told.guidance]}
    return Imported(state, config, about(config, method, told, published), [])


def import_sit(state: dict[str, Tensor], unread: list[str], told: Told) -> Imported:
    """Convert a SiT; one with REPA's projectors is taken for REPA's."""
    check_told("SiT", told)
    convention = told.convention or ("repa" if unread else "sit")
    config = configuration(state, told.heads, convention)
    weights, C = convert(state, config), config.channels
    how = "as told" if told.convention else "assumed"
    notes = [f"time and velocity of {'SiT' if convention == 'sit' else 'REPA'}, {how} (--convention)"]
    facts = about(config, FlowMatching().facts(), told, ([0.0] * C, [1 / SCALE] * C))
    return Imported(weights, config, facts, notes)


def import_mit(state: dict[str, Tensor], unread: list[str], told: Told) -> Imported:
    """Convert iMF on latents, or pMF on pixels in -1..1, plain or finished by FD-loss."""
    weights, config, objective = read_mit(state, told.size)
    kind = "pMF" if config.output == "x" else "iMF"
    check_told(kind, told)
    if told.size not in (None, config.size):
        raise RefusedPickle(f"--size: {told.size}, but its positions are those of {config.size}")
    objective.noise_scale = told.noise_scale or objective.noise_scale
    pixels = [127.5] * config.channels
    published = LATENTS.get(config.size) if config.channels == 4 else None
    published = (pixels, pixels) if config.channels in (1, 3) else published
    notes = [f"{kind}, noise of deviation {objective.noise_scale:g}"]
    if not config.v_head:
        notes.append("no auxiliary head in the file: iMF trains on with the velocity u(x, t, t) instead")
    return Imported(weights, config, about(config, objective.facts(), told, published, "mse"), notes)


def check_told(kind: str, told: Told) -> None:
    """Raise RefusedPickle for an option that says nothing of this kind of file."""
    for name, value in told._asdict().items():
        if name not in TAKES[kind] | {"mean", "std"} and value != getattr(NOTHING, name):
            raise RefusedPickle(f"--{name.replace('_', '-')}: {value} is not for a file of {kind}")


def about(
    config: NetworkConfig,
    method: dict[str, Any],
    told: Told,
    published: tuple[list[float], list[float]] | None,
    vae: str = "ema",
) -> dict[str, Any]:
    """Return the facts of weights beside their network. Raises RefusedPickle.

    published: mean and deviation per channel of what the network was trained on, where the command does not
    give them: of latents without scaling, or, with 1 or 3 channels, of pixels in 0..255.
    """
    C = config.channels
    if told.mean is None and published is None:
        raise RefusedPickle(
            f"a network of {C} channels at {config.size}x{config.size}: the normalisation is known for 4 "
            f"channels at {' or '.join(map(str, LATENTS))} pixels only; give --mean and --std"
        )
    mean, std = published if told.mean is None else (told.mean, told.std)
    for name, values in (("--mean", mean), ("--std", std)):
        if len(values) not in (1, C):
            raise RefusedPickle(f"{name}: {len(values)} numbers for {C} channels")
    column = "image" if C in (1, 3) else "latents"
    encoder = {"name": VAE.format(vae) if C == 4 else "precomputed", "scaling": 1.0}
    normalization = {name: [*v] * (C // len(v)) for name, v in (("mean", mean), ("std", std))}
    names = {"class_names": [], "class_counts": []}
    data = {"column": column, **normalization, **names, "encoder": encoder}
    return {"method": method, "data": data, "average": "ema", "step": None, "train_seconds": None}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.import_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", help="the file that was downloaded")
    add("--out", required=True, help="path of the weights to write, without suffix")
    add("--guidance", type=float, help="the w that a snapshot of TVM was trained with")
    add("--heads", type=int, help="attention heads of a SiT of a size that is not published")
    add("--size", type=int, help="height of what iMF was trained on (default: 32)")
    add(
        "--convention", choices=("sit", "repa"), help="whose time a SiT has (default: REPA's with projectors)"
    )
    add(
        "--average",
        choices=("ema", "net"),
        default="ema",
        help="which weights of a checkpoint (default: ema)",
    )
    add("--noise-scale", type=float, help="deviation of pMF's noise (default: as published for the size)")
    for name in ("mean", "std"):
        text = f"{name} of the training data, one or one per channel (default: as published)"
        add(f"--{name}", type=float, nargs="+", help=text)
    options = vars(parser.parse_args(argv))
    file, out, told = options.pop("file"), options.pop("out"), Told(**options)
    positive = {"guidance": [told.guidance], "noise-scale": [told.noise_scale], "std": told.std or []}
    for name, values in positive.items():
        if not all(value is None or 0 < value < math.inf for value in values):
            parser.error(f"--{name}: {' '.join(map(str, values))} must be positive")
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
