"""Draw samples: `python -m eval.sample WEIGHTS --nfe 1 --w 2 --labels 0,1,2 --seed 0 --out grid.png`.

OUT.png is a grid with a row for each label; OUT.npz holds arr_0 (N, H, W, C) uint8 and arr_1 (N,) labels, as
ADM's evaluator reads them; any other OUT is a folder of N files SEED.png. N comes from --samples. With
--interpolate SEED each row goes from the noise of --seed to that of SEED. Sample i has the seed `--seed` + i
and depends on nothing else: neither on the batch size nor on the number of ranks.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.decode import load_decoder
from eval.protocols import PROTOCOLS, choose_labels, describe, quantize
from recipe.data import Normalizer
from recipe.dit import DiT
from recipe.sampler import initial_noise, sample
from recipe.weights import load_weights

DTYPES = ("fp32", "fp64", "amp_bf16")


class Generator:
    """Weights ready to make images: uint8 (B, C, H, W) from labels and seeds.

    dtype: of the network's arithmetic; in fp64 an image does not depend on its batch, in fp32 some pixels
    may change by 1 with the batch size. vae: see `load_decoder`.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: str = "fp32",
        rounding: str = "nearest",
        vae: str | None = None,
    ) -> None:
        self.net, self.facts = load_weights(path, device)
        self.device, self.rounding = torch.device(device), rounding
        self.dtype = torch.float64 if dtype == "fp64" else torch.float32
        self.autocast = dtype == "amp_bf16"
        self.net.to(self.dtype)
        data = self.facts["data"]
        self.normalizer = Normalizer(data["mean"], data["std"]).to(self.device, self.dtype)
        latent = data["column"] == "latents"
        self.decode = load_decoder(data["encoder"], vae, device) if latent else None

    @property
    def default_w(self) -> float:
        """The guidance weight of training (the lowest of a range); 1 for flow matching."""
        return self.facts["method"]["guidance"][0]

    def noise(self, seeds: Tensor) -> Tensor:
        """(B, C, H, W) from int64 seeds (B,)."""
        config = self.net.config
        shape = (config.channels, config.size, config.size)
        return initial_noise(seeds.to(self.device), shape, self.dtype)

    def __call__(self, label: Tensor, seeds: Tensor, nfe: int, w: float) -> Tensor:
        """label, seeds: int64 (B,); the label K stands for none."""
        return self.from_noise(self.noise(seeds), label, nfe, w)

    def from_noise(self, noise: Tensor, label: Tensor, nfe: int, w: float) -> Tensor:
        """noise: (B, C, H, W), label: int64 (B,)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            method, null = self.facts["method"], self.net.config.classes
            x0 = sample(self.net, noise, label.to(self.device), nfe, w, method, null)
        values = self.normalizer.invert(x0)
        if not values.isfinite().all():
            raise FloatingPointError(f"the network's output is not finite with {nfe} steps at w = {w:g}")
        return quantize(self.decode(values.float()) if self.decode else values, self.rounding)

    def batches(
        self, label: Tensor, seeds: Tensor, nfe: int, w: float, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, index) of every world-th batch, beginning with the rank's; index: which of the samples."""
        for index in torch.arange(len(seeds)).split(batch_size)[rank::world]:
            yield self(label[index], seeds[index], nfe, w), index


def check_guidance(facts: dict, w: float) -> None:
    """Warns of a w that a TVM network has not been trained for; flow matching takes any."""
    trained = facts["method"]["guidance"]
    if facts["method"]["objective"] == "tvm" and not min(trained) <= w <= max(trained):
        warnings.warn(f"w = {w:g} is outside what the network was trained for, {trained}", stacklevel=2)


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """`steps` points of the great circle from start to end (C, H, W), ends included, normal noise throughout.

    A straight line would pass through noise of too small a norm, which the network has never seen.
    """
    angle = torch.acos((start * end).sum() / (start.norm() * end.norm()))
    fraction = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[:, None, None, None]
    return (torch.sin((1 - fraction) * angle) * start + torch.sin(fraction * angle) * end) / torch.sin(angle)


def grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """uint8 images (N, C, H, W), C 1 or 3 => one white-framed picture (rows, columns, 3), row by row."""
    images = images.expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rows = -(-len(images) // columns)
    height, width = images.shape[2] + gap, images.shape[3] + gap
    picture = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = gap + i // columns * height, gap + i % columns * width
        picture[top : top + height - gap, left : left + width - gap] = image
    return picture


def write_pngs(folder: Path, batches: Iterable[tuple[Tensor, Tensor]], seeds: Tensor) -> None:
    """One file SEED.png for each sample."""
    folder.mkdir(parents=True, exist_ok=True)
    for images, index in batches:
        for image, seed in zip(images.permute(0, 2, 3, 1).cpu().numpy(), seeds[index].tolist(), strict=True):
            Image.fromarray(image.squeeze()).save(folder / f"{seed:06d}.png")


def write_npz(path: Path, batches: Iterable[tuple[Tensor, Tensor]], labels: Tensor) -> None:
    """arr_0 (N, H, W, C) uint8 and arr_1 (N,) int64, written batch by batch: 50,000 images need no memory."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for position, (images, _) in enumerate(batches):
                pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                if position == 0:
                    header = {
                        "descr": "|u1",
                        "fortran_order": False,
                        "shape": (len(labels), *pixels.shape[1:]),
                    }
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(pixels.tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy())


def parse_labels(text: str, net: DiT) -> Tensor:
    """`0,1,2` => int64 labels; `none` is the unconditional index. Raises ValueError."""
    classes = net.config.classes
    known = {"none": classes, **{str(label): label for label in range(classes)}}
    for part in text.split(","):
        if part.strip() not in known:
            raise ValueError(f"--labels: {part!r} is not in 0..{classes - 1}, nor `none`")
    return torch.tensor([known[part.strip()] for part in text.split(",")])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", help="NAME, NAME.json or NAME.safetensors")
    parser.add_argument("--nfe", type=int, default=1, help="network evaluations (steps)")
    parser.add_argument("--w", type=float, help="guidance weight; default: the one of training")
    parser.add_argument("--labels", help="comma-separated classes or `none`; default: the first ten")
    parser.add_argument(
        "--columns", type=int, default=8, help="samples of each label, or interpolation steps"
    )
    parser.add_argument("--samples", type=int, help="for .npz and folders; default: the protocol's number")
    parser.add_argument(
        "--protocol", choices=sorted(PROTOCOLS), help="labels and rounding; default: balanced"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interpolate", type=int, metavar="SEED", help="the seed that every row ends at")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--vae", help="folder of a diffusers AutoencoderKL; default: as the weights say")
    parser.add_argument("--scale", type=int, default=4, help="pixels of a grid per pixel")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help=".png, .npz or a folder")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("nfe", "columns", "batch_size", "scale", "samples", "w"):
        value = getattr(options, name)
        option = f"--{name.replace('_', '-')}"
        if value is not None and not (0 < value < math.inf if name == "w" else value >= 1):
            raise ValueError(f"{option}: {value} must be {'positive' if name == 'w' else 'at least 1'}")
    grid_only = options.interpolate is not None or options.labels is not None
    if options.out.suffix != ".png" and grid_only:
        raise ValueError(f"--labels and --interpolate make a grid: --out {options.out} must end in .png")
    if not options.out.parent.is_dir():
        raise ValueError(f"--out: folder {options.out.parent} does not exist")
    if options.out.is_dir() and any(options.out.iterdir()):
        raise ValueError(f"--out: {options.out} is not empty")
    if options.interpolate == options.seed:
        raise ValueError(f"--interpolate: {options.seed} is the seed that the rows start from")
    if options.out.suffix == ".png" and (options.samples or options.protocol):
        raise ValueError(f"--samples and --protocol need --out NAME.npz or a folder, not {options.out}")


def draw_grid(generator: Generator, labels: Tensor, w: float, options: argparse.Namespace) -> np.ndarray:
    """One row for each label: other seeds, or the way from one seed to another."""
    columns = options.columns
    repeated = labels.repeat_interleave(columns)
    if options.interpolate is not None:
        ends = generator.noise(torch.tensor([options.seed, options.interpolate]))
        noise = interpolate(ends[0], ends[1], columns).repeat(len(labels), 1, 1, 1)
    else:
        noise = generator.noise(options.seed + torch.arange(len(repeated)))
    parts = list(zip(noise.split(options.batch_size), repeated.split(options.batch_size), strict=True))
    bar = tqdm(parts, "sampling", unit="batch")
    images = [generator.from_noise(part, label, options.nfe, w).cpu() for part, label in bar]
    return grid(torch.cat(images), columns, options.scale)


def draw_set(generator: Generator, w: float, protocol: str, options: argparse.Namespace) -> None:
    """Samples of a protocol, as .npz or as a folder of PNGs."""
    class_counts = generator.facts["data"].get("class_counts", [])
    count = options.samples or PROTOCOLS[protocol].samples or sum(class_counts)
    if count == 0:
        raise ValueError(f"--samples: needed, as the weights do not say what number {protocol} means")
    seeds = options.seed + torch.arange(count)
    labels = choose_labels(protocol, generator.net.config.classes, class_counts, seeds)
    batches = generator.batches(labels, seeds, options.nfe, w, options.batch_size)
    bar = tqdm(batches, "sampling", math.ceil(count / options.batch_size), unit="batch")
    if options.out.suffix == ".npz":
        write_npz(options.out, bar, labels)
    else:
        write_pngs(options.out, bar, seeds)
    tqdm.write(describe(protocol, count))


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    protocol = options.protocol or "balanced"
    try:
        _check(options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rounding = PROTOCOLS[protocol].rounding
        generator = Generator(options.weights, device, options.dtype, rounding, options.vae)
        classes = generator.net.config.classes
        default = ",".join(map(str, range(min(classes, 10)))) or "none"
        labels = parse_labels(options.labels or default, generator.net)
        w = generator.default_w if options.w is None else options.w
        check_guidance(generator.facts, w)
        if options.out.suffix == ".png":
            Image.fromarray(draw_grid(generator, labels, w, options)).save(options.out)
        else:
            draw_set(generator, w, protocol, options)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error))
    tqdm.write(str(options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
