"""Terminal Velocity Matching (arXiv 2511.19797): times, displacement map, loss.

In the notation of `base.py`, with k = w in the scaled parameterisation and 1 otherwise:

    displacement        f(x, t, s) = (s - t) k F(x, t, t - s)
    velocity            u(x, s)    = k F(x, s, 0)
    terminal condition  d/ds f(x_t, t, s) = u(x_t + f(x_t, t, s), s)
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from recipe.dual import Dual
from recipe.objectives.base import (
    Draw,
    Guided,
    Loss,
    Network,
    Pass,
    Term,
    broadcast,
    logit_normal,
    mean_square,
)
from recipe.settings import Positive, Share

SAMPLERS = ("gap*", "gap", "trunc", "clamp")


@dataclass
class TVM(Guided):
    """Terminal Velocity Matching: one network for any number of steps, with a teacher's average."""

    name: Literal["tvm"] = Field("tvm", description="Terminal Velocity Matching, the default.")
    scaled: bool = Field(True, description="Whether the network's output is multiplied by w (k = w).")
    times: Literal[SAMPLERS] = Field(
        "gap*",
        description="Law of the times: of gap t - s and s, with s' independent (gap*) or equal to s (gap), "
        "or of t and s, with s drawn below t (trunc) or cut there (clamp).",
    )
    equal_share: Share = Field(0.0, description="Probability of t = s.")
    gap_mean: float = Field(-0.8, description="Mean of the logit-normal law of the gap t - s.")
    gap_std: Positive = Field(1.0, description="Deviation of the logit-normal law of the gap t - s.")
    s_mean: float = Field(-0.4, description="Mean of the logit-normal law of s.")
    s_std: Positive = Field(1.0, description="Deviation of the logit-normal law of s.")
    t_mean: float = Field(-0.4, description="Mean of the logit-normal law of t, for trunc and clamp.")
    t_std: Positive = Field(1.0, description="Deviation of the logit-normal law of t, for trunc and clamp.")
    detach_jvp: bool = Field(False, description="Whether no gradient goes through dF/ds, which saves time.")

    teacher: ClassVar[bool] = True

    def sample_times(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (t, s, s'), with 0 <= s <= t <= 1.

        gap*: gap = t - s is logit-normal, s is logit-normal truncated to s < 1 - gap, s' is independent.
        gap: the same with s' = s. trunc: t is logit-normal, s logit-normal truncated to s < t, s' = s.
        clamp: s = min(s, t) of two independent logit-normal draws, s' = s. The last column decides t = s.
        """
        first, second, third, equal = u.unbind(-1)
        if self.times.startswith("gap"):
            gap = logit_normal(first, self.gap_mean, self.gap_std)
            s = truncated_logit_normal(second, self.s_mean, self.s_std, 1 - gap)
            t = (s + gap).clamp(max=1)
        else:
            t = logit_normal(first, self.t_mean, self.t_std)
            if self.times == "trunc":
                s = truncated_logit_normal(second, self.s_mean, self.s_std, t)
            else:
                s = torch.minimum(logit_normal(second, self.s_mean, self.s_std), t)
        s_prime = logit_normal(third, self.s_mean, self.s_std) if self.times == "gap*" else s
        return torch.where(equal < self.equal_share, s, t), s, s_prime

    def flow_time(self, times: tuple[Tensor, ...]) -> Tensor:
        """Return s'."""
        return times[2]

    def sample_guidance(self, u: Tensor, unlabelled: Tensor) -> Tensor:
        """Sample w uniformly from the guidance range; use 1 where there is no label."""
        low, high = self.guidance_range
        return self.guide(low + (high - low) * u, unlabelled)

    def guide(self, w: Tensor, unlabelled: Tensor) -> Tensor:
        """Return w, or 1 where there is no label: the only weight at which "none" is trained."""
        return torch.where(unlabelled, 1.0, w)

    def scale(self, w: Tensor | float) -> Tensor | float:
        """Return w if the network's output is scaled, else 1."""
        return w if self.scaled else 1.0

    def loss(self, student: Network, teacher: Network, drawn: Draw, tangent_scale: float = 1.0) -> Loss:
        """Return the terminal and the flow-matching term of each sample (paper, eq. 15), weighted by beta^2.

        terminal      = beta^2 mean |df/ds - sg u_T(sg(x_t + f), s)|^2, and 0 where t = s
        flow matching = beta^2 mean |u(x_s', s') - (w v + (1 - w) sg u_T(x_s', s', no label, w = 1))|^2

        The teacher T's two halves are one call; the second is left out where w is 1 by configuration.
        """
        t, s, s_prime = drawn.times
        label, w = drawn.label, drawn.w
        beta, k = 1 / w, self.scale(w) * torch.ones_like(w)
        zero = torch.zeros_like(s)
        x_t, x_s = drawn.at(t), drawn.at(s_prime)
        f, F = displacement(student, x_t, t, s, label, beta, k, tangent_scale, self.detach_jvp)

        with torch.no_grad():
            x_f, v_target = x_t + f.value, drawn.velocity_at(s_prime)
            if self.guidance_range == (1, 1):
                conditional = teacher(x_f, s, zero, label, beta).value
            else:
                conditional, unconditional = teacher(
                    torch.cat([x_f, x_s]),
                    torch.cat([s, s_prime]),
                    torch.cat([zero, zero]),
                    torch.cat([label, drawn.null_label]),
                    torch.cat([beta, torch.ones_like(beta)]),
                ).value.chunk(2)
                v_target = broadcast(w) * v_target + broadcast(1 - w) * unconditional
            u_terminal = broadcast(k) * conditional

        different = ~torch.isclose(s, t, rtol=1e-5, atol=1e-8)
        terminal = torch.where(different, mean_square(broadcast(beta) * (f.tangent - u_terminal)), 0.0)
        u = broadcast(k) * student(x_s, s_prime, zero, label, beta).value
        flow_matching = mean_square(broadcast(beta) * (u - v_target))
        terms = {
            "terminal": Term(terminal.detach(), t - s),
            "flow_matching": Term(flow_matching.detach(), s_prime),
        }
        return Loss(terminal + flow_matching, terms, {"F": F.value.detach(), "dF_ds": F.tangent.detach()})

    def passes(self, auxiliary: bool = False) -> list[Pass]:
        """Return the passes: dual student, teacher (twice where w is not always 1), plain student."""
        return [
            Pass(dual=True, gradient="value" if self.detach_jvp else "both"),
            Pass(gradient="none", batches=1 if self.guidance_range == (1, 1) else 2, teacher=True),
            Pass(),
        ]


def displacement(
    net: Network,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    label: Tensor,
    beta: Tensor,
    k: Tensor,
    tangent_scale: float = 1.0,
    detach_jvp: bool = False,
) -> tuple[Dual, Dual]:
    """Return f(x, t, s) = (s - t) k F with its derivative df/ds = k (F + (s - t) dF/ds), and F with dF/ds.

    x and t are held fixed; s enters the network through d = t - s alone, whose tangent is -1. tangent_scale:
    factor of dF/ds (tangent warm-up; 1 is the paper); detach_jvp: no gradient through dF/ds.
    """
    F = net(x, t, Dual(t - s, -torch.ones_like(s)), label, beta, detach_tangent=detach_jvp)
    k, span = broadcast(k), broadcast(s - t)
    return Dual(span * k * F.value, k * (F.value + span * tangent_scale * F.tangent)), F


def truncated_logit_normal(u: Tensor, mean: float, std: float, upper: Tensor) -> Tensor:
    """Return quantiles of the logit-normal law conditioned on being below `upper`."""
    mass = torch.special.ndtr((torch.logit(upper) - mean) / std)
    return logit_normal(u * mass, mean, std).clamp(max=upper)
