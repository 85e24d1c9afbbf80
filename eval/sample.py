"""Draw samples: `python -m eval.sample WEIGHTS --nfe 1 --w 2 --labels 0,1,2 --seed 0 --out grid.png`.

OUT.png is a grid with a row for each label, or for each of --prompts "red heart" "flag: Japan"; OUT.npz holds
arr_0 (N, H, W, C) uint8 and arr_1 (N,) labels, as ADM's evaluator reads them; any other OUT is a folder
of files SEED.png, and of samples.csv: file, seed, label and prompt of each. A folder or .npz holds
--samples of each of --labels or --prompts, or so many in all with the labels of a --protocol. With
--interpolate SEED each row of a grid goes from the noise of --seed to that of SEED. Sample i has the
seed `--seed` + i and depends on nothing else: neither on the batch size nor on the number of ranks.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval import command_line
from recipe.draws import Stream, keys, uniform
from recipe.generator import DTYPES, Generator, Seed
from recipe.pictures import captioned, grid
from recipe.sampler import check_steps
from recipe.settings import Count, Interval, Positive, make

# ---------------------------------------------------------------- what must be said beside a distance


class Protocol(NamedTuple):
    """How samples for a score are drawn.

    samples: their number, 0 for as many as there are real images; labels: a key of `LABELS`; rounding: of
    pixels to uint8, `nearest` or `down`; reference: what the distance is measured to, in words.
    """

    samples: int
    labels: str
    rounding: str
    reference: str


PROTOCOLS = {
    "matched": Protocol(0, "matched", "nearest", "all real images"),
    "tvm": Protocol(50_000, "drawn", "down", "the full training set"),
    "balanced": Protocol(50_000, "balanced", "nearest", "the full training set"),
    "adm": Protocol(50_000, "uniform", "down", "ADM's published statistics"),
}
DEFAULT = "balanced"
LABELS = {
    "matched": "labels in the proportions of the training data",
    "drawn": "labels drawn from the training distribution",
    "balanced": "equally many samples of every class",
    "uniform": "labels drawn uniformly",
}


def describe(name: str, samples: int) -> str:
    """Return a protocol in one line, which is printed with every number."""
    protocol = PROTOCOLS[name]
    usual = f" (the protocol's number is {protocol.samples:,})" if samples != protocol.samples > 0 else ""
    return (
        f"Protocol `{name}`: {samples:,} samples{usual}, {LABELS[protocol.labels]}, "
        f"pixels rounded {protocol.rounding}, against {protocol.reference}."
    )


def choose_labels(name: str, classes: int, class_counts: list[int], seeds: Tensor) -> Tensor:
    """Return the protocol's labels, int64 (n,), for samples with these seeds; 0 where there are no classes.

    Drawn labels depend on the samples' seeds alone, the others are in order. class_counts: training samples
    of each class. Raises ValueError where the protocol needs them and they are not known (an empty list), or
    where it needs a multiple of the classes.
    """
    kind, n = PROTOCOLS[name].labels, len(seeds)
    if classes == 0:
        return torch.zeros_like(seeds)
    if kind == "balanced":
        if n % classes:
            raise ValueError(f"samples: {n} is not a multiple of the {classes} classes, as `balanced` needs")
        return torch.arange(n) % classes
    if kind == "uniform":
        class_counts = [1] * classes
    elif len(class_counts) != classes:
        raise ValueError(
            f"protocol {name} needs the number of training samples of each of the {classes} classes, "
            f"{len(class_counts)} are known"
        )
    if kind == "matched":  # exactly the counts where n is their sum
        quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    else:
        quantiles = uniform(keys(0, torch.zeros_like(seeds), seeds, Stream.LABEL_DROP), 1)[:, 0]
    shares = torch.tensor(class_counts, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(shares, quantiles * shares[-1], right=True)


def parse_interval(text: str) -> list[float]:
    """Return two times from text such as `0.4,0.65`. Raises ValueError."""
    try:
        return make(Interval, [float(part) for part in text.split(",")], "--interval")
    except ValueError as error:
        raise ValueError(f"--interval: {text} must be two times such as 0.4,0.65, from 0 to 1") from error


# ---------------------------------------------------------------- files of samples


def write_pngs(
    folder: Path, batches: Iterable[tuple[Tensor, Tensor]], seeds: Tensor, about: list[tuple[str, str]]
) -> None:
    """Write a file SEED.png for each sample, then samples.csv; about: label and prompt of each, for it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{seed:06d}.png" for seed in seeds.tolist()]
    for images, index in batches:
        for image, i in zip(images.permute(0, 2, 3, 1).cpu().numpy(), index.tolist(), strict=True):
            Image.fromarray(image.squeeze()).save(folder / names[i])
    with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("file", "seed", "label", "prompt"))
        rows.writerows(zip(names, seeds.tolist(), *zip(*about, strict=True), strict=True))


def write_npz(path: Path, batches: Iterable[tuple[Tensor, Tensor]], labels: Tensor) -> None:
    """Write arr_0 (N, H, W, C) uint8 and arr_1 (N,) int64, batch by batch: 50,000 images need no memory."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for position, (images, _) in enumerate(batches):
                pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                if position == 0:
                    shape = (len(labels), *pixels.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(pixels.tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy())


def read_labels(text: str | None) -> list[str] | None:
    """Return the labels of `0,cat,none`; a name with a comma is quoted, as in CSV. Raises ValueError."""
    if text is None:
        return None
    try:
        return [part.strip() for part in next(csv.reader([text]), [""])]
    except csv.Error as error:
        raise ValueError(f"labels: {error}") from error


def read_prompts(given: list[str] | None) -> list[str] | None:
    """Return the prompts, or the lines of the one file that is named instead. Raises OSError, ValueError."""
    if not given or len(given) > 1 or not Path(given[0]).is_file():
        return given or None
    prompts = Path(given[0]).read_text(encoding="utf-8").splitlines()
    if not prompts:
        raise ValueError(f"prompts: {given[0]} is empty")
    return prompts


def _check(options: argparse.Namespace) -> None:
    check_steps(options.nfe, "--nfe")
    if options.interval is not None:
        options.interval = parse_interval(options.interval)
    kinds = dict.fromkeys(("columns", "batch_size", "scale", "samples"), Count)
    kinds |= {"w": Positive, "seed": Seed, "interpolate": Seed}
    for name, kind in kinds.items():
        if (value := getattr(options, name)) is not None:
            make(kind, value, f"--{name.replace('_', '-')}")
    out, grid_wanted = options.out, options.out.suffix == ".png"
    if out.suffix not in (".png", ".npz") and re.fullmatch(r"\.[A-Za-z]\w*", out.suffix) and not out.is_dir():
        raise ValueError(f"--out: {out} ends in {out.suffix}: give .png, .npz, or a folder (no suffix)")
    if not out.parent.is_dir():
        raise ValueError(f"--out: folder {out.parent} does not exist")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty")
    if options.interpolate is not None and not grid_wanted:
        raise ValueError(f"--interpolate makes a grid: --out {out} must end in .png")
    if grid_wanted and (options.samples or options.protocol):
        raise ValueError(f"--samples and --protocol need --out NAME.npz or a folder, not {out}")
    if options.protocol and (options.labels or options.prompts):
        raise ValueError("--protocol chooses the labels itself: leave out --labels and --prompts")
    if options.prompts and out.suffix == ".npz":
        raise ValueError(f"--prompts: {out} has no place for prompts: give a .png or a folder")


def draw_grid(generator: Generator, options: argparse.Namespace) -> np.ndarray:
    """Return a picture (H, W, 3) with a row of samples for each label, or for each prompt, and that below."""
    labels, prompts, columns = read_labels(options.labels), read_prompts(options.prompts), options.columns
    keys = ("nfe", "w", "interval", "seed", "interpolate", "batch_size")
    how = {key: getattr(options, key) for key in keys}
    images = generator.sample(labels, prompts, columns, **how, progress=True)
    images = images.transpose(0, 3, 1, 2)
    if not prompts:
        return grid(images, columns, options.scale)
    rows = []
    for row, prompt in zip(np.split(images, len(prompts)), prompts, strict=True):
        strip = grid(row, columns, options.scale).transpose(2, 0, 1)
        rows.append(captioned(strip, prompt).transpose(1, 2, 0))
    return np.concatenate(rows)


def protocol_labels(generator: Generator, options: argparse.Namespace) -> tuple[Tensor, str]:
    """Return the labels of a protocol's samples, and a line that describes them. Raises ValueError."""
    protocol = options.protocol or DEFAULT
    class_counts = generator.facts["data"].get("class_counts", [])
    own = (PROTOCOLS[protocol].samples or sum(class_counts)) if options.protocol else 0
    count = options.samples or own
    if count == 0:
        raise ValueError(
            f"--samples: say how many, or --protocol NAME for the protocol's own number "
            f"({DEFAULT}: {PROTOCOLS[DEFAULT].samples:,}; matched: as many as the weights know real images)"
        )
    seeds = options.seed + torch.arange(count)
    labels = choose_labels(protocol, generator.net.config.classes, class_counts, seeds)
    return labels, describe(protocol, count)


def draw_set(generator: Generator, options: argparse.Namespace) -> None:
    """Write samples of labels, prompts or a protocol, as .npz or as a folder of PNGs. Raises ValueError."""
    w, interval = generator.guidance(options.w, options.interval)
    prompts, text = read_prompts(options.prompts), None
    if options.labels or prompts or generator.prompts is not None:
        each = options.samples or options.columns
        labels, text = generator.asked(read_labels(options.labels), prompts, each)
        said = f"{each} samples of each of {len(labels) // each} {'prompts' if prompts else 'labels'}."
    else:
        labels, said = protocol_labels(generator, options)
    seeds = options.seed + torch.arange(len(labels))
    batches = generator.batches(
        labels, seeds, options.nfe, w, options.batch_size, text=text, interval=interval
    )
    bar = tqdm(batches, "sampling", math.ceil(len(labels) / options.batch_size), unit="batch")
    if options.out.suffix == ".npz":
        write_npz(options.out, bar, labels)
    else:
        config = generator.net.config
        names = {config.null: "none"} if config.classes or not config.text else {0: "", config.null: "none"}
        told = [names.get(label, str(label)) for label in labels.tolist()]
        asked = [prompts[i // each] for i in range(len(labels))] if prompts else [""] * len(labels)
        write_pngs(options.out, bar, seeds, list(zip(told, asked, strict=True)))
    tqdm.write(said)


def as_option(message: str) -> str:
    """Return an error of `Generator` that begins with an argument's name with that of the option instead."""
    names = r"^(labels|prompts|text_encoder|vae|interpolate|interval)(?=:)"
    return re.sub(names, lambda name: f"--{name[0]}".replace("_", "-"), message)


def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = command_line("eval.sample", __doc__)
    add = parser.add_argument
    add("weights", help="NAME, NAME.json or NAME.safetensors; of a folder of weights the newest is taken")
    add("--nfe", type=int, default=1, help="network evaluations, i.e. steps (default: %(default)s)")
    add("--w", type=float, help="guidance weight (default: the one of a finish, or of training)")
    add("--interval", help="times between which that is in force, 0.4,0.65 (default: of a finish, or 0,1)")
    add("--labels", help="numbers or names of classes, or `none`, with commas (default: the first ten)")
    add("--prompts", nargs="+", help="prompts, or one name of a file that holds one a line")
    add("--text-encoder", help="folder or hub name, for stored embeddings (default: as the weights say)")
    add("--columns", type=int, default=8, help="samples of each row of a grid, or interpolation steps (8)")
    add("--samples", type=int, help="in a folder or .npz: of each label or prompt (8), or in all")
    add("--protocol", choices=sorted(PROTOCOLS), help="labels, number and rounding (see docs/evaluation.md)")
    add("--seed", type=int, default=0, help="seed of the first sample; each further one adds 1 (0)")
    add("--interpolate", type=int, metavar="SEED", help="the seed that every row of a grid ends at")
    add("--batch-size", type=int, default=64, help="samples drawn at once (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp32", help="arithmetic of the network (default: %(default)s)")
    add("--vae", help="folder of an autoencoder of diffusers, for latents (default: as the weights say)")
    add("--scale", type=int, default=4, help="side of a pixel in a grid (default: %(default)s)")
    add("--out", type=Path, default=Path("grid.png"), help="NAME.png, NAME.npz, or a folder (grid.png)")
    options = parser.parse_args(arguments)
    try:
        _check(options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rounding = PROTOCOLS[options.protocol or DEFAULT].rounding
        models = options.vae, options.text_encoder
        generator = Generator(options.weights, device, options.dtype, rounding, *models)
        if options.out.suffix == ".png":
            Image.fromarray(draw_grid(generator, options)).save(options.out)
        else:
            draw_set(generator, options)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(as_option(str(error)))
    tqdm.write(str(options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
