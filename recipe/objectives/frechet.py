"""The Frechet distance of samples to real images as an objective (arXiv 2604.28190): it finishes a generator
that exists, from the statistics of features alone, without real images, teacher, adversary or derivative.

For an extractor phi of pixels let (mu_r, S_r) be mean and covariance of phi over real images, (mu, S) running
ones over samples. Between these Gaussians the optimal transport map is M(y) = mu_r + T (y - mu) with

    T = R (R' S R)^-1/2 R',   R R' = S_r,

and FD = |mu - mu_r|^2 + tr(S + S_r) - 2 tr (R' S R)^1/2 has the gradient dFD/dS = 1 - T. So the gradient of
FD is that of a regression of each sample onto where the map takes it, and the mean of that is FD itself:

    loss_i = sum over extractors of |phi(x_i) - sg M(phi(x_i))|^2 / (FD + epsilon)

This says nothing of what a sample was asked for. In the joint form phi also holds the label or the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from composer.utils import dist
from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recipe.features import FeatureExtractor
from recipe.metrics import root
from recipe.objectives.base import Condition, Draw, Loss, Network, Objective, Pass, Term
from recipe.objectives.flow_matching import FlowMatching
from recipe.sampler import generate
from recipe.settings import SOME, BelowOne, ConfigError, Count, Interval, LocalPath, Positive, Says, Share
from recipe.text import Text, summary

FLAT = 1e-12  # eigenvalues of R' S R below this share of the largest are taken for 0
KNOWN = re.compile(
    f"pixels(:{SOME})?|classifier:{SOME}|(inception-2015|dinov2-vitl14)(:.*)?|image-model:.+"
)  # extractors, and their arguments behind a colon


def known(features: dict[str, str]) -> dict[str, str]:
    """Return extractors that can be matched. Raises ValueError for any other."""
    if not all(map(KNOWN.fullmatch, features)):
        raise ValueError
    return features


Features = Annotated[
    dict[str, LocalPath],
    AfterValidator(known),
    Says(
        "must name what to match: pixels or pixels:POOL, classifier:SEED (from 1: 0 is the one that scores), "
        "inception-2015, dinov2-vitl14 or image-model:FOLDER, each with a local dataset folder, or a file of "
        "statistics, of real images"
    ),
]


def condition(label: Tensor, text: Text | None, null: int) -> Tensor:
    """Return what is asked for, by a prompt or else by a label (B,) of 0..null-1, in float64 (B, E)."""
    return nn.functional.one_hot(label, null + 1)[:, :null].double() if text is None else summary(text)


def weigh(
    mean: Tensor, covariance: Tensor, size: int, joint: float, dropped: float
) -> tuple[Tensor, Tensor, float]:
    """Weigh the conditions of real images, which stand behind `size` features, by k; return moments and k.

    joint: root of the trace of their covariance, as a share of the features'; dropped: how many have the mean
    one instead of their own. Raises ValueError where all are the same.
    """
    variance, behind = covariance.diagonal(), torch.arange(len(mean), device=mean.device) >= size
    if not variance[behind].any():
        raise ValueError("objective.joint needs more than one label or caption")
    k = joint * float((variance[~behind].sum() / variance[behind].sum()).sqrt())
    scale = torch.where(behind, k, torch.ones_like(mean))
    told = 1 - dropped * (behind[:, None] | behind)
    return mean * scale, covariance * told * scale.outer(scale), k


class Match(nn.Module):
    """What one extractor sees of real images and of samples, and the map from the latter to the former.

    moments: float64 (F + 1, F + 1), running mean over samples of z z' with z = (phi - mu_r, 1); sums: the
    same summed since the last fold; transport: T; centre: mu - mu_r and distance: FD when T was computed;
    unreached: the variance of real images along which samples have none, so that no map reaches it. The
    extractor and the real images' statistics are not saved. k: of the conditions behind the features, if any.
    """

    def __init__(self, extractor: FeatureExtractor, mean: Tensor, covariance: Tensor, k: float = 0) -> None:
        super().__init__()
        self.k = k
        self.extractor = extractor  # not a module, so neither sharded nor saved
        size, mean = len(mean), mean.double()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("root", root(covariance.double()), persistent=False)
        self.register_buffer("sums", mean.new_zeros(size + 1, size + 1), persistent=False)
        self.register_buffer("moments", torch.zeros_like(self.sums))
        self.register_buffer("transport", mean.new_zeros(size, size))
        self.register_buffer("centre", torch.zeros_like(mean))
        self.register_buffer("distance", mean.new_zeros(()))
        self.register_buffer("unreached", mean.new_zeros(()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Match:
        """Move to other devices and stay float64, whatever type the model gets."""
        return super()._apply(lambda x: x.to(fn(x).device), recurse)

    def join(self, features: Tensor, told: Tensor, dropped: Tensor) -> Tensor:
        """Return features (B, F) and conditions (B, E) behind them; where dropped (B,) the mean one."""
        mean = self.mean[features.shape[1] :]
        return torch.cat([features, torch.where(dropped[:, None], mean, self.k * told)], 1)

    def cost(self, features: Tensor) -> Tensor:
        """Return |phi - sg M(phi)|^2 of features (B, F), plus a constant that makes its mean FD: (B,)."""
        offset = features.double() - self.mean
        target = (offset.detach() - self.centre) @ self.transport
        return (offset - target).square().sum(1) + self.unreached

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Add features (B, F) of samples to the sums."""
        z = nn.functional.pad(features.double() - self.mean, (0, 1), value=1)
        self.sums.addmm_(z.T, z)

    @torch.no_grad()
    def fold(self, decay: float) -> None:
        """Blend the sums of all ranks into the moments and begin new ones; all ranks call it."""
        dist.all_reduce(self.sums)
        self.moments.lerp_(self.sums / self.sums[-1, -1], 1 - decay)
        self.sums.zero_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the map from the moments; where S is singular, from its range alone."""
        self.centre.copy_(self.moments[-1, :-1])
        covariance = self.moments[:-1, :-1] - self.centre.outer(self.centre)
        product = self.root.T @ covariance @ self.root
        values, vectors = torch.linalg.eigh((product + product.T) / 2)
        reached = values > FLAT * values[-1]
        images = self.root @ vectors
        half = images[:, reached] * values[reached] ** -0.25
        self.transport.copy_(half @ half.T)
        self.unreached.copy_(images[:, ~reached].square().sum())
        variances = covariance.trace() + self.root.square().sum()
        self.distance.copy_(self.centre.square().sum() + variances - 2 * values[reached].sqrt().sum())


@dataclass
class Frechet(Objective):
    """Finish weights of any objective by the Frechet distance of their samples."""

    name: Literal["frechet"] = Field("frechet", description="Frechet distance, from weights that exist.")
    label_dropout: Share = Field(0.0, description="Share of samples that are drawn without label.")
    features: Features = Field(
        {},
        description="Extractors, each with the real images to be matched on it, a dataset folder or a file "
        "of statistics (eval.reference), instead of all that a base names: {classifier:1: data/digits/train, "
        "pixels: data/digits/train}.",
    )
    w: Positive | None = Field(None, description="Guidance weight of the samples; null is that of training.")
    interval: Interval | None = Field(
        None,
        description="Guidance interval of the samples, for weights that take one; null is guidance at every "
        "time.",
    )
    nfe: int = Field(1, ge=1, le=100, description="Number of sampling steps, differentiated through.")
    decay: BelowOne = Field(0.999, description="Decay of the running moments in a step.")
    population: int = Field(50_000, ge=2, le=10**8, description="Number of samples of the first moments.")
    refresh: Count = Field(10, description="Number of steps between two maps from the running moments.")
    epsilon: Positive = Field(0.01, description="Distance below which an extractor counts less.")
    joint: Positive | None = Field(
        None,
        description="Size of the condition (the prompt, or the label of a network without prompts) that is "
        "matched together with the features, as a multiple of theirs; null matches features alone, so that "
        "the condition gets no gradient.",
    )
    vae: LocalPath | None = Field(
        None, description="Folder or hub name of the autoencoder of latents; null is the dataset's."
    )
    recompute: bool = Field(
        False, description="Whether the backward pass computes decoder and extractors again, to save memory."
    )

    finishes: ClassVar[bool] = True
    base: ClassVar[Objective] = FlowMatching()  # of the weights; until it begins, as in a plan, any
    matches: ClassVar[dict[str, Match]] = {}
    origin: ClassVar[dict[str, Any] | None] = None  # see recipe/finish.py

    @model_validator(mode="after")
    def combinations(self) -> Frechet:
        """Raise ConfigError where nothing is matched, or flow matching comes first."""
        if not self.features:
            raise ConfigError("features: must be given")
        if self.joint and any(path.endswith((".npz", ".pkl")) for path in self.features.values()):
            raise ConfigError("joint: needs dataset folders in features, statistics tell no labels")
        if self.flow_matching_first is not None:
            raise ConfigError("flow_matching_first: frechet goes on from weights that are trained")
        if self.noise_scale != 1:
            raise ConfigError(
                f"noise_scale: {self.noise_scale:g} is up to the weights that frechet goes on from"
            )
        return self

    def begin(
        self, base: Objective, matches: dict[str, Match], pixels: Callable[[Tensor], Tensor]
    ) -> Frechet:
        """Set what is known only when a run begins, and return self.

        base: the objective of the weights; matches: by the keys of `features`; pixels: from the network's
        output (B, C, H, W) to pixel values in 0..255.
        """
        self.base, self.matches = base, matches
        self.pixels = pixels
        return self

    @property
    def guidance_input(self) -> bool:
        """Whether the network is told beta, as the weights have it; the properties below are theirs, too."""
        return self.base.guidance_input

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The range of guidance weights that the weights were trained for."""
        return self.base.guidance_range

    @property
    def default_w(self) -> float:
        """The guidance weight of the samples in training."""
        return self.base.default_w if self.w is None else self.w

    def scale(self, w: Tensor | float) -> Tensor | float:
        """Return k of the parameterisation of the weights."""
        return self.base.scale(w)

    def average_velocity(self, net: Network, x: Tensor, t: float, s: float, asked: Condition) -> Tensor:
        """Return the velocity of one step of sampling, as the objective of the weights has it."""
        return self.base.average_velocity(net, x, t, s, asked)

    def facts(self) -> dict[str, Any]:
        """Return the facts of the weights' own objective, which they remain of; `finished` says the rest."""
        return self.base.facts()

    def sample_times(self, u: Tensor) -> tuple[()]:
        """Return no times: samples begin at t = 1."""
        return ()

    def see(self, x0: Tensor) -> list[Tensor]:
        """Return each extractor's features (B, F) of the network's output (B, C, H, W), as it is scored."""
        with torch.autocast(x0.device.type, enabled=False):
            pixels = round_through(self.pixels(x0))
            return [match.extractor.forward(pixels)[0] for match in self.matches.values()]

    def loss(self, student: Network, teacher: None, drawn: Draw, tangent_scale: float = 1.0) -> Loss:
        """Return the sum over extractors of |phi - sg M(phi)|^2 / (FD + epsilon) for one sample a label."""
        if self.interval is not None:
            student = partial(student, interval=tuple(self.interval))
        asked = Condition(drawn.label, self.default_w, drawn.null)
        x0 = generate(student, drawn.noise, asked, self.nfe, self.base)
        seen = checkpoint(self.see, x0, use_reentrant=False) if self.recompute else self.see(x0)
        features = dict(zip(self.matches, seen, strict=True))
        if self.joint is not None:
            told = condition(drawn.full_label, drawn.text, drawn.null)
            features = {name: self.matches[name].join(x, told, drawn.dropped) for name, x in features.items()}
        costs = {name: match.cost(features[name]) for name, match in self.matches.items()}
        total = sum(cost / (self.matches[name].distance + self.epsilon) for name, cost in costs.items())
        ones = torch.ones_like(drawn.w)
        terms = {name.replace("/", "_"): Term(cost.detach(), ones) for name, cost in costs.items()}
        return Loss(total, terms, {"x0": x0.detach()}, features)

    def passes(self, auxiliary: bool = False) -> list[Pass]:
        """Return a pass of the student for each step of sampling; decoder and extractors come on top."""
        return [Pass()] * self.nfe


def round_through(values: Tensor) -> Tensor:
    """Round pixel values to what uint8 holds, in their own type; the gradient passes straight through."""
    return values.detach().round().clamp(0, 255) + (values - values.detach())
