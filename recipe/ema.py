"""Averages of the weights: the algorithm that keeps them in training, and post-hoc averages of any length."""

from itertools import compress
from typing import Annotated

import numpy as np
import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from recipe.guard import stepped
from recipe.model import frozen_copy
from recipe.objectives.base import Objective
from recipe.parallel import local_shards, unwrap
from recipe.settings import BelowOne, Many, Says, Settings

GROUP = 12  # tensors that are averaged by one kernel
MAX_LENGTH = 12**-0.5  # gamma = 0, the plain mean of the run
Profile = tuple[float, int]  # (gamma, step t)


@torch.no_grad()
def ema_update(net: nn.Module, averages: list[tuple[nn.Module, float]]) -> None:
    """Update each (average, decay) in place, average <- net + decay (average - net).

    This works on whatever shard a rank holds, without gathering; what is not trained stays as it is. On a GPU
    one kernel reads the weights once for all averages.
    """
    for root in (net, *(average for average, _ in averages)):
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward pass weights stay gathered, in a copy to be dropped
    moving = [p.requires_grad for p in net.parameters()]
    weights, *targets = (
        local_shards(list(compress(root.parameters(), moving))) for root in (net, *(a for a, _ in averages))
    )
    if weights[0].is_cuda:  # a decay as a tensor: a new number compiles nothing anew
        compiled_lerps(weights, targets, [torch.tensor(1 - decay) for _, decay in averages])
    else:
        lerps(weights, targets, [1 - decay for _, decay in averages])


def lerps(ends: list[Tensor], starts: list[list[Tensor]], shares: list[float | Tensor]) -> None:
    """Move each list of tensors, in place, its share of the way to `ends`.

    In groups, since Inductor merges only what stands close together.
    """
    for first in range(0, len(ends), GROUP):
        group = slice(first, first + GROUP)
        for tensors, share in zip(starts, shares, strict=True):
            torch._foreach_lerp_(tensors[group], ends[group], share)


compiled_lerps = torch.compile(lerps, fullgraph=True, dynamic=False)


def ema_decay(decay: float, update: int, ramp: bool) -> float:
    """Return the decay of update k = 0, 1, ...: constant, or min(decay, (1 + k) / (10 + k)) with `ramp`."""
    return min(decay, (1 + update) / (10 + update)) if ramp else decay


def exponent(length: float) -> float:
    """Return gamma of the power-function average of a length, from 0 to 12^-1/2.

    Post-hoc EMA (EDM2, Karras et al. 2024, section 3 and appendix C) chooses the length after training.

    At step t it weights the past by its profile p_(gamma,t)(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),
    0 <= tau <= t, whose width relative to t, the length, does not depend on t. Two such averages are kept
    during training; from their snapshots any other is synthesised by least squares. Here gamma solves

        length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises ValueError unless 0 < length <= 12^-1/2 (gamma >= 0).
    """
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"posthoc length {length} must lie in (0, {MAX_LENGTH:.3f}]")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def posthoc_decay(gamma: float, step: int) -> float:
    """Return the decay of the update after step number `step`, from 1: (1 - 1/step)^(gamma + 1)."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_product(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles over 0 <= tau <= min(t_a, t_b)."""
    (early_gamma, early), (late_gamma, late) = sorted((a, b), key=lambda profile: profile[1])
    scale = (early_gamma + 1) * (late_gamma + 1) / ((early_gamma + late_gamma + 1) * late)
    return scale * (early / late) ** late_gamma


def combination(snapshots: list[Profile], target: Profile) -> np.ndarray:
    """Return factors of the snapshots, whose sum has the profile closest to the target's in the mean square.

    They are divided by their sum (EDM2, appendix C), as every profile is an average: with few snapshots the
    closest sum would shrink the weights. Raises ValueError where two snapshots have the same profile.
    """
    gram = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    try:
        factors = np.linalg.solve(gram, [inner_product(a, target) for a in snapshots])
    except np.linalg.LinAlgError as error:
        raise ValueError("two of the post-hoc averages have the same length and step") from error
    return factors / factors.sum()


def child_name(length: float) -> str:
    """Return the name of the module that keeps the average of this length: 0.05 => posthoc_050."""
    return f"posthoc_{round(length * 1000):03d}"


def average_of_child(name: str) -> str:
    """Return the name of an average in a JSON and in a sweep: posthoc_050 => posthoc:0.05, ema => ema."""
    kind, _, thousandths = name.partition("_")
    return f"{kind}:{int(thousandths) / 1000:g}" if thousandths else kind


def length_of(average: str) -> float:
    """Return 0.05 for posthoc:0.05. Raises ValueError for anything else, and for an impossible length."""
    kind, _, number = average.partition(":")
    if kind != "posthoc":
        raise ValueError(f"average {average!r} is not posthoc:LENGTH")
    length = float(number)
    exponent(length)
    return length


def thousandths(length: float) -> float:
    """Return a length that has a name, see `child_name`. Raises ValueError for any other."""
    if round(length, 3) != length:
        raise ValueError
    return length


Length = Annotated[
    float,
    Field(ge=0.001, le=MAX_LENGTH),
    AfterValidator(thousandths),
    Says(f"must be in [0.001, {MAX_LENGTH:.3f}], in thousandths"),
]


@dataclass
class EMAConfig(Settings):
    """Averages of the weights over training; each costs one more copy of the weights."""

    target_decay: BelowOne = Field(0.99, description="Decay per step of the teacher's average, TVM's target.")
    decay: BelowOne = Field(0.9999, description="Decay per step of the average that is evaluated.")
    ramp: bool = Field(
        False, description="Whether the evaluated average starts short and grows, for short runs."
    )
    posthoc: Many[Length] = Field(
        [],
        description="Lengths, relative to the training, of further averages to keep and export, from which "
        "any length can be had afterwards, such as [0.05, 0.1].",
    )


def average_names(config: EMAConfig, objective: Objective) -> list[str]:
    """Return the names of the model's averages of the weights; each is one more copy of them."""
    posthoc = dict.fromkeys(map(child_name, config.posthoc))
    return [*posthoc, "ema", *(["target"] if objective.teacher else [])]


class EMA(Algorithm):
    """Keeps the averages of the student: modules of the model, so sharded and checkpointed like it."""

    def __init__(self, config: EMAConfig) -> None:
        self.config = config

    def match(self, event: Event, state: State) -> bool:
        """Act before the model is sharded, and after each optimizer step."""
        return event in (Event.INIT, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Add the post-hoc averages; update all averages in place. A skipped step changes none of them."""
        model = unwrap(state.model)
        if event == Event.INIT:
            shared = {*model.ema.parameters()} & {*model.net.parameters()}
            for length in self.config.posthoc:
                model.add_module(child_name(length), frozen_copy(model.ema, shared))
            return
        if not stepped(model.net):
            return
        step = int(state.timestamp.batch)
        decays = {child_name(x): posthoc_decay(exponent(x), step) for x in self.config.posthoc}
        decays["ema"] = ema_decay(self.config.decay, step - 1, self.config.ramp)
        decays["target"] = self.config.target_decay
        names = average_names(self.config, model.objective)
        ema_update(model.net, [(getattr(model, name), decays[name]) for name in names])
