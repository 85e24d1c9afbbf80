"""Composer algorithms of the method: weight averages, and what guards and scales a step."""

from __future__ import annotations

import copy
import logging
from typing import Annotated

import numpy as np
import torch
from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from recipe.objectives.base import Loss, Objective
from recipe.settings import BelowOne, Count, CountOrZero, Many, Positive, Says, Settings

log = logging.getLogger(__name__)
GROUP = 12  # tensors that are averaged by one kernel
MAX_LENGTH = 12**-0.5  # gamma = 0, the plain mean of the run
Profile = tuple[float, int]  # (gamma, step t)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """The shards that this rank holds; plain tensors stay as they are."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


@torch.no_grad()
def ema_update(net: nn.Module, averages: list[tuple[nn.Module, float]]) -> None:
    """average <- net + decay (average - net) for each (average, decay), in place, on whatever shard this rank
    holds (no gather). On a GPU one kernel reads the weights once for all of them.
    """
    for root in (net, *(average for average, _ in averages)):
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward pass weights stay gathered, in a copy to be dropped
    weights = local(list(net.parameters()))
    targets = [local(list(average.parameters())) for average, _ in averages]
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
    """Decay of update number `update` (from 0): constant, or min(decay, (1 + k) / (10 + k)) with `ramp`."""
    return min(decay, (1 + update) / (10 + update)) if ramp else decay


def stepped(net: nn.Module) -> bool:
    """Whether the optimizer moved the weights: a skipped step leaves no gradient behind."""
    return any(p.grad is not None for p in net.parameters())


def exponent(length: float) -> float:
    """gamma of the power-function average of a length, from 0 to 12^-1/2; post-hoc EMA (EDM2, Karras et al.
    2024, section 3 and appendix C), by which the length is chosen after training.

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
    """Decay of the update after step number `step`, from 1: (1 - 1/step)^(gamma + 1)."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles over 0 <= tau <= min(t_a, t_b)."""
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
    """Name of the module that keeps the average of this length: 0.05 => posthoc_050."""
    return f"posthoc_{round(length * 1000):03d}"


def average_of_child(name: str) -> str:
    """Name of the average in a JSON and in a sweep: posthoc_050 => posthoc:0.05, ema => ema."""
    kind, _, thousandths = name.partition("_")
    return f"{kind}:{int(thousandths) / 1000:g}" if thousandths else kind


def length_of(average: str) -> float:
    """posthoc:0.05 => 0.05. Raises ValueError for anything else, and for an impossible length."""
    kind, _, number = average.partition(":")
    if kind != "posthoc":
        raise ValueError(f"average {average!r} is not posthoc:LENGTH")
    length = float(number)
    exponent(length)
    return length


def thousandths(length: float) -> float:
    """A length that has a name, see `child_name`. Raises ValueError."""
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

    target_decay: BelowOne = Field(
        0.99, description="Decay per step of the teacher's average, the target of TVM's loss."
    )
    decay: BelowOne = Field(0.9999, description="Decay per step of the average that is evaluated.")
    ramp: bool = Field(
        False, description="Whether the evaluated average starts short and grows, which short runs need."
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
        """Before the model is sharded, and after each optimizer step."""
        return event in (Event.INIT, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Add the post-hoc averages; update all averages in place. A skipped step changes none of them."""
        model = unwrap(state.model)
        if event == Event.INIT:
            for length in self.config.posthoc:
                model.add_module(child_name(length), copy.deepcopy(model.ema))
            return
        if not stepped(model.net):
            return
        step = int(state.timestamp.batch)
        decays = {child_name(x): posthoc_decay(exponent(x), step) for x in self.config.posthoc}
        decays["ema"] = ema_decay(self.config.decay, step - 1, self.config.ramp)
        decays["target"] = self.config.target_decay
        names = average_names(self.config, model.objective)
        ema_update(model.net, [(getattr(model, name), decays[name]) for name in names])


def unwrap(model: nn.Module) -> nn.Module:
    """The ComposerModel inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Global L2 norm of the gradients, over all shards and ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class DivergedError(RuntimeError):
    """Training has left the numbers, and further steps cannot mend it. `step`: steps before that began."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def check_finite(net: nn.Module, step: int) -> None:
    """Raises DivergedError, on all ranks, where one of them has a weight that is not finite.

    Asked before weights are written: a finite gradient does not tell what the update made of it.
    """
    good = torch.stack([p.isfinite().all() for p in local(list(net.parameters()))]).all().int()
    dist.all_reduce(good, "MIN")
    if not good:
        raise DivergedError(f"step {step}: the weights are not finite, so they are not saved", step)


@dataclass
class StepConfig(Settings):
    """What guards a step of training."""

    tangent_warmup: CountOrZero = Field(
        0,
        description="Steps over which the derivative in the loss grows to its full size, from the first that "
        "has one, after objective.flow_matching_first; 0 turns this off.",
    )
    clip: Positive | None = Field(
        None, description="Largest global norm of the gradient; null turns clipping off."
    )
    max_skipped: Count = Field(
        5, description="Number of steps in a row without a finite gradient after which the run ends."
    )


def steps_since(start: Time, state: State) -> int:
    """Steps from `start`, a time in ba, ep or sp, to the one that begins; negative before it.

    It follows from where the run stands, so a resumed run goes on as if it had never stopped.
    """
    now = state.timestamp
    if start.unit == TimeUnit.EPOCH:
        return (int(now.epoch) - start.value) * int(state.dataloader_len) + int(now.batch_in_epoch)
    if start.unit == TimeUnit.SAMPLE:
        return (int(now.sample) - start.value) // (len(state.batch["sample"]) * dist.get_world_size())
    return int(now.batch) - start.value


class StepGuard(Algorithm):
    """Warms a run up and guards every step; flow_matching_first: how long plain velocities are matched.

    A step whose gradient is not finite is no step at all: weights, averages and optimizer state stay as they
    are, and the ids of the samples with a non-finite loss are logged; after `max_skipped` in a row, or where
    the weights themselves are not finite, the run stops with DivergedError.
    """

    def __init__(self, config: StepConfig, flow_matching_first: str | None = None) -> None:
        self.config, self.flow_matching_first = config, Time.from_input(flow_matching_first or "0ba")
        self.skipped = self.skipped_in_row = 0
        self.bad_samples: list[int] = []

    def match(self, event: Event, state: State) -> bool:
        """Around each loss, and between the backward pass and the optimizer."""
        return event in (Event.BATCH_START, Event.AFTER_LOSS, Event.AFTER_TRAIN_BATCH)

    def state_dict(self) -> dict[str, int]:
        """Counters travel with the checkpoint."""
        return {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}

    def load_state_dict(self, state: dict[str, int], strict: bool = False) -> None:
        """Restore the counters."""
        self.skipped, self.skipped_in_row = state["skipped"], state["skipped_in_row"]

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Dispatch to the event's work."""
        model = unwrap(state.model)
        if event == Event.BATCH_START:
            self.losses: list[tuple[Tensor, Tensor]] = []
            step, warmup = steps_since(self.flow_matching_first, state), self.config.tangent_warmup
            model.flow_matching = step < 0
            model.tangent = min(1.0, max(0, step) / warmup) if warmup else 1.0
        elif event == Event.AFTER_LOSS:
            self.losses.append((state.batch["sample"], state.outputs.total.detach()))
            logger.log_metrics(residuals(state.outputs))
        else:
            self.guard(state, list(model.net.parameters()), logger)

    def guard(self, state: State, parameters: list[nn.Parameter], logger: Logger) -> None:
        """Clip the gradient, or drop it where it is not finite."""
        norm = gradient_norm(parameters)
        if torch.isfinite(norm):
            self.skipped_in_row = 0
            if self.config.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        else:
            for p in parameters:
                p.grad = None
            check_finite(unwrap(state.model).net, int(state.timestamp.batch))
            self.report(state)
        logger.log_metrics({"train/gradient_norm": norm.item(), "train/skipped_steps": self.skipped})

    def report(self, state: State) -> None:
        """Count a skipped step, name its samples, stop the run after too many."""
        self.skipped += 1
        self.skipped_in_row += 1
        mine = [i for sample, loss in self.losses for i in sample[~torch.isfinite(loss)].tolist()]
        self.bad_samples = [i for part in dist.all_gather_object(mine) for i in part]
        message = (
            f"step {int(state.timestamp.batch)}: gradient not finite, step skipped "
            f"({self.skipped_in_row} in a row, {self.skipped} in all); "
            f"samples with a non-finite loss: {self.bad_samples or 'none'}"
        )
        log.warning(message)
        if self.skipped_in_row >= self.config.max_skipped:
            begin = int(state.timestamp.batch) + 1 - self.skipped_in_row
            raise DivergedError(f"{message}; step.max_skipped is {self.config.max_skipped}", begin)


def residuals(loss: Loss) -> dict[str, Tensor]:
    """RMS of what was evaluated and of the loss's terms over this rank's microbatch."""
    rms = {f"train/rms_{name}": value.square().mean().sqrt() for name, value in loss.evaluated.items()}
    return rms | {f"train/rms_{name}": term.value.mean().sqrt() for name, term in loss.terms.items()}
