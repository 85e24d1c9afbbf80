"""Real images, to measure samples by; `python -m eval.reference SOURCE --extractor NAME --out stats.npz`
writes a file of their statistics, `read_statistics` reads it and those that others publish; with `--against
OTHER` it prints the Frechet distance of two sets of images.

SOURCE is a dataset folder of `streaming_convert` with an image column, or any folder of images; to measure a
distance, SOURCE and OTHER may also be files of statistics.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics.multimodal.clip_score import CLIPScore
from tqdm import tqdm

from eval import command_line
from recipe.features import EXTRACTORS, FeatureExtractor, SmallImageClassifier, load_extractor
from recipe.metrics import frechet_distance, nearest, resampled_distance, retrieval
from recipe.reference import (
    STATISTICS,
    MDSImages,
    content_digest,
    labelled,
    measure,
    statistics_for,
)
from recipe.text import Text, TextConfig
from streaming_convert.images import Opener, Rejected
from streaming_convert.sources import Archive, list_images

Moments = tuple[Tensor, Tensor]  # mean (F,) and covariance (F, F)
PROBED = 1000  # real images at most, drawn at random
FEWEST_PER_FEATURE, FEWEST_PER_CLASS = 5, 10
TOO_MUCH = 0.5  # of what separates the worst case from the best


class ImageFiles(Dataset):
    """Every image below a folder, as RGB, opened as the converter opens it. All must be of one size."""

    def __init__(self, folder: Path) -> None:
        self.files = Archive(str(folder))
        self.names = list_images(self.files)
        self.shape = self[0].shape

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        file = self.files.path / self.names[index]
        try:
            content = self.files.read(self.names[index])
            pixels = Opener().decode(content, lambda said: tqdm.write(f"{file}: {said}"))
        except Rejected as error:
            raise ValueError(f"{file}: not a readable image ({error})") from error
        if index and pixels.shape != self.shape:
            sizes = [f"{width}x{height}" for _, height, width in (pixels.shape, self.shape)]
            raise ValueError(f"{file}: is {sizes[0]} pixels, the first image is {sizes[1]}")
        return torch.from_numpy(pixels)


def open_images(source: str | Path) -> Dataset:
    """Return the images of a dataset folder or image folder, as uint8 tensors (C, H, W).

    Raises FileNotFoundError for an unknown folder, ValueError where it holds no images.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    if not (folder / "index.json").is_file() and (folder / "train" / "index.json").is_file():
        raise ValueError(f"{source}: the dataset is in its splits, so name one of them: {folder / 'train'}")
    return MDSImages(folder) if (folder / "index.json").is_file() else ImageFiles(folder)


class Reference:
    """The real images as the extractor sees them: a folder of them, or a file of statistics.

    digest: see `content_digest`; features: (N, F) if `keep` is set or a floor is wanted, else None; floor:
    mean Frechet distance between random halves of the images, what perfect samples would score, None for a
    file or with floor_splits 0; doubts: see `find_doubts`.
    """

    def __init__(
        self,
        source: str,
        images: Dataset | None,
        extractor: FeatureExtractor,
        keep: bool,
        batch_size: int,
        floor_splits: int,
        seed: int,
    ) -> None:
        self.extractor, self.images = extractor, images
        self.features = self.floor = None
        self.doubts = find_doubts(extractor, images, seed)
        self.digest = content_digest(source, extractor)
        if images is None:
            self.moments = statistics_for(source, extractor)
            return
        keep = keep or floor_splits > 0
        found = measure(images, extractor, batch_size, ["features"] if keep else [])
        self.moments = found.moments()
        self.features = found.rows("features") if keep else None
        if floor_splits:
            half = math.ceil(len(images) / 2)
            self.floor = resampled_distance(self.features, None, half, floor_splits, seed)[0]


# ---------------------------------------------------------------- whether a classifier is to be trusted


def find_doubts(extractor: FeatureExtractor, images: Dataset | None, seed: int) -> list[str]:
    """Return the reasons not to trust a classifier, found on a random part of a dataset folder's images."""
    if not isinstance(extractor, SmallImageClassifier) or not isinstance(images, MDSImages):
        return []
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return doubts(extractor, *labelled(images, order[:PROBED]), len(images))


def doubts(classifier: SmallImageClassifier, images: Tensor, labels: Tensor, total: int) -> list[str]:
    """Return the reasons not to trust the classifier, in sentences; none if nothing speaks against it.

    It can be right about every real image and still look at colours alone: noise of the right colours then
    agrees with its class, and lies near the real images in its features. So it is asked about real images
    with shuffled pixels, too. images: real ones, uint8 (N, C, S, S); labels: (N,); total: how many there are
    in the whole reference.
    """
    counts = labels.bincount()
    counts = counts[counts > 0]
    if len(counts) < 2:
        return ["The reference has one class only, so the classifier has learned nothing."]
    found, features = [], classifier.num_features
    if total < FEWEST_PER_FEATURE * features:
        found.append(f"{total} real images are few for {features} features: distances are mostly chance.")
    if (smallest := round(int(counts.min()) * total / len(labels))) < FEWEST_PER_CLASS:
        found.append(f"The smallest class has about {smallest} real images, too few to learn from.")
    guess = float(counts.max()) / len(labels)  # right by naming the largest class always
    if share_of_way(classifier.accuracy, guess, 1.0) < TOO_MUCH:
        found.append(
            f"The classifier is right about {classifier.accuracy:.3f} of the real images that it has not "
            f"seen; to name the largest class always is right about {guess:.3f}."
        )
    strangers, chance = strangers_of(classifier(images).cpu(), labels)
    if strangers > TOO_MUCH * chance:
        found.append(
            f"For {strangers:.3f} of the real images the nearest other one is of another class; by chance it "
            f"would be {chance:.3f}."
        )
    right = float((classifier.logits(shuffled(images)).argmax(1).cpu() == labels).double().mean())
    if share_of_way(right, guess, classifier.accuracy) > TOO_MUCH:
        found.append(
            f"The classifier names the class of {right:.3f} of the real images from their colours alone, "
            "with their pixels shuffled: noise of the right colours would agree with its class as well."
        )
    return found


def share_of_way(value: float, worst: float, best: float) -> float:
    """Return how far a value is on the way from the worst to the best."""
    return (value - worst) / max(best - worst, 1e-9)


def strangers_of(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the share of rows (N, F) whose nearest other has another label (N,), and that by chance."""
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    strangers = float((labels[distances.argmin(1)] != labels).double().mean())
    shares = labels.bincount().double() / len(labels)
    return strangers, 1 - float(shares.square().sum())


def shuffled(images: Tensor) -> Tensor:
    """Return the images (N, C, H, W) with the pixels of each in a random order."""
    n, channels, height, width = images.shape
    order = torch.rand(n, 1, height * width, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return images.flatten(2).gather(2, order.expand(-1, channels, -1).to(images.device)).view_as(images)


# ---------------------------------------------------------------- held-out images, captions


class HeldOut:
    """Real images that the weights have not seen: is a sample as new as these are, or a copy?

    features: (H, F); near: (H,), their distances to the nearest image of the reference, which holds none of
    them. Distances between sets are means over `draws` random subsets of `count` images on both sides, to be
    compared with what training images score against other training images, and against held-out ones.

    Raises ValueError where more than half of the held-out images are in the reference, or of another shape.
    """

    def __init__(
        self, source: str, reference: Reference, samples: int, batch_size: int, draws: int, seed: int
    ) -> None:
        images = open_images(source)
        shapes = [tuple(pictures[0].shape) for pictures in (images, reference.images)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"held_out: {source} holds images {shapes[0]}, the reference {shapes[1]}")
        found = measure(images, reference.extractor, batch_size, ["features"])
        self.features, self.train = found.rows("features"), reference.features
        self.near = nearest(self.features, self.train)[0]
        # The features of one image in two batches may differ in their last digits.
        known = int((self.near < 1e-4 * self.features.norm(dim=1)).sum())
        if 2 * known > len(self.near):
            raise ValueError(f"held_out: {known} of the {len(self.near)} images are in the reference as well")
        self.digest = content_digest(source, reference.extractor)
        self.count = min(samples, len(self.train) // 2, len(self.near))
        if self.count < 2:
            raise ValueError("held_out: needs 2 held-out images, 2 samples and 4 training images at least")
        self.resampling = (self.count, draws, seed)
        self.floors = {
            "real_to_training": resampled_distance(self.train, None, *self.resampling),
            "real_to_held_out": resampled_distance(self.train, self.features, *self.resampling),
        }

    def compare(self, features: Tensor) -> dict[str, Any]:
        """Score a set of samples by its features (N, F); returns columns of results.jsonl.

        nearer_share: the probability that a sample lies nearer to its nearest training image than a held-out
        image does to its own, ties counting half (the Mann-Whitney statistic; Meehan et al. 2020).
        """
        near = nearest(features, self.train)[0]
        distance = resampled_distance(features, self.features, *self.resampling)[0]
        return {
            "distance_to_training": resampled_distance(features, self.train, *self.resampling)[0],
            "distance_to_held_out": distance,
            **self.floors,
            "ratio_to_held_out": distance / self.floors["real_to_held_out"][0],
            "nearer_share": float(mannwhitneyu(self.near, near).statistic / (len(near) * len(self.near))),
        }


class Captions:
    """The reference's captions as prompts: sample i is asked for what image i shows, and compared with that.

    stored: hash of the text encoder of the reference's embeddings, or None; clip: folder or hub name of a
    CLIP. Raises ValueError where the reference has no captions.
    """

    def __init__(self, images: Dataset | None, samples: int, clip: str | None, seed: int) -> None:
        if not isinstance(images, MDSImages) or images.manifest.caption_bytes is None:
            raise ValueError("prompts: the reference must be a dataset folder with captions")
        self.images, self.seed = images, seed
        self.own = torch.arange(samples) % len(images)
        shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        self.asked = {"own": self.own, "shuffled": shuffled[self.own], "empty": self.own}
        self.stored = (images.manifest.text or {}).get("sha256")
        self.clip = None if clip is None else load_clip(clip)

    def text(self, prompts: str, config: TextConfig, index: Tensor) -> Text:
        """Return what the network is told for these samples: own or shuffled captions."""
        return self.images.text(self.asked[prompts][index], config)

    def see(self, pictures: Tensor, index: Tensor) -> None:
        """Add uint8 samples (B, C, H, W) to the CLIP score, each with its own image's caption."""
        if self.clip is not None:
            captions = [row["caption"] for row in self.images.rows(self.own[index])]
            self.clip.update(list(pictures.cpu().expand(-1, 3, -1, -1)), captions)

    def scores(self, features: Tensor, real: Tensor) -> dict[str, float]:
        """Score samples by their features (n, F) and those of the real images (N, F); returns columns of a
        row.

        retrieval: how often image i is among the 10 nearest of it and 99 others to sample i; chance is 0.1.
        """
        found = {"retrieval": retrieval(features, real, self.own, self.seed)}
        if self.clip is not None:
            found["clip_score"] = float(self.clip.compute())
            self.clip.reset()
        return found


def load_clip(name: str) -> CLIPScore:
    """Make torchmetrics' score with the CLIP of a folder or hub name. Raises ValueError."""
    try:
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(name, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(name)
        return CLIPScore(lambda: (model, processor))
    except Exception as error:  # the hub, safetensors and torch have their own
        raise ValueError(f"clip: cannot load {name}: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------- the command


def read_side(source: str, extractor: FeatureExtractor, args: argparse.Namespace) -> tuple[Moments, int]:
    """Return the moments of a folder's images and their number, or those in a file of statistics and 0."""
    if Path(source).suffix in STATISTICS:
        return statistics_for(source, extractor), 0
    images = open_images(source)
    found = measure(images, extractor, args.batch_size, workers=args.workers)
    if len(images) <= extractor.num_features:
        sys.stderr.write(
            f"warning: {source} holds {len(images)} images, too few for the covariance of "
            f"{extractor.num_features} features: distances come out too large\n"
        )
    return found.moments(), len(images)


def run(args: argparse.Namespace) -> None:
    """Write the statistics and print the distance, as far as asked for. Raises OSError, ValueError."""
    extractor = load_extractor(args.extractor, args.weights, args.device)
    moments, count = read_side(args.source, extractor, args)
    if args.out:
        mean, covariance = (moment.cpu().numpy() for moment in moments)
        about = {"num_samples": count, "extractor": args.extractor, "source": args.source}
        np.savez(args.out, mu=mean, sigma=covariance, **about)
        print(f"wrote the statistics of {count:,} images to {args.out}")
    if args.against:
        other, number = read_side(args.against, extractor, args)
        sides = [
            f"{source} ({f'{images:,} images' if images else 'statistics'})"
            for source, images in ((args.source, count), (args.against, number))
        ]
        distance = frechet_distance(*moments, *other)
        print(f"Frechet distance {distance:.6f}, {args.extractor} features, of {' to '.join(sides)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = command_line("eval.reference", __doc__)
    add = parser.add_argument
    add("source", help="dataset folder, folder of images or (with --against) statistics file")
    add("--against", metavar="OTHER", help="the same, to print the distance of both")
    add("--extractor", choices=sorted(EXTRACTORS), required=True, help="the network of the features")
    add("--weights", help="the extractor's weights; fetched if possible when not given")
    add("--out", help="the .npz to write")
    add("--batch-size", type=int, default=64, help="images at once (64)")
    add("--workers", type=int, default=0, help="processes that decode images")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default here: %(default)s")
    args = parser.parse_args(argv)
    if not (args.out or args.against):
        parser.error("nothing to do: give --out FILE.npz, --against OTHER or both")
    if args.out and not args.out.endswith(".npz"):
        parser.error(f"--out: {args.out} must end in .npz")
    if args.out and Path(args.source).suffix in STATISTICS:
        parser.error(f"--out: {args.source} is a file of statistics already")
    try:
        run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
