"""Distances between sets of features: everything here works on features, none of it knows about images.

Shapes: N samples, F features, K classes. Features are float64 unless said otherwise.
"""

import statistics
import warnings

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

# The functions below are given the features of all ranks, so torchmetrics must not gather them once more.
ALONE = {"sync_on_compute": False}
SUBSETS = 100  # of the kernel distance
SPLITS = 10  # of the Inception score
NEIGHBOURS = 3  # of precision and recall
AMONG, FOUND = 100, 10  # of retrieval: images to choose from, nearest ones that count
ROWS = 2048  # of features compared at a time


class FeatureMoments(Metric):
    """Mean and covariance of a stream of feature vectors, in memory that does not depend on its length.

    The states are float64 sums (centred moments are not additive), which torchmetrics adds up over ranks: any
    split into batches and ranks gives the same moments up to the order of additions (1e-9 is tested).

    Raw second moments lose log10(mean^2 / variance) of float64's 16 digits; network features lose one or two.
    num_features: F.
    """

    full_state_update = False
    sum_outer: Tensor
    sum: Tensor
    count: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        zeros = torch.zeros(num_features, num_features, dtype=torch.float64)
        self.add_state("sum_outer", zeros, dist_reduce_fx="sum")
        self.add_state("sum", zeros[0].clone(), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add a batch of features (N, F), of any floating-point type."""
        if features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(f"features have shape {tuple(features.shape)}, expected (N, {len(self.sum)})")
        features = features.double()
        self.sum_outer.addmm_(features.T, features)
        self.sum += features.sum(0)
        self.count += len(features)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return mean (F,) and unbiased covariance (F, F) of everything seen.

        Raises ValueError for fewer than two samples, or a feature that is not finite.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {int(self.count)}")
        if not torch.isfinite(self.sum).all():
            raise ValueError("features contain values that are not finite")
        mean = self.sum / self.count
        return mean, (self.sum_outer - torch.outer(self.sum, mean)) / (self.count - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of two Gaussians, in float64 (Dowson, Landau 1982):

        |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1^1/2 cov2 cov1^1/2)^1/2).

    With cov = R R' from a symmetric eigendecomposition, the trace of that root is the sum of the singular
    values of R1' R2: real for singular covariances too, and without roots of squared numbers, whose rounding
    errors of 1e-16 would become 1e-8 for every feature that does not vary.

    Means (F,), covariances (F, F), symmetric; eigenvalues that are rounding errors count as 0. Raises
    ValueError where shapes differ, or a value is not finite.
    """
    shapes = [tuple(x.shape) for x in (mean1, cov1, mean2, cov2)]
    if mean1.ndim != 1 or shapes != [(len(mean1),), (len(mean1),) * 2] * 2:
        raise ValueError(f"means and covariances must be (F,), (F, F), (F,), (F, F); got {shapes}")
    mean1, cov1, mean2, cov2 = (x.to(cov1.device, torch.float64) for x in (mean1, cov1, mean2, cov2))
    if not all(torch.isfinite(x).all() for x in (mean1, cov1, mean2, cov2)):
        raise ValueError("means and covariances must be finite")
    trace_of_root = torch.linalg.matrix_norm(root(cov1).T @ root(cov2), ord="nuc")
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root)


def root(covariance: Tensor) -> Tensor:
    """Return R (F, F) with R R' = covariance, its columns 0 where eigenvalues are 0 but for rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * torch.where(values > 1e-13 * values[-1], values, 0.0).sqrt()


def resampled_distance(
    one: Tensor, other: Tensor | None, count: int, draws: int, seed: int
) -> tuple[float, float]:
    """Return mean and deviation, over `draws`, of the Frechet distance of random rows of two sets.

    `count` rows are of `one` (N, F), as many of `other` (M, F).

    At equal numbers such distances can be compared: that of finite sets grows as they shrink. other: None for
    `count` other rows of `one` (or what is left, if that is less).
    """
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(draws):
        order = torch.randperm(len(one), generator=generator)
        rest = one[order[count : 2 * count]]
        if other is not None:
            rest = other[torch.randperm(len(other), generator=generator)[:count]]
        moments = [moment for x in (one[order[:count]], rest) for moment in (x.mean(0), x.T.cov())]
        distances.append(frechet_distance(*moments))
    return sum(distances) / draws, statistics.pstdev(distances)


def kernel_distance(
    features: Tensor, reference: Tensor, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the kernel distance (KID, Binkowski et al. 2018): unbiased MMD^2, kernel (x.y / F + 1)^3.

    By torchmetrics; its 100 subsets come from `seed` alone, so beside it the order of the rows matters.
    Features (N, F) and reference (M, F), at least `subset_size` long => mean and standard deviation over the
    subsets.
    """
    shortest = min(len(features), len(reference))
    if shortest < subset_size:
        raise ValueError(f"subset_size {subset_size} exceeds the number of samples, {shortest}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(nn.Identity(), SUBSETS, subset_size, **ALONE)
        metric.update(reference, real=True)
        metric.update(features, real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the Inception score (Salimans et al. 2016): exp E KL(p(y|x) || p(y)), by torchmetrics.

    logits: (N, K), for the 2015 graph the outputs without bias; shuffled by `seed` and split into ten parts
    => mean and (unbiased) standard deviation over the parts.
    """
    if len(logits) < SPLITS:
        raise ValueError(f"the Inception score needs at least {SPLITS} samples, got {len(logits)}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(seed)
        metric = InceptionScore(nn.Identity(), splits=SPLITS, **ALONE)
        metric.update(logits)
        mean, std = metric.compute()
    return float(mean), float(std)


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al. 2019), which torchmetrics does not have.

    Precision is the share of samples inside the union of balls around the reference points, each reaching to
    that point's third neighbour in the reference; recall exchanges the roles. Features (N, F) and reference
    (M, F) are compared in blocks, which bounds the memory.
    """
    if min(len(features), len(reference)) <= NEIGHBOURS:
        numbers = f"{len(features)} and {len(reference)}"
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} samples, got {numbers}")
    return _coverage(features, reference), _coverage(reference, features)


def _coverage(points: Tensor, support: Tensor) -> float:
    """Return the share of `points` inside the union of the neighbours' balls around `support`."""
    k = NEIGHBOURS + 1  # a point is its own nearest neighbour
    radii = torch.cat([torch.cdist(part, support).kthvalue(k).values for part in support.split(ROWS)])
    inside = [(torch.cdist(part, support) <= radii).any(1) for part in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())


def retrieval(features: Tensor, real: Tensor, own: Tensor, seed: int) -> float:
    """Return how often a sample's real image is among its ten nearest of 100: that one and random others.

    features: (n, F) of samples; real: (N, F); own: int64 (n,), whose caption each sample was asked for. With
    fewer real images all of them; chance is 0.1.
    """
    generator, count = torch.Generator().manual_seed(seed), min(AMONG, len(real)) - 1
    found = 0
    for point, mine in zip(features, own.tolist(), strict=True):
        others = torch.randperm(len(real) - 1, generator=generator)[:count]
        distance = (real[others + (others >= mine)] - point).norm(dim=1)
        found += int((distance < (real[mine] - point).norm()).sum() < FOUND)
    return found / len(features)


def nearest(points: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances (N,) from points (N, F) to the nearest rows (N,) of `support` (M, F), by blocks."""
    found = []
    for part in points.split(ROWS):
        blocks = [torch.cdist(part, block).min(1) for block in support.split(ROWS)]
        distances, block = torch.stack([b.values for b in blocks]).min(0)
        index = torch.stack([b.indices for b in blocks])[block, torch.arange(len(part))]
        found.append((distances, block * ROWS + index))
    distances, index = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(index)
