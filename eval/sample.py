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
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from recipe.draws import Stream, keys, uniform
from recipe.networks import AnyNetwork
from recipe.normalizer import Normalizer
from recipe.objectives import Objective, from_facts
from recipe.objectives.base import Condition
from recipe.patches import exact_float32
from recipe.pictures import captioned, grid, to_uint8
from recipe.pretrained import TextEncoder, load_decoder
from recipe.sampler import check_steps, initial_noise, sample
from recipe.settings import Count, Interval, Positive, make
from recipe.text import Prompts, Text, byte_tokens
from recipe.weights import load_weights, newest_weights

DTYPES = ("fp32", "fp64", "amp_bf16")
Seed = Annotated[int, Field(ge=0, le=2**62)]  # sample i has the seed + i, an int64


# ---------------------------------------------------------------- what must be said beside a distance


@dataclass(frozen=True)
class Protocol:
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


def quantize(values: Tensor, rounding: str) -> Tensor:
    """Round pixel values in 0..255 units to uint8, to the `nearest` integer or `down`."""
    return to_uint8(values if rounding == "nearest" else values.floor())


# ---------------------------------------------------------------- weights that make images


class Generator:
    """Weights ready to make images: uint8 (B, C, H, W) from labels and seeds. A folder means its newest.

    interval: the times between which guidance is in force, of weights that take one (`check_interval`).
    dtype: of the network's arithmetic; in fp64 an image does not depend on its batch, in fp32 some pixels
    may change by 1 with the batch size. vae: see recipe/pretrained.py.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: str = "fp32",
        rounding: str = "nearest",
        vae: str | None = None,
    ) -> None:
        exact_float32()
        self.net, self.facts = load_weights(newest_weights(path), device)
        self.device, self.rounding = torch.device(device), rounding
        self.dtype = torch.float64 if dtype == "fp64" else torch.float32
        self.autocast = dtype == "amp_bf16"
        self.net.to(self.dtype)
        self.objective = from_facts(self.facts["method"])
        self.interval: list[float] | None = None
        data = self.facts["data"]
        self.normalizer = Normalizer(data["mean"], data["std"]).to(self.device, self.dtype)
        text = self.net.config.text
        self.prompts = None
        if text is not None:
            prompts = Prompts(text, data.get("text"), self.net.config.null)
            self.prompts = prompts.to(self.device, self.dtype)
        latent = data["column"] == "latents"
        self.decode = load_decoder(data["encoder"], vae, device) if latent else None

    def noise(self, seeds: Tensor) -> Tensor:
        """Return noise (B, C, H, W) from int64 seeds (B,)."""
        config = self.net.config
        shape = config.channels, config.size, config.size
        return initial_noise(seeds.to(self.device), shape, self.dtype)

    def __call__(self, label: Tensor, seeds: Tensor, nfe: int, w: float, text: Text | None = None) -> Tensor:
        """Return images; label, seeds: int64 (B,), the label K stands for none; text: see `from_noise`."""
        return self.from_noise(self.noise(seeds), label, nfe, w, text)

    def from_noise(
        self, noise: Tensor, label: Tensor, nfe: int, w: float, text: Text | None = None
    ) -> Tensor:
        """Return images from noise (B, C, H, W), for labels int64 (B,).

        text: B prompts. A network with prompts takes None for no prompts, and no labels either: it was never
        trained with a label alone. Raises ValueError for a label or a number of steps that cannot be,
        FloatingPointError where the output is not finite.
        """
        net, null = self.net, self.net.config.null
        check_labels(label, null)
        label = label.to(self.device)
        if self.prompts is not None:
            label = torch.full_like(label, null) if text is None else label
            text = self.prompts.empty(len(label)) if text is None else text.to(self.device)
            label = label if net.config.classes else self.prompts.unlabelled(label, text)
            net = self.prompts(net, text)
        if self.interval is not None:
            net = partial(net, interval=tuple(self.interval))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            x0 = sample(net, noise, Condition(label, w, null), nfe, self.objective)
        values = self.normalizer.invert(x0)
        if not values.isfinite().all():
            raise FloatingPointError(f"the network's output is not finite with {nfe} steps at w = {w:g}")
        return quantize(self.decode(values.float()) if self.decode else values, self.rounding)

    def batches(
        self,
        label: Tensor,
        seeds: Tensor,
        nfe: int,
        w: float,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        text: Callable[[Tensor], Text] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images of every world-th batch, beginning with the rank's, and their places in `label`.

        text: from an index to these samples' prompts; None for empty ones.
        """
        for index in torch.arange(len(seeds)).split(batch_size)[rank::world]:
            yield self(label[index], seeds[index], nfe, w, text and text(index)), index

    def encode(self, prompts: list[str], text_encoder: str | None = None) -> Text:
        """Encode prompts for this network; those that are too long are cut, with a warning that counts them.

        text_encoder: of stored embeddings, folder or hub name of the model; None: as the weights say. Raises
        ValueError where it is not the one that the network was trained with.
        """
        config = self.net.config.text
        if config is None:
            raise ValueError("--prompts: these weights take none")
        if config.encoder == "bytes":
            text, cut = byte_tokens(prompts, config.tokens)
        else:
            stored = self.facts["data"]["text"]
            encoder = TextEncoder(text_encoder or stored["encoder"], config.tokens, self.device)
            if encoder.sha256 != stored["sha256"]:
                raise ValueError(
                    f"--text-encoder: {encoder.name} hashes to {encoder.sha256[:12]}, the network was "
                    f"trained with {stored['encoder']}, {stored['sha256'][:12]}"
                )
            text, cut = Text(*map(torch.from_numpy, encoder.encode(prompts))), encoder.cut
        if cut:
            said = f"{cut} of {len(prompts)} prompts are longer than {config.tokens} tokens"
            warnings.warn(said, stacklevel=2)
        return text


def check_labels(label: Tensor, null: int) -> None:
    """Raise ValueError unless all labels are from 0 to `null`, which means none."""
    wrong = label[(label < 0) | (label > null)]
    if len(wrong):
        raise ValueError(f"label: {wrong[0]} must be from 0 to {null}, where {null} means none")


def check_guidance(objective: Objective, w: float) -> None:
    """Warn of a w that the network has not been trained for."""
    low, high = objective.guidance_range
    if not low <= w <= high:
        trained = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        warnings.warn(f"w = {w:g} is outside what {objective.name} was trained for, {trained}", stacklevel=2)


def check_interval(facts: dict[str, Any], interval: list[float] | None) -> None:
    """Raise ValueError for weights that have been trained without a guidance interval, if there is one."""
    network, objective = make(AnyNetwork, facts["model"], "model"), from_facts(facts["method"])
    if interval is not None and not (network.interval and objective.auxiliary):
        raise ValueError(f"interval: {interval} is for iMF on the network mit, not for these weights")


def parse_interval(text: str) -> list[float]:
    """Return two times from text such as `0.4,0.65`. Raises ValueError."""
    try:
        return make(Interval, [float(part) for part in text.split(",")], "--interval")
    except ValueError as error:
        raise ValueError(f"--interval: {text} must be two times such as 0.4,0.65, from 0 to 1") from error


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return `steps` points of the great circle from start to end (C, H, W), both included, all normal noise.

    A straight line would pass through noise of too small a norm, which the network has never seen.
    """
    angle = torch.acos((start * end).sum() / (start.norm() * end.norm()))
    fraction = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[:, None, None, None]
    return (torch.sin((1 - fraction) * angle) * start + torch.sin(fraction * angle) * end) / torch.sin(angle)


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


def parse_labels(text: str | None, generator: Generator) -> Tensor:
    """Return int64 labels for `0,cat,none`: numbers, names of classes, and `none` for no label.

    A name with a comma is quoted, as in CSV. None means the first ten, or no label where the network takes
    prompts. Raises ValueError.
    """
    config = generator.net.config
    names = generator.facts["data"].get("class_names", [])[: config.classes]
    first = range(0 if config.text else min(config.classes, 10))
    known = {str(name): label for label, name in enumerate(names)}
    known |= {"none": config.null, **{str(label): label for label in range(config.classes)}}
    try:
        parts = [str(i) for i in first] or ["none"] if text is None else next(csv.reader([text])) or [""]
    except csv.Error as error:
        raise ValueError(f"--labels: {error}") from error
    for part in parts:
        if part.strip() not in known:
            allowed = f"in 0..{config.classes - 1}, nor `none`" if config.classes else "`none`"
            named = f", nor a class such as {names[0]!r}" if names else ""
            raise ValueError(f"--labels: {part!r} is not {allowed}{named}")
    return torch.tensor([known[part.strip()] for part in parts])


def parse_prompts(given: list[str], labels: str | None, generator: Generator) -> tuple[Tensor, list[str]]:
    """Return a label for each prompt, and the prompts, or the lines of a file. Raises OSError, ValueError."""
    if generator.prompts is None:
        raise ValueError("--prompts: these weights take none")
    file = Path(given[0])
    prompts = file.read_text().splitlines() if len(given) == 1 and file.is_file() else given
    if not prompts:
        raise ValueError(f"--prompts: {file} is empty")
    if not generator.net.config.classes:
        return torch.zeros(len(prompts), dtype=torch.int64), prompts
    chosen = parse_labels(labels, generator) if labels else torch.tensor([])
    if len(chosen) not in (1, len(prompts)):
        raise ValueError(
            f"--labels: one for all prompts, or one for each of {len(prompts)}, since there are classes"
        )
    return chosen.expand(len(prompts)), prompts


def parse_rows(generator: Generator, options: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """Return the labels (R,) that --labels or --prompts ask for, and the R prompts, or none.

    Raises OSError, ValueError.
    """
    if options.prompts:
        return parse_prompts(options.prompts, options.labels, generator)
    labels = parse_labels(options.labels, generator)
    if generator.prompts is not None and (labels != generator.net.config.null).any():
        raise ValueError("--labels: these weights take prompts too, and know no label alone: give --prompts")
    return labels, []


def _check(options: argparse.Namespace) -> None:
    check_steps(options.nfe, "--nfe")
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
    if options.interpolate == options.seed:
        raise ValueError(f"--interpolate: {options.seed} is the seed that the rows start from")
    if grid_wanted and (options.samples or options.protocol):
        raise ValueError(f"--samples and --protocol need --out NAME.npz or a folder, not {out}")
    if options.protocol and (options.labels or options.prompts):
        raise ValueError("--protocol chooses the labels itself: leave out --labels and --prompts")
    if options.prompts and out.suffix == ".npz":
        raise ValueError(f"--prompts: {out} has no place for prompts: give a .png or a folder")


def draw_grid(
    generator: Generator, labels: Tensor, prompts: list[str], w: float, options: argparse.Namespace
) -> np.ndarray:
    """Draw a row for each label or prompt: of other seeds, or on the way from one seed to another."""
    columns, repeated = options.columns, labels.repeat_interleave(options.columns)
    text = generator.encode(prompts, options.text_encoder) if prompts else None
    if options.interpolate is not None:
        ends = generator.noise(torch.tensor([options.seed, options.interpolate]))
        noise = interpolate(ends[0], ends[1], columns).repeat(len(labels), 1, 1, 1)
    else:
        noise = generator.noise(options.seed + torch.arange(len(repeated)))
    images = []
    for index in tqdm(torch.arange(len(repeated)).split(options.batch_size), "sampling", unit="batch"):
        told = None if text is None else Text(*(x[index // columns] for x in text))
        images.append(generator.from_noise(noise[index], repeated[index], options.nfe, w, told).cpu())
    if text is None:
        return grid(torch.cat(images), columns, options.scale)
    rows = []
    for row, prompt in zip(torch.cat(images).split(columns), prompts, strict=True):
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


def draw_set(generator: Generator, w: float, options: argparse.Namespace) -> None:
    """Write samples of labels, prompts or a protocol, as .npz or as a folder of PNGs. Raises ValueError."""
    config, text, prompts = generator.net.config, None, []
    if options.labels or options.prompts or generator.prompts is not None:
        labels, prompts = parse_rows(generator, options)
        each = options.samples or options.columns
        said = f"{each} samples of each of {len(labels)} {'prompts' if prompts else 'labels'}."
        row = torch.arange(len(labels)).repeat_interleave(each)
        labels = labels[row]
    else:
        labels, said = protocol_labels(generator, options)
    if prompts:
        encoded = generator.encode(prompts, options.text_encoder)
        text = lambda index: Text(*(x[row[index]] for x in encoded))  # noqa: E731
    seeds = options.seed + torch.arange(len(labels))
    batches = generator.batches(labels, seeds, options.nfe, w, options.batch_size, text=text)
    bar = tqdm(batches, "sampling", math.ceil(len(labels) / options.batch_size), unit="batch")
    if options.out.suffix == ".npz":
        write_npz(options.out, bar, labels)
    else:
        names = {config.null: "none"} if config.classes or not config.text else {0: "", config.null: "none"}
        told = [names.get(label, str(label)) for label in labels.tolist()]
        asked = [prompts[i] for i in row.tolist()] if prompts else [""] * len(labels)
        write_pngs(options.out, bar, seeds, list(zip(told, asked, strict=True)))
    tqdm.write(said)


def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("weights", help="NAME, NAME.json or NAME.safetensors; of a folder of weights the newest is taken")
    add("--nfe", type=int, default=1, help="network evaluations, i.e. steps (default: %(default)s)")
    add("--w", type=float, help="guidance weight (default: the one of training)")
    add("--interval", help="times between which guidance is in force, 0.4,0.65 (default: all)")
    add("--labels", help="numbers or names of classes, or `none`, with commas (default: the first ten)")
    add("--prompts", nargs="+", help="prompts, or one name of a file that holds one a line")
    add("--text-encoder", help="folder or hub name, for stored embeddings (default: as the weights say)")
    add("--columns", type=int, default=8, help="samples of each row of a grid, or interpolation steps (8)")
    add(
        "--samples",
        type=int,
        help="in a folder or .npz: of each label or prompt (8), or in all",
    )
    add("--protocol", choices=sorted(PROTOCOLS), help="labels, number and rounding (see docs/evaluation.md)")
    add("--seed", type=int, default=0, help="seed of the first sample; each further one adds 1 (0)")
    add("--interpolate", type=int, metavar="SEED", help="the seed that every row of a grid ends at")
    add("--batch-size", type=int, default=64, help="samples drawn at once (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="fp32", help="arithmetic of the network (default: %(default)s)")
    add("--vae", help="folder of a diffusers AutoencoderKL, for latents (default: as the weights say)")
    add("--scale", type=int, default=4, help="side of a pixel in a grid (default: %(default)s)")
    add("--out", type=Path, default=Path("grid.png"), help="NAME.png, NAME.npz, or a folder (grid.png)")
    options = parser.parse_args(arguments)
    try:
        _check(options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rounding = PROTOCOLS[options.protocol or DEFAULT].rounding
        generator = Generator(options.weights, device, options.dtype, rounding, options.vae)
        w = generator.objective.default_w if options.w is None else options.w
        check_guidance(generator.objective, w)
        if options.interval is not None:
            generator.interval = parse_interval(options.interval)
            check_interval(generator.facts, generator.interval)
        if options.out.suffix == ".png":
            picture = draw_grid(generator, *parse_rows(generator, options), w, options)
            Image.fromarray(picture).save(options.out)
        else:
            draw_set(generator, w, options)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error))
    tqdm.write(str(options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
