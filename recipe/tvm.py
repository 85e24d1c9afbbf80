"""Terminal Velocity Matching (arXiv 2511.19797): times, displacement map, loss. Pure functions.

Notation: x_t = (1 - t) x0 + t noise, velocity v = noise - x0, t = 1 is noise; 0 <= s <= t <= 1.
F(x, t, t - s, label, beta) is the network, beta = 1/w, w the guidance weight, and k = w in the scaled
parameterisation, 1 otherwise. Per-sample quantities have shape (B,), images (B, C, H, W).

    displacement        f(x, t, s) = (s - t) k F(x, t, t - s)
    velocity            u(x, s)    = k F(x, s, 0)
    terminal condition  d/ds f(x_t, t, s) = u(x_t + f(x_t, t, s), s)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recipe.draws import Stream, keys, normal, uniform
from recipe.dual import Dual
from recipe.rules import Number, Rule, check, each, finite, one_of, positive, rule, share

Network = Callable[..., Dual]
SAMPLERS = ("gap*", "gap", "trunc", "clamp")


weights = Rule(
    lambda w: len(w) in (1, 2) and each(positive).holds(w) and sorted(w) == list(w),
    "must be w > 0, or [low, high] with 0 < low <= high",
)


@dataclass
class TVMConfig:
    """The objective. `name`: tvm, or flow_matching for the baseline (same data, draws and network).

    guidance: constant w, or [low, high] for w drawn uniformly for each sample; label_dropout: share of
    samples trained without label (and w = 1); scaled: k = w; times: gap*, gap, trunc or clamp; equal_share:
    probability of t = s; the means and deviations belong to the logit-normal laws of the gap t - s, of s,
    and (trunc, clamp) of t; detach_jvp: no gradient through dF/ds.
    """

    name: str = rule("tvm", one_of("tvm", "flow_matching"))
    guidance: Number | list[Number] = rule(1.0, weights)
    label_dropout: float = rule(0.1, share)
    scaled: bool = True
    times: str = rule("gap*", one_of(*SAMPLERS))
    equal_share: float = rule(0.0, share)
    gap_mean: float = rule(-0.8, finite)
    gap_std: float = rule(1.0, positive)
    s_mean: float = rule(-0.4, finite)
    s_std: float = rule(1.0, positive)
    t_mean: float = rule(-0.4, finite)
    t_std: float = rule(1.0, positive)
    detach_jvp: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.guidance, int | float):
            self.guidance = [self.guidance]
        check(self, "objective")
        self.guidance = [float(w) for w in self.guidance]


class Batch(NamedTuple):
    """Everything random about one training step, drawn once."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    s: Tensor
    s_prime: Tensor
    label: Tensor
    w: Tensor


class Loss(NamedTuple):
    """Per-sample terms (B,), and what was evaluated on the way, detached."""

    terminal: Tensor
    flow_matching: Tensor
    network: Tensor
    derivative: Tensor

    @property
    def total(self) -> Tensor:
        """(B,): the sum that training minimises the mean of."""
        return self.terminal + self.flow_matching


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Quantile function of the logit-normal law: sigmoid(mean + std z), z the normal quantile of u."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def truncated_logit_normal(u: Tensor, mean: float, std: float, upper: Tensor) -> Tensor:
    """Quantile function of the logit-normal law conditioned on being below `upper`."""
    mass = torch.special.ndtr((torch.logit(upper) - mean) / std)
    return logit_normal(u * mass, mean, std).clamp(max=upper)


def sample_times(u: Tensor, config: TVMConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform numbers (B, 4) to times (t, s, s'), each (B,), with 0 <= s <= t <= 1.

    gap*: gap = t - s is logit-normal, s is logit-normal truncated to s < 1 - gap, s' is independent.
    gap: the same with s' = s. trunc: t is logit-normal, s logit-normal truncated to s < t, s' = s.
    clamp: s = min(s, t) of two independent logit-normal draws, s' = s. The last column decides t = s.
    """
    first, second, third, equal = u.unbind(-1)
    if config.times.startswith("gap"):
        gap = logit_normal(first, config.gap_mean, config.gap_std)
        s = truncated_logit_normal(second, config.s_mean, config.s_std, 1 - gap)
        t = (s + gap).clamp(max=1)
    else:
        t = logit_normal(first, config.t_mean, config.t_std)
        if config.times == "trunc":
            s = truncated_logit_normal(second, config.s_mean, config.s_std, t)
        else:
            s = torch.minimum(logit_normal(second, config.s_mean, config.s_std), t)
    s_prime = logit_normal(third, config.s_mean, config.s_std) if config.times == "gap*" else s
    return torch.where(equal < config.equal_share, s, t), s, s_prime


def draw(
    x0: Tensor, label: Tensor, step: Tensor, sample: Tensor, seed: int, config: TVMConfig, null: int
) -> Batch:
    """All random numbers of a training step, keyed by (seed, step, sample id).

    x0: (B, C, H, W) normalised; label, step, sample: (B,) int64; null: the index that means "no label".
    """

    def key(stream: Stream) -> Tensor:
        return keys(seed, step, sample, stream)

    t, s, s_prime = sample_times(uniform(key(Stream.TIMES), 4), config)
    low, high = config.guidance[0], config.guidance[-1]
    w = low + (high - low) * uniform(key(Stream.GUIDANCE), 1)[:, 0]
    dropped = uniform(key(Stream.LABEL_DROP), 1)[:, 0] < config.label_dropout
    label, w = torch.where(dropped, null, label), torch.where(dropped, 1.0, w)
    noise = normal(key(Stream.NOISE), *x0.shape[1:])
    return Batch(x0, *(z.to(x0.dtype) for z in (noise, t, s, s_prime)), label, w.to(x0.dtype))


def _image(u: Tensor) -> Tensor:
    return u[:, None, None, None]


def _mean_square(residual: Tensor) -> Tensor:
    return residual.square().mean((1, 2, 3))


def displacement(
    net: Network,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    label: Tensor,
    beta: Tensor,
    k: Tensor,
    tangent: float = 1.0,
    detach_jvp: bool = False,
) -> tuple[Dual, Dual]:
    """f(x, t, s) = (s - t) k F and its derivative df/ds = k (F + (s - t) dF/ds), x and t held fixed.

    Returns ((f, df/ds), (F, dF/ds)); s enters the network through d = t - s alone, whose tangent is -1.
    `tangent` scales dF/ds (tangent warm-up; 1 is the paper); detach_jvp stops the gradient through dF/ds.
    """
    F = net(x, t, Dual(t - s, -torch.ones_like(s)), label, beta)
    derivative = F.tangent.detach() if detach_jvp else F.tangent
    k, span = _image(k), _image(s - t)
    return Dual(span * k * F.value, k * (F.value + span * tangent * derivative)), F


def tvm_loss(
    student: Network, teacher: Network, batch: Batch, config: TVMConfig, null: int, tangent: float = 1.0
) -> Loss:
    """Terminal and flow-matching terms for each sample (paper, eq. 15), both weighted by beta^2.

    terminal      = beta^2 mean |df/ds - sg u_T(sg(x_t + f), s)|^2, and 0 where t = s
    flow matching = beta^2 mean |u(x_s', s') - (w v + (1 - w) sg u_T(x_s', s', no label, w = 1))|^2

    `teacher` is the target average of the student's weights, evaluated without gradient. Its two halves are
    one call; the second is left out where w is 1 for all samples by configuration.
    """
    x0, noise, t, s, s_prime, label, w = batch
    beta, v = 1 / w, noise - x0
    k = w if config.scaled else torch.ones_like(w)
    zero, null_label = torch.zeros_like(s), torch.full_like(label, null)
    x_t = x0 + _image(t) * v
    x_s = x0 + _image(s_prime) * v

    f, F = displacement(student, x_t, t, s, label, beta, k, tangent, config.detach_jvp)

    with torch.no_grad():
        x_f = x_t + f.value
        if config.guidance == [1.0]:
            u_terminal, v_target = _image(k) * teacher(x_f, s, zero, label, beta).value, v
        else:
            conditional, unconditional = teacher(
                torch.cat([x_f, x_s]),
                torch.cat([s, s_prime]),
                torch.cat([zero, zero]),
                torch.cat([label, null_label]),
                torch.cat([beta, torch.ones_like(beta)]),
            ).value.chunk(2)
            u_terminal = _image(k) * conditional
            v_target = _image(w) * v + _image(1 - w) * unconditional

    different = ~torch.isclose(s, t, rtol=1e-5, atol=1e-8)
    terminal = torch.where(different, _mean_square(_image(beta) * (f.tangent - u_terminal)), 0.0)
    u = _image(k) * student(x_s, s_prime, zero, label, beta).value
    flow_matching = _mean_square(_image(beta) * (u - v_target))
    return Loss(terminal, flow_matching, F.value.detach(), F.tangent.detach())


def flow_matching_loss(student: Network, batch: Batch) -> Loss:
    """Plain flow matching: mean |F(x_s', s', 0) - v|^2 (B,), without guidance in the target."""
    x0, noise, _, _, s_prime, label, _ = batch
    zero, v = torch.zeros_like(s_prime), noise - x0
    F = student(x0 + _image(s_prime) * v, s_prime, zero, label, torch.ones_like(s_prime)).value
    nothing = torch.zeros_like(s_prime)
    return Loss(nothing, _mean_square(F - v), F.detach(), torch.zeros_like(F))
