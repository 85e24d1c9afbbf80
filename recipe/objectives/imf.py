"""Improved MeanFlow, iMF (arXiv 2512.02012): the target is v, and guidance is chosen after training.

    V = u + (t - r) sg(du/dt) against v,   du/dt along the network's own velocity

Left out of the published method: its auxiliary head for v, the guidance interval as an input, and
conditioning by tokens in context.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from recipe.objectives.base import Draw, Guidance, Loss, Network, Objective, Pass, Term, broadcast, ends
from recipe.objectives.meanflow import adaptive, average_velocity_along, ordered_times
from recipe.settings import NotNegative, Positive, Share


@dataclass
class IMF(Objective):
    """Improved MeanFlow: guidance is chosen after training."""

    name: Literal["imf"] = Field("imf", description="Improved MeanFlow.")
    guidance: Guidance = Field(
        1.0,
        description="Guidance weight w, or [low, high] for a w that is drawn for each sample by the power "
        "law low (high / low)^U.",
    )
    equal_share: Share = Field(0.5, description="Probability of r = t.")
    t_mean: float = Field(-0.4, description="Mean of the logit-normal law of both times.")
    t_std: Positive = Field(1.0, description="Deviation of the logit-normal law of both times.")
    norm_p: NotNegative = Field(
        1.0, description="Power of the adaptive weight of a sample's error; 0 weighs all samples alike."
    )
    norm_eps: Positive = Field(0.01, description="Offset of the error in the adaptive weight.")

    guidance_input: ClassVar[bool] = True

    def sample_times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return (t, r), see `ordered_times`."""
        return ordered_times(u, self.t_mean, self.t_std, self.equal_share)

    def sample_guidance(self, u: Tensor, unlabelled: Tensor) -> Tensor:
        """Draw w by the power law in the range. It stays where the label is dropped (`guide` of the base)."""
        low, high = self.guidance_range
        return low * (high / low) ** u

    @property
    def guidance_range(self) -> tuple[float, float]:
        """As trained: the network knows w."""
        return ends(self.guidance)

    def velocities(self, student: Network, x_t: Tensor, drawn: Draw) -> tuple[Tensor, Tensor]:
        """Return v_c = u(x_t, t | label, w) and v_g = v + (1 - 1/w) (v_c - u(x_t, t | none, w = 1)).

        Both are without gradient. Where the label is dropped, v_g = v, and v_c sees the label all the same.
        """
        v, t = drawn.velocity, drawn.times[0]
        zero, beta = torch.zeros_like(t), self.beta(drawn.w)
        if self.guidance_range == (1, 1):
            return student(x_t, t, zero, drawn.full_label, beta).value, v
        twice = (torch.cat([z, z]) for z in (x_t, t, zero))
        labels = torch.cat([drawn.full_label, drawn.null_label])
        v_c, v_u = student(*twice, labels, torch.cat([beta, torch.ones_like(beta)])).value.chunk(2)
        return v_c, torch.where(broadcast(drawn.dropped), v, v + broadcast(1 - beta) * (v_c - v_u))

    def loss(self, student: Network, teacher: None, drawn: Draw, tangent_scale: float = 1.0) -> Loss:
        """Return the adaptively weighted sum |V - sg v_g|^2 for each sample."""
        t, r = drawn.times
        x_t = drawn.at(t)
        with torch.no_grad():
            v_c, v_g = self.velocities(student, x_t, drawn)
        u = average_velocity_along(student, x_t, v_c, t, r, drawn.label, self.beta(drawn.w))
        V = u.value + broadcast(t - r) * tangent_scale * u.tangent
        error = (V - v_g).square().sum((1, 2, 3))
        total = adaptive(error, self.norm_p, self.norm_eps)
        return Loss(
            total, {"error": Term(error.detach(), t - r)}, {"F": u.value.detach(), "dF_dt": u.tangent}
        )

    def passes(self) -> list[Pass]:
        """Return the pass of the student's own velocity, with and without label, then the dual pass."""
        return [Pass(gradient="none", batches=1 + (self.guidance_range != (1, 1))), Pass(dual=True)]
