"""Flow matching (arXiv 2210.02747): the velocity alone, sampled by Euler steps with classifier-free guidance.

Also how every other objective can begin: `objective.flow_matching_first`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from recipe.objectives.base import (
    Batch,
    Loss,
    Network,
    Objective,
    Pass,
    Term,
    image,
    logit_normal,
    mean_square,
)
from recipe.settings import ConfigError, Positive


@dataclass
class FlowMatching(Objective):
    """Flow matching: the velocity alone."""

    name: Literal["flow_matching"] = Field("flow_matching", description="Flow matching.")
    t_mean: float = Field(-0.4, description="Mean of the logit-normal law of t.")
    t_std: Positive = Field(1.0, description="Deviation of the logit-normal law of t.")

    @model_validator(mode="after")
    def combinations(self) -> FlowMatching:
        """Raises ConfigError for a time after which flow matching would become flow matching."""
        if self.flow_matching_first is not None:
            raise ConfigError("flow_matching_first: flow_matching is that from the first step to the last")
        return self

    def sample_times(self, u: Tensor) -> tuple[Tensor]:
        """(t,), logit-normal."""
        return (logit_normal(u[:, 2], self.t_mean, self.t_std),)

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Any: guidance is classifier-free."""
        return (0.0, math.inf)

    def loss(self, student: Network, teacher: None, batch: Batch, null: int, tangent: float = 1.0) -> Loss:
        """See `flow_matching_loss`."""
        return flow_matching_loss(self, student, batch)

    def average_velocity(
        self, net: Network, x: Tensor, t: float, s: float, label: Tensor, w: float | Tensor, null: int
    ) -> Tensor:
        """Return u(x, t | none) + w (u(x, t | label) - u(x, t | none)), held over the step.

        One pass is enough where w is the number 1. Without label both u are the same, so w changes nothing.
        """
        velocity = super().average_velocity(net, x, t, t, label, w, null)
        if isinstance(w, (int, float)) and w == 1:
            return velocity
        free = super().average_velocity(net, x, t, t, torch.full_like(label, null), w, null)
        return free + image(w * torch.ones_like(label, dtype=torch.float64)) * (velocity - free)

    def passes(self) -> list[Pass]:
        """Plain student."""
        return [Pass()]


def flow_matching_loss(objective: Objective, student: Network, batch: Batch) -> Loss:
    """mean |u(x_t, t) - v|^2 for each sample, u = k F in the parameterisation of `objective`."""
    t, w = objective.flow_time(batch.times), batch.w
    F = student(batch.at(t), t, torch.zeros_like(t), batch.label, objective.beta(w)).value
    u = image(objective.scale(w) * torch.ones_like(w)) * F
    error = mean_square(u - batch.velocity)
    return Loss(error, {"flow_matching": Term(error.detach(), t)}, {"F": F.detach()})
