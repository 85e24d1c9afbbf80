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
    Condition,
    Draw,
    Loss,
    Network,
    Objective,
    Pass,
    Term,
    broadcast,
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
        """Raise ConfigError for a time after which flow matching would go on as flow matching."""
        if self.flow_matching_first is not None:
            raise ConfigError("flow_matching_first: flow_matching is that from the first step to the last")
        return self

    def sample_times(self, u: Tensor) -> tuple[Tensor]:
        """Return (t,), logit-normal."""
        third = u[:, 2]  # from which TVM draws s', so that both match velocities at the same times
        return (logit_normal(third, self.t_mean, self.t_std),)

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Any: guidance is classifier-free."""
        return (0.0, math.inf)

    def loss(self, student: Network, teacher: None, drawn: Draw, tangent_scale: float = 1.0) -> Loss:
        """Return `flow_matching_loss`; there is no derivative to scale."""
        return flow_matching_loss(self, student, drawn)

    def average_velocity(self, net: Network, x: Tensor, t: float, s: float, asked: Condition) -> Tensor:
        """Return u(x, t | none) + w (u(x, t | label) - u(x, t | none)), held over the step.

        One pass is enough where w is the number 1. Without label both u are the same, so w changes nothing.
        """
        velocity = super().average_velocity(net, x, t, t, asked)
        if isinstance(asked.w, (int, float)) and asked.w == 1:
            return velocity
        unlabelled = asked._replace(label=torch.full_like(asked.label, asked.null))
        free = super().average_velocity(net, x, t, t, unlabelled)
        w = asked.w * torch.ones_like(asked.label, dtype=torch.float64)
        return free + broadcast(w) * (velocity - free)

    def passes(self, auxiliary: bool = False) -> list[Pass]:
        """Return one plain pass of the student."""
        return [Pass()]


def flow_matching_loss(objective: Objective, student: Network, drawn: Draw) -> Loss:
    """Return mean |u(x_t, t) - v|^2 for each sample, u = k F in the parameterisation of `objective`.

    v is `Draw.velocity_at` t, which a network whose output is X can give. Where the objective trains an
    auxiliary head, the same of that is added.
    """
    t, w = objective.flow_time(drawn.times), drawn.w
    heads = {} if drawn.interval is None else {"head": "both"}
    found = student(drawn.at(t), t, torch.zeros_like(t), drawn.label, objective.beta(w), **heads)
    F, v = (found[0].value, found[1]) if heads else (found.value, None)
    u = broadcast(objective.scale(w) * torch.ones_like(w)) * F
    velocity = drawn.velocity_at(t)
    error = total = mean_square(u - velocity)
    if v is not None:
        total = error + mean_square(v.value - velocity)
    return Loss(total, {"flow_matching": Term(error.detach(), t)}, {"F": F.detach()})
