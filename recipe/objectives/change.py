"""What weights of one objective become under another, so that this finds the velocity that they hold."""

from __future__ import annotations

import torch

from recipe.dit import Denoiser
from recipe.objectives.base import Objective


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
