"""What objectives share: the path, the random draws of a step, what a loss returns, and the interface.

Notation: x_t = (1 - t) x0 + t noise, velocity v = noise - x0, t = 1 is noise; 0 <= s <= t <= 1 (MeanFlow's r
is s). F(x, t, t - s, label, beta) is the network, beta = 1/w, w the guidance weight. Per-sample quantities
have shape (B,), images (B, C, H, W).

    average velocity over [s, t]   u(x, t, s) = k F(x, t, t - s, label, beta)
    velocity                       u(x, t) = u(x, t, t)
    one step of sampling           x_s = x_t - (t - s) u(x_t, t, s)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from recipe.dit import Denoiser, NetworkConfig
from recipe.draws import Stream, keys, normal, uniform
from recipe.dual import Dual
from recipe.settings import Duration, Number, Positive, Says, Settings, Share
from recipe.text import Text

Network = Callable[..., Dual]


class Draw(NamedTuple):
    """A batch of images and everything random about one training step on it, drawn once.

    times: what they are is up to the objective; label: of training, `null` where it is dropped; full_label:
    that of the data; null: the label that means none; interval: the times (B,) between which guidance is in
    force, None where that is always; floor: the time below which the network divides by it, 0 for none;
    text: the prompts of a network that takes any, which are the data's, as `full_label` is.
    """

    x0: Tensor
    noise: Tensor
    times: tuple[Tensor, ...]
    label: Tensor
    w: Tensor
    full_label: Tensor
    null: int
    interval: tuple[Tensor, Tensor] | None = None
    floor: float = 0.0
    text: Text | None = None

    def at(self, t: Tensor) -> Tensor:
        """Return x_t = (1 - t) x0 + t noise."""
        return self.x0 + broadcast(t) * self.velocity

    @property
    def velocity(self) -> Tensor:
        """The velocity v = noise - x0."""
        return self.noise - self.x0

    def velocity_at(self, t: Tensor) -> Tensor:
        """Return (x_t - x0) / max(t, floor), which is v from the floor on."""
        return self.velocity * broadcast((t / self.floor).clamp(max=1)) if self.floor else self.velocity

    @property
    def dropped(self) -> Tensor:
        """Whether each sample is trained without label, (B,)."""
        return self.label == self.null

    @property
    def null_label(self) -> Tensor:
        """The label that means none, for every sample, (B,)."""
        return torch.full_like(self.label, self.null)


class Condition(NamedTuple):
    """What samples are asked for: a label and a guidance weight each.

    label: (B,) int64; w: one number for all samples, or (B,); null: the label that means none.
    """

    label: Tensor
    w: float | Tensor
    null: int

    @property
    def unlabelled(self) -> Tensor:
        """Whether each sample is asked for without label, (B,)."""
        return self.label == self.null


class Term(NamedTuple):
    """A per-sample part of a loss to log, and the time (B,) by which the log sorts it."""

    value: Tensor
    time: Tensor


class Loss(NamedTuple):
    """total: (B,), training minimises its mean; the rest is for the logs.

    terms: unweighted by anything that hides their size; evaluated: images whose RMS is logged, detached;
    features: (B, F) of samples, of an objective that `finishes`.
    """

    total: Tensor
    terms: dict[str, Term]
    evaluated: dict[str, Tensor]
    features: dict[str, Tensor] = {}


class Pass(NamedTuple):
    """One evaluation of the network in a step. dual: with a tangent; gradient: of what is differentiated,
    `none`, `value` or `both`; batches: how many batches at once; teacher: by the target average; head: of the
    auxiliary head alone, on what another evaluation has made.
    """

    dual: bool = False
    gradient: str = "value"
    batches: int = 1
    teacher: bool = False
    head: bool = False


@dataclass
class Objective(Settings, ABC):
    """Settings of an objective (the fields) and what is particular to it (the methods).

    Of the class: teacher: whether the loss needs the target average of the weights; guidance_input: whether
    the network is told beta; auxiliary: whether it trains an auxiliary head and a guidance interval, where
    the network has them; finishes: whether it goes on with weights of another objective, which stay that
    objective's (`frechet` alone). Of an instance: finished: the extractors on which `frechet` has trained the
    weights, before this run and in it, as their JSON has them.
    """

    name: str
    label_dropout: Share = Field(0.1, description="Share of samples that are trained without label.")
    flow_matching_first: Duration | None = Field(
        None,
        description="Time that a run matches plain velocities, in the objective's own parameterisation, "
        "before it goes on with the objective.",
    )
    noise_scale: Positive = Field(1.0, description="Standard deviation of the noise, which is x_t at t = 1.")

    teacher: ClassVar[bool] = False
    guidance_input: ClassVar[bool] = False
    auxiliary: ClassVar[bool] = False
    finishes: ClassVar[bool] = False
    finished: ClassVar[list[dict[str, Any]]] = []

    @abstractmethod
    def sample_times(self, u: Tensor) -> tuple[Tensor, ...]:
        """Map uniform numbers (B, 4) to the times of training, each (B,)."""

    def sample_guidance(self, u: Tensor, unlabelled: Tensor) -> Tensor:
        """Map uniform numbers (B,) to the guidance weights of training; unlabelled (B,): see `guide`."""
        return torch.ones_like(u)

    def sample_interval(self, u: Tensor, times: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Map uniform numbers (B, 2) to the start and the end (B,) of the guidance interval."""
        raise NotImplementedError

    def guide(self, w: Tensor, unlabelled: Tensor) -> Tensor:
        """Return the guidance weights (B,) in force where w (B,) are asked for, in training and in sampling.

        unlabelled (B,): whether the sample's label means none. What that does to w is up to the objective;
        here it does nothing.
        """
        return w

    def flow_time(self, times: tuple[Tensor, ...]) -> Tensor:
        """Return the time at which plain velocities are matched."""
        return times[0]

    @abstractmethod
    def loss(
        self, student: Network, teacher: Network | None, drawn: Draw, tangent_scale: float = 1.0
    ) -> Loss:
        """Return the loss of each sample.

        teacher: the target average of the student's weights, evaluated without gradient, or None;
        tangent_scale: factor of the derivative (tangent warm-up; 1 is the paper).
        """

    @abstractmethod
    def passes(self, auxiliary: bool = False) -> list[Pass]:
        """Return the evaluations of the network in a step; auxiliary: whether it has an auxiliary head."""

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The guidance weights that sampling may ask for; (1, 1) where training has fixed guidance."""
        return (1.0, 1.0)

    @property
    def default_w(self) -> float:
        """The guidance weight of sampling where none is asked for: of the range, the nearest to 1."""
        low, high = self.guidance_range
        return min(max(1.0, low), high)

    def scale(self, w: Tensor | float) -> Tensor | float:
        """Return k of the parameterisation u = k F."""
        return 1.0

    def beta(self, w: Tensor) -> Tensor | None:
        """Return what the network is told of w (B,), or None where it is told nothing."""
        return 1 / w if self.guidance_input else None

    def average_velocity(self, net: Network, x: Tensor, t: float, s: float, asked: Condition) -> Tensor:
        """Return u(x, t, s) = k F of one step of sampling, in float64.

        Where a sample has no label, `guide` says which weight is in force instead of the one that is asked
        for. See the objectives for what that may be.
        """
        ones = x.new_ones(x.shape[0])  # len() would fix the batch under torch.export
        w = self.guide(asked.w * ones.double(), asked.unlabelled)
        velocity = net(x, t * ones, (t - s) * ones, asked.label, self.beta(w.to(x.dtype))).value.double()
        return broadcast(self.scale(w) * torch.ones_like(w)) * velocity

    def facts(self) -> dict[str, Any]:
        """Return the settings, as exported weights describe their `method`; `objective` is the name."""
        settings = asdict(self)
        return {"objective": settings.pop("name"), **settings}


def ends(w: Number | list[Number]) -> tuple[float, float]:
    """Return the range of guidance weights that w, [w] or [low, high] means. Raises ValueError."""
    weights = [w] if isinstance(w, Number) else w
    if len(weights) not in (1, 2):
        raise ValueError
    return float(weights[0]), float(weights[-1])


def guidance_weights(w: Number | list[Number]) -> Number | list[Number]:
    """Return a weight or a range of weights. Raises ValueError unless all are positive and in order."""
    low, high = ends(w)
    if not 0 < low <= high < math.inf:
        raise ValueError
    return w


Guidance = Annotated[
    Number | list[Number],
    AfterValidator(guidance_weights),
    Says("must be w > 0, or [low, high] with 0 < low <= high"),
]


@dataclass
class Guided(Objective):
    """An objective whose network is told w, so that samples may ask for any w that it was trained with."""

    guidance: Guidance = Field(
        1.0,
        description="Guidance weight w, or [low, high] that each sample draws a w from: uniformly by tvm, "
        "which takes 1 without label, and by the power law low (high / low)^U by imf.",
    )

    guidance_input: ClassVar[bool] = True

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The guidance weights of training."""
        return ends(self.guidance)


def draw(
    x0: Tensor,
    label: Tensor,
    step: Tensor,
    sample: Tensor,
    seed: int,
    objective: Objective,
    network: NetworkConfig,
) -> Draw:
    """Draw all random numbers of a training step, keyed by (seed, step, sample id).

    x0: (B, C, H, W) normalised; label, step, sample: (B,) int64.
    """

    def key(stream: Stream) -> Tensor:
        return keys(seed, step, sample, stream)

    times = objective.sample_times(uniform(key(Stream.TIMES), 4))
    dropped = uniform(key(Stream.LABEL_DROP), 1)[:, 0] < objective.label_dropout
    told = torch.where(dropped, network.null, label)
    w = objective.sample_guidance(uniform(key(Stream.GUIDANCE), 1)[:, 0], told == network.null)
    noise = objective.noise_scale * normal(key(Stream.NOISE), *x0.shape[1:]).to(x0.dtype)
    interval = None
    if network.interval and objective.auxiliary:
        ends = objective.sample_interval(uniform(key(Stream.INTERVAL), 2), times)
        interval = tuple(time.to(x0.dtype) for time in ends)
    floor = network.t_floor if network.output == "x" else 0.0
    times = tuple(t.to(x0.dtype) for t in times)
    return Draw(x0, noise, times, told, w.to(x0.dtype), label, network.null, interval, floor)


def broadcast(u: Tensor) -> Tensor:
    """Reshape numbers of samples (B,) to (B, 1, 1, 1), which broadcast over images (B, C, H, W)."""
    return u[:, None, None, None]


def mean_square(residual: Tensor) -> Tensor:
    """Return the mean square of each image: (B, C, H, W) => (B,)."""
    return residual.square().mean((1, 2, 3))


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Return quantiles of the logit-normal law: sigmoid(mean + std z), z the normal quantile of u."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


# ---------------------------------------------------------------- weights of one objective under another


def output_ratio(source: Objective, target: Objective) -> float:
    """Return factor r of the output, k_target r F = k_source F. Raises ValueError where it varies with w.

    Weights that know one w have it there, or at the nearest w of the target.
    """
    low, high = target.guidance_range if target.guidance_input else (source.default_w, source.default_w)
    first, last = source.guidance_range
    if source.guidance_input and first == last:
        low = high = min(max(first, low), high)
    ratios = {source.scale(w) / target.scale(w) for w in (low, high)}
    if len(ratios) > 1:
        raise ValueError(
            f"objective.scaled: with w from {low:g} to {high:g} both parameterisations must be the same; "
            f"set objective.scaled={str(source.scale(2.0) == 2.0).lower()}"
        )
    return ratios.pop()


@torch.no_grad()
def adapt(net: Denoiser, source: Objective, target: Objective) -> None:
    """Change weights, in place, so that `target` finds in them the velocity that `source` left there.

    A guidance input that only the source has is fixed at the w at which that is sampled; one that only the
    target has begins as zero; a head for v that no source has trained begins as u(x, t, t); the last layer
    takes the ratio of the parameterisations.
    """
    ratio = output_ratio(source, target)
    for p in net.final_layer.linear.parameters():
        p.mul_(ratio)
    if source.guidance_input and not target.guidance_input:
        net.fix_guidance(source.beta(torch.tensor([source.default_w])))
    if target.guidance_input and not source.guidance_input:
        net.begin_guidance()
    if target.auxiliary and not source.auxiliary and getattr(net.config, "v_head", False):
        net.begin_auxiliary()
