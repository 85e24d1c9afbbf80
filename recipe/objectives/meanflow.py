"""MeanFlow (arXiv 2505.13447): the average velocity by its own identity, guidance fixed at training.

identity  u(x_t, t, r) = v - (t - r) du/dt,   du/dt along (x, t, r) -> (v, 1, 0)
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from recipe.dual import Dual
from recipe.objectives.base import Draw, Loss, Network, Objective, Pass, Term, broadcast, logit_normal
from recipe.settings import BelowOne, NotNegative, Positive, Share

# Settings of `ordered_times` and of `adaptive`, which iMF has, too.
EqualShare = Annotated[Share, Field(description="Probability of r = t.")]
TimesMean = Annotated[float, Field(description="Mean of the logit-normal law of both times.")]
TimesStd = Annotated[Positive, Field(description="Deviation of the logit-normal law of both times.")]
NormPower = Annotated[
    NotNegative,
    Field(description="Power of the adaptive weight of a sample's error; 0 weighs all samples alike."),
]
NormOffset = Annotated[Positive, Field(description="Offset of the error in the adaptive weight.")]


@dataclass
class MeanFlow(Objective):
    """MeanFlow: the average velocity by its own identity, guidance fixed at training."""

    name: Literal["meanflow"] = Field("meanflow", description="MeanFlow.")
    omega: float = Field(1.0, description="Weight of v in the guided target; omega 1, kappa 0: no guidance.")
    kappa: BelowOne = Field(
        0.0,
        description="Weight of the velocity with label in the guided target; the effective guidance weight "
        "is omega / (1 - kappa).",
    )
    t_start: Share = Field(0.0, description="Earliest t at which the target is guided.")
    t_end: Share = Field(1.0, description="Latest t at which the target is guided.")
    equal_share: EqualShare = 0.75
    t_mean: TimesMean = -0.4
    t_std: TimesStd = 1.0
    norm_p: NormPower = 1.0
    norm_eps: NormOffset = 0.01

    def sample_times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return (t, r), see `ordered_times`."""
        return ordered_times(u, self.t_mean, self.t_std, self.equal_share)

    @property
    def guided(self) -> bool:
        """Whether the target differs from v anywhere."""
        return (self.omega, self.kappa) != (1, 0)

    def guided_velocity(self, student: Network, x_t: Tensor, drawn: Draw) -> Tensor:
        """Return v_g = omega v + (1 - omega - kappa) u(x_t, t | none) + kappa u(x_t, t | label).

        Both u without gradient; v_g = v outside of the interval of t, and where the label is dropped.
        """
        t = drawn.times[0]
        v = drawn.velocity_at(t)
        if not self.guided:
            return v
        zero, none = torch.zeros_like(t), drawn.null_label
        if self.kappa:
            twice = (torch.cat([z, z]) for z in (x_t, t, zero))
            u_none, u_label = student(*twice, torch.cat([none, drawn.label])).value.chunk(2)
        else:
            u_none = u_label = student(x_t, t, zero, none).value
        guided = self.omega * v + (1 - self.omega - self.kappa) * u_none + self.kappa * u_label
        inside = (self.t_start <= t) & (t <= self.t_end) & ~drawn.dropped
        return torch.where(broadcast(inside), guided, v)

    def loss(self, student: Network, teacher: None, drawn: Draw, tangent_scale: float = 1.0) -> Loss:
        """Return the adaptively weighted sum |u - sg(v_g - (t - r) du/dt)|^2 for each sample."""
        t, r = drawn.times
        x_t = drawn.at(t)
        with torch.no_grad():
            v_g = self.guided_velocity(student, x_t, drawn)
        u = average_velocity_along(student, x_t, v_g, t, r, drawn.label, None)
        target = v_g - broadcast(t - r) * tangent_scale * u.tangent
        error = (u.value - target).square().sum((1, 2, 3))
        total = adaptive(error, self.norm_p, self.norm_eps)
        return Loss(
            total, {"error": Term(error.detach(), t - r)}, {"F": u.value.detach(), "dF_dt": u.tangent}
        )

    def passes(self, auxiliary: bool = False) -> list[Pass]:
        """Return the passes of guidance (none, one or two evaluations of the student), then the dual pass."""
        guidance = [Pass(gradient="none", batches=1 + bool(self.kappa))] if self.guided else []
        return [*guidance, Pass(dual=True)]


def ordered_times(u: Tensor, mean: float, std: float, equal_share: float) -> tuple[Tensor, Tensor]:
    """Return the larger and the smaller of two logit-normal draws, t and r; equal with that probability."""
    first, second = (logit_normal(z, mean, std) for z in u.unbind(-1)[:2])
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    return t, torch.where(u[:, 3] < equal_share, t, r)


def average_velocity_along(
    net: Network,
    x_t: Tensor,
    v: Tensor,
    t: Tensor,
    r: Tensor,
    label: Tensor,
    beta: Tensor | None,
    **told: Any,
) -> Dual:
    """Return u(x_t, t, r) and its derivative du/dt along (v, 1, 0), without gradient through that.

    told: what else the network is told; it decides what comes back (`recipe.mit.MiT`).
    """
    one = torch.ones_like(t)
    return net(Dual(x_t, v), Dual(t, one), Dual(t - r, one), label, beta, detach_tangent=True, **told)


def adaptive(error: Tensor, p: float, eps: float) -> Tensor:
    """Return error / sg(error + eps)^p, (B,)."""
    return error / (error.detach() + eps) ** p
