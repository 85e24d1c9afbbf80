"""MeanFlow (arXiv 2505.13447): the average velocity by its own identity, guidance fixed at training.

identity  u(x_t, t, r) = v - (t - r) du/dt,   du/dt along (x, t, r) -> (v, 1, 0)
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from recipe import dual
from recipe.dual import Dual
from recipe.objectives.base import Batch, Loss, Network, Objective, Pass, Term, image, logit_normal
from recipe.settings import BelowOne, NotNegative, Positive, Share


@dataclass
class MeanFlow(Objective):
    """MeanFlow: the average velocity by its own identity, guidance fixed at training."""

    name: Literal["meanflow"] = Field("meanflow", description="MeanFlow.")
    omega: float = Field(
        1.0, description="Weight of v in the guided target; omega 1 and kappa 0 are no guidance."
    )
    kappa: BelowOne = Field(
        0.0,
        description="Weight of the velocity with label in the guided target; the effective guidance weight "
        "is omega / (1 - kappa).",
    )
    t_start: Share = Field(0.0, description="Earliest t at which the target is guided.")
    t_end: Share = Field(1.0, description="Latest t at which the target is guided.")
    equal_share: Share = Field(0.75, description="Probability of r = t.")
    t_mean: float = Field(-0.4, description="Mean of the logit-normal law of both times.")
    t_std: Positive = Field(1.0, description="Deviation of the logit-normal law of both times.")
    norm_p: NotNegative = Field(
        1.0, description="Power of the adaptive weight of a sample's error; 0 weighs all samples alike."
    )
    norm_eps: Positive = Field(0.01, description="Offset of the error in the adaptive weight.")

    def sample_times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(t, r), see `ordered_times`."""
        return ordered_times(u, self.t_mean, self.t_std, self.equal_share)

    def guided_velocity(self, student: Network, x_t: Tensor, batch: Batch, null: int) -> Tensor:
        """v_g = omega v + (1 - omega - kappa) u(x_t, t | none) + kappa u(x_t, t | label) inside the interval.

        Both u without gradient; v_g = v outside, and where the label is dropped.
        """
        (t, _), label, v, zero = batch.times, batch.label, batch.velocity, torch.zeros_like(batch.times[0])
        if (self.omega, self.kappa) == (1, 0):
            return v
        free = torch.full_like(label, null)
        if self.kappa:
            twice = (torch.cat([z, z]) for z in (x_t, t, zero))
            u_free, u_label = student(*twice, torch.cat([free, label])).value.chunk(2)
        else:
            u_free = u_label = student(x_t, t, zero, free).value
        guided = self.omega * v + (1 - self.omega - self.kappa) * u_free + self.kappa * u_label
        inside = (self.t_start <= t) & (t <= self.t_end) & (label != null)
        return torch.where(image(inside), guided, v)

    def loss(self, student: Network, teacher: None, batch: Batch, null: int, tangent: float = 1.0) -> Loss:
        """Adaptively weighted sum |u - sg(v_g - (t - r) du/dt)|^2 for each sample."""
        t, r = batch.times
        x_t = batch.at(t)
        with torch.no_grad():
            v_g = self.guided_velocity(student, x_t, batch, null)
        u = average_velocity_along(student, x_t, v_g, t, r, batch.label, None)
        target = v_g - image(t - r) * tangent * u.tangent
        error = (u.value - target).square().sum((1, 2, 3))
        total = adaptive(error, self.norm_p, self.norm_eps)
        return Loss(
            total, {"error": Term(error.detach(), t - r)}, {"F": u.value.detach(), "dF_dt": u.tangent}
        )

    def passes(self) -> list[Pass]:
        """Guidance (none, one or two evaluations of the student), then the dual pass."""
        guidance = (
            []
            if (self.omega, self.kappa) == (1, 0)
            else [Pass(gradient="none", batches=1 + bool(self.kappa))]
        )
        return [*guidance, Pass(dual=True)]


def ordered_times(u: Tensor, mean: float, std: float, equal_share: float) -> tuple[Tensor, Tensor]:
    """(t, r): the larger and the smaller of two logit-normal draws, and r = t with that probability."""
    first, second = (logit_normal(z, mean, std) for z in u.unbind(-1)[:2])
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    return t, torch.where(u[:, 3] < equal_share, t, r)


def average_velocity_along(
    net: Network, x_t: Tensor, v: Tensor, t: Tensor, r: Tensor, label: Tensor, beta: Tensor | None
) -> Dual:
    """u(x_t, t, r) and its derivative du/dt along (x, t, r) -> (v, 1, 0), without gradient through that."""
    one = torch.ones_like(t)
    return dual.detach(net(Dual(x_t, v), Dual(t, one), Dual(t - r, one), label, beta, detach_tangent=True))


def adaptive(error: Tensor, p: float, eps: float) -> Tensor:
    """error / sg(error + eps)^p, (B,)."""
    return error / (error.detach() + eps) ** p
