"""Draw samples: `python -m eval.sample WEIGHTS --nfe 1 --w 2 --labels 0,1,2 --seed 0 --out grid.png`.

Image i of a call has the seed `seed + i` and depends on nothing else: neither batch size nor ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from recipe.data import Normalizer, to_uint8
from recipe.dit import DiT
from recipe.sampler import initial_noise, sample
from recipe.weights import load_weights


class Generator:
    """Weights ready to make images: uint8 (B, C, H, W) from labels and seeds."""

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.net, self.facts = load_weights(path, device)
        self.device = torch.device(device)
        self.normalizer = Normalizer(self.facts["data"]["mean"], self.facts["data"]["std"]).to(self.device)

    @property
    def default_w(self) -> float:
        """The guidance weight of training (the lowest of a range); 1 for flow matching."""
        return self.facts["method"]["guidance"][0]

    def __call__(self, label: Tensor, seeds: Tensor, nfe: int, w: float) -> Tensor:
        """label, seeds: int64 (B,); the label K stands for none."""
        if self.facts["data"]["column"] != "image":
            raise ValueError("these weights make latents: decoding needs the autoencoder they were made with")
        config = self.net.config
        noise = initial_noise(seeds.to(self.device), (config.channels, config.size, config.size))
        x0 = sample(self.net, noise, label.to(self.device), nfe, w, self.facts["method"], config.classes)
        return to_uint8(self.normalizer.invert(x0))

    def batches(
        self, label: Tensor, seeds: Tensor, nfe: int, w: float, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of every world-th batch, beginning with the rank's."""
        parts = list(zip(label.split(batch_size), seeds.split(batch_size), strict=True))
        for part_label, part_seeds in parts[rank::world]:
            yield self(part_label, part_seeds, nfe, w), part_label


def spread_labels(class_counts: list[int], n: int) -> Tensor:
    """n labels in the proportions of class_counts, in order; exactly the counts where n is their sum.

    Unlabelled data (no counts) has label 0, which is also its "no label".
    """
    if not class_counts:
        return torch.zeros(n, dtype=torch.int64)
    shares = torch.tensor(class_counts, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(shares, (torch.arange(n) + 0.5) * float(shares[-1]) / n, right=True)


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


def parse_labels(text: str, net: DiT) -> Tensor:
    """`0,1,2` => int64 labels; `none` is the unconditional index. Raises ValueError."""
    classes = net.config.classes
    labels = [classes if part == "none" else int(part) for part in text.split(",")]
    for label in labels:
        if not 0 <= label <= classes:
            raise ValueError(f"--labels: {label} is not in 0..{classes - 1}, nor `none`")
    return torch.tensor(labels)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw a grid of samples, one row per label.")
    parser.add_argument("weights", help="NAME, NAME.json or NAME.safetensors")
    parser.add_argument("--nfe", type=int, default=1, help="network evaluations (steps)")
    parser.add_argument("--w", type=float, help="guidance weight; default: the one of training")
    parser.add_argument("--labels", help="comma-separated classes or `none`; default: the first ten")
    parser.add_argument("--columns", type=int, default=8, help="samples of each label")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--scale", type=int, default=4, help="pixels of the picture per pixel")
    parser.add_argument("--out", default="grid.png")
    arguments = parser.parse_args()
    try:
        if arguments.nfe < 1:
            raise ValueError(f"--nfe: {arguments.nfe} must be at least 1")
        if arguments.w is not None and arguments.w <= 0:
            raise ValueError(f"--w: {arguments.w} must be positive")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = Generator(arguments.weights, device)
        classes = generator.net.config.classes
        default = ",".join(map(str, range(min(classes, 10)))) or "none"
        labels = parse_labels(arguments.labels or default, generator.net)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    labels = labels.repeat_interleave(arguments.columns)
    seeds = arguments.seed + torch.arange(len(labels))
    w = generator.default_w if arguments.w is None else arguments.w
    batches = generator.batches(labels, seeds, arguments.nfe, w, arguments.batch_size)
    total = -(-len(labels) // arguments.batch_size)
    images = torch.cat([images.cpu() for images, _ in tqdm(batches, "sampling", total, unit="batch")])
    Image.fromarray(grid(images, arguments.columns, arguments.scale)).save(arguments.out)
    tqdm.write(arguments.out)


if __name__ == "__main__":
    main()
