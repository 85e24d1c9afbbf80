"""What `recipe.plan` counts of the objective `frechet` beside the network: decoder, extractors and maps."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from recipe.config import TrainConfig
from recipe.dit import NetworkConfig
from recipe.objectives.frechet import Frechet
from recipe.reference import STATISTICS, read_statistics
from recipe.text import SUMMARY

FP32, FP64 = 4, 8


class Frozen(NamedTuple):
    """A network whose weights are fixed.

    flops: of one sample forward; kept: bytes that autograd keeps of it, in float32.
    """

    flops: float
    kept: float
    parameters: float
    features: int = 0


# By torch's FLOP counter and saved tensors, on meta tensors: torch-fidelity's graph at 299 pixels and
# transformers' Dinov2Model at 224 (published: 5.7 and 81 GFLOP, with a multiplication and addition as one).
PUBLISHED = {
    "inception-2015": Frozen(11.42e9, 0.187e9, 23.9e6, 2048),
    "dinov2-vitl14": Frozen(162.0e9, 0.324e9, 304.4e6, 1024),
}
CLASSIFIER_FEATURES = 64
DECODED = 4  # channels of the latents of Stable Diffusion's autoencoder, the only one that is known here
BACKWARD = 1  # passes' worth: to the input alone
MAP = 17  # F^3 FLOPs of a map: 9 for eigenvalues and vectors (Golub & Van Loan), 8 for products


def decoder(model: NetworkConfig) -> Frozen:
    """Return the cost of the decoder of sd-vae-ft-ema and -mse (diffusers' AutoencoderKL, counted alike)."""
    places = model.size**2
    return Frozen(605.5e6 * places + 2048 * places**2, 1.491e6 * places, 83.7e6)


def feature_count(name: str, reference: str, model: NetworkConfig) -> int | None:
    """Return the number of features of an extractor that `objective.features` names, or None.

    None means that only its weights know; of an image model a file of statistics says it, if there is one.
    """
    kind, _, argument = name.partition(":")
    if kind == "pixels":
        return model.channels * (model.size // int(argument or 1)) ** 2
    if kind == "classifier":
        return CLASSIFIER_FEATURES
    if kind in PUBLISHED:
        return PUBLISHED[kind].features
    with suppress(OSError, ValueError):
        return len(read_statistics(reference)[0]) if Path(reference).suffix in STATISTICS else None
    return None


class Finish:
    """The parts of a finish; without any where another objective is trained."""

    def __init__(self, config: TrainConfig) -> None:
        objective, model = config.objective, config.model
        features = objective.features if isinstance(objective, Frechet) else {}
        self.objective = objective
        counts = {name: feature_count(name, ref, model) for name, ref in features.items()}
        told = (SUMMARY if model.text else model.classes) if features and objective.joint else 0
        self.counts = {name: size and size + told for name, size in counts.items()}
        kinds = [name.partition(":")[0] for name in features]
        self.frozen = [PUBLISHED[kind] for kind in kinds if kind in PUBLISHED]
        self.missing = [n for n, k in zip(features, kinds, strict=True) if k not in (*PUBLISHED, "pixels")]
        if features and model.channels not in (1, 3):
            known = model.channels == DECODED
            self.frozen += [decoder(model)] if known else []
            self.missing += [] if known else ["the decoder"]

    @property
    def sizes(self) -> list[int]:
        """The known numbers of features."""
        return [size for size in self.counts.values() if size]

    def flops(self) -> float:
        """Return the FLOPs of decoder and extractors for one sample in a step, in float32."""
        passes = 1 + BACKWARD + (self.objective.recompute if self.counts else 0)
        return passes * sum(one.flops for one in self.frozen)

    def map_flops(self) -> float:
        """Return the FLOPs of the maps in a step on average, in float64, on each GPU alike."""
        return sum(MAP * size**3 for size in self.sizes) / self.objective.refresh if self.counts else 0

    def frozen_bytes(self, samples: int) -> float:
        """Return the bytes of decoder and extractors, with what autograd keeps in them of a microbatch."""
        return sum(FP32 * one.parameters + samples * one.kept for one in self.frozen)

    def moment_bytes(self) -> float:
        """Return the bytes of moments, sums, maps and roots on each GPU."""
        return FP64 * sum(2 * (size + 1) ** 2 + 2 * size**2 for size in self.sizes)

    def saved_bytes(self) -> int:
        """Return the bytes of moments and maps in a checkpoint."""
        return FP64 * sum((size + 1) ** 2 + size**2 + size + 2 for size in self.sizes)

    def messages(self) -> list[int]:
        """Return the bytes of the sums of each extractor, over which all ranks sum after every step."""
        return [FP64 * (size + 1) ** 2 for size in self.sizes]
