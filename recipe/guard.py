"""The algorithm that keeps a step of training stable: warm-ups, clipping, and steps that are skipped."""

import logging

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recipe.objectives.base import Loss
from recipe.optimizer import in_steps
from recipe.parallel import local_shards, unwrap
from recipe.settings import Count, CountOrZero, Positive, Settings

log = logging.getLogger(__name__)


def stepped(net: nn.Module) -> bool:
    """Return True if the optimizer moved the weights: a skipped step leaves no gradient behind."""
    return any(p.grad is not None for p in net.parameters())


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the global L2 norm of the gradients, over all shards and ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class DivergedError(RuntimeError):
    """Training has diverged: weights or gradients stay not finite. step: steps before that began."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def check_finite(net: nn.Module, step: int) -> None:
    """Raise DivergedError, on all ranks, where one of them has a weight that is not finite.

    This is asked before weights are written: a finite gradient does not tell what the update made of it.
    """
    good = torch.stack([p.isfinite().all() for p in local_shards(list(net.parameters()))]).all().int()
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
        None, description="Largest global norm of the gradient; null for no clipping."
    )
    max_skipped: Count = Field(
        5, description="Number of steps in a row without a finite gradient after which the run ends."
    )


class ScaleParameter(Algorithm):
    """Keeps training stable where the network's output is scaled, u = w F, and differentiated.

    It warms a run up (plain velocities for the time `flow_matching_first`, then a growing derivative), clips
    the gradient, and logs the RMS of the network's output F, its derivative and the loss's terms. A step
    whose gradient is not finite is no step at all: weights, averages and optimizer state stay as they are,
    and the ids of the samples with a non-finite loss are logged; after `max_skipped` in a row, or where the
    weights themselves are not finite, the run stops with DivergedError.
    """

    __qualname__ = "StepGuard"  # by which checkpoints know its counters, from before it had this name

    def __init__(self, config: StepConfig, flow_matching_first: str | None = None) -> None:
        self.config = config
        self.flow_matching_first = flow_matching_first
        self.skipped = 0
        self.skipped_in_row = 0
        self.bad_samples: list[int] = []

    def match(self, event: Event, state: State) -> bool:
        """Act before the loss, after it, and between the backward pass and the optimizer."""
        return event in (Event.BATCH_START, Event.AFTER_LOSS, Event.AFTER_TRAIN_BATCH)

    def state_dict(self) -> dict[str, int]:
        """Return the counters, which go into the checkpoint."""
        return {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}

    def load_state_dict(self, state: dict[str, int], strict: bool = False) -> None:
        """Restore the counters."""
        self.skipped, self.skipped_in_row = state["skipped"], state["skipped_in_row"]

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Set the warm-ups before the loss, note it, and guard the gradient after the backward pass."""
        model = unwrap(state.model)
        if event == Event.BATCH_START:
            self.losses: list[tuple[Tensor, Tensor]] = []
            step, warmup = int(state.timestamp.batch), self.config.tangent_warmup
            if self.flow_matching_first:
                batch = len(state.batch["sample"]) * dist.get_world_size()
                step -= in_steps(self.flow_matching_first, int(state.dataloader_len), batch)
            model.flow_matching = step < 0
            model.tangent_scale = min(1.0, max(0, step) / warmup) if warmup else 1.0
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
    """Return the RMS, over this rank's microbatch, of what was evaluated and of the loss's terms."""
    rms = {f"train/rms_{name}": value.square().mean().sqrt() for name, value in loss.evaluated.items()}
    return rms | {f"train/rms_{name}": term.value.mean().sqrt() for name, term in loss.terms.items()}
