"""Improved MeanFlow, iMF (arXiv 2512.02012): the target is v, and guidance is chosen after training.

    V = u + (t - r) sg(du/dt) against v,   du/dt along the network's own velocity

A network with an auxiliary head for v (recipe/mit.py) gives that velocity by it, and is told between which
times guidance is in force. All others give it as u(x, t, t), guided at every time. Pixel mean flow, pMF
(arXiv 2601.22158), is this with `output: x` of the network, other laws and a larger noise; its perceptual
losses are left out.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from recipe.objectives.base import Draw, Guided, Loss, Network, Pass, Term, broadcast
from recipe.objectives.meanflow import (
    EqualShare,
    NormOffset,
    NormPower,
    TimesMean,
    TimesStd,
    adaptive,
    average_velocity_along,
    ordered_times,
)


@dataclass
class IMF(Guided):
    """Improved MeanFlow: guidance is chosen after training."""

    name: Literal["imf"] = Field("imf", description="Improved MeanFlow.")
    equal_share: EqualShare = 0.5
    t_mean: TimesMean = -0.4
    t_std: TimesStd = 1.0
    norm_p: NormPower = 1.0
    norm_eps: NormOffset = 0.01

    auxiliary: ClassVar[bool] = True

    def sample_times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return (t, r), see `ordered_times`."""
        return ordered_times(u, self.t_mean, self.t_std, self.equal_share)

    def sample_guidance(self, u: Tensor, unlabelled: Tensor) -> Tensor:
        """Draw w by the power law in the range. It stays where the label is dropped (`guide` of the base)."""
        low, high = self.guidance_range
        return low * (high / low) ** u

    def sample_interval(self, u: Tensor, times: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Draw t_min uniformly in [0, 1/2] and t_max in [1/2, 1]; where r = t they are 0 and 1."""
        start, end = u.unbind(-1)
        same = times[0] == times[1]
        return torch.where(same, 0.0, start / 2), torch.where(same, 1.0, (1 + end) / 2)

    def velocities(self, student: Network, x_t: Tensor, drawn: Draw) -> tuple[Tensor, Tensor]:
        """Return v_c = v(x_t, t | label, w') and v_g = v + (1 - 1/w') (v_c - v(x_t, t | none, w = 1)).

        Both are without gradient. v(x, t) on the right is the network's; w' is w inside the guidance interval
        and 1 outside. Where the label is dropped, v_g = v, and v_c sees the label all the same.
        """
        t = drawn.times[0]
        v, zero, beta, head = drawn.velocity_at(t), torch.zeros_like(t), self.beta(drawn.w), {}
        if drawn.interval is not None:
            start, end = drawn.interval
            beta, head = torch.where((start <= t) & (t <= end), beta, 1.0), {"head": "v"}
        if self.guidance_range == (1, 1):
            return student(x_t, t, zero, drawn.full_label, beta, **head).value, v
        twice = (torch.cat([z, z]) for z in (x_t, t, zero))
        labels = torch.cat([drawn.full_label, drawn.null_label])
        both = student(*twice, labels, torch.cat([beta, torch.ones_like(beta)]), **head)
        v_c, v_u = both.value.chunk(2)
        return v_c, torch.where(broadcast(drawn.dropped), v, v + broadcast(1 - beta) * (v_c - v_u))

    def loss(self, student: Network, teacher: None, drawn: Draw, tangent_scale: float = 1.0) -> Loss:
        """Return the adaptively weighted sum |V - sg v_g|^2 for each sample, and the same of another head."""
        t, r = drawn.times
        x_t = drawn.at(t)
        with torch.no_grad():
            v_c, v_g = self.velocities(student, x_t, drawn)
        heads = {} if drawn.interval is None else {"interval": drawn.interval, "head": "both"}
        found = average_velocity_along(student, x_t, v_c, t, r, drawn.label, self.beta(drawn.w), **heads)
        u, v = found if heads else (found, None)
        errors = {"error": u.value + broadcast(t - r) * tangent_scale * u.tangent - v_g}
        if v is not None:
            errors["error_v"] = v.value - v_g
        errors = {name: error.square().sum((1, 2, 3)) for name, error in errors.items()}
        total = sum(adaptive(error, self.norm_p, self.norm_eps) for error in errors.values())
        terms = {name: Term(error.detach(), t - r) for name, error in errors.items()}
        return Loss(total, terms, {"F": u.value.detach(), "dF_dt": u.tangent})

    def passes(self, auxiliary: bool = False) -> list[Pass]:
        """Return the pass of the student's own velocity, with and without label, the dual pass, and that of
        the auxiliary head.
        """
        own = Pass(gradient="none", batches=1 + (self.guidance_range != (1, 1)))
        return [own, Pass(dual=True), *([Pass(head=True)] if auxiliary else [])]
