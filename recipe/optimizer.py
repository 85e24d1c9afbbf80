"""The optimizer, and the learning rate of every step as a function of the step and the settings alone.

Nothing about the rate is taken from a checkpoint: a resumed run, also one with another rate, schedule,
warm-up or duration, takes every step at the rate that its settings name for that step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from recipe.muon import Muon
from recipe.settings import BelowOne, DurationOrZero, NotNegative, Positive, Settings

if TYPE_CHECKING:
    from recipe.config import TrainConfig


@dataclass
class OptimizerConfig(Settings):
    """The optimizer and its learning rate over time; the defaults are the paper's."""

    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="AdamW, or Muon for the matrices in blocks with AdamW for all other weights.",
    )
    lr: Positive = Field(1e-4, description="Learning rate after the warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="How the learning rate goes on after the warm-up; linear and cosine reach zero at the "
        "end of duration.",
    )
    warmup: DurationOrZero = Field(
        "0ba",
        description="Time over which the learning rate grows linearly: over N steps it is lr/N in the first "
        "and lr in the last of them.",
    )
    betas: list[BelowOne] = Field(
        [0.9, 0.95],
        min_length=2,
        max_length=2,
        description="Decay per step of AdamW's running means of the gradient and of its square.",
    )
    eps: Positive = Field(1e-8, description="Number that AdamW adds to the root of the second moment.")
    weight_decay: NotNegative = Field(
        0.0, description="Decoupled weight decay, which is multiplied by the learning rate."
    )
    momentum: BelowOne = Field(0.95, description="Decay per step of Muon's running mean of the gradient.")


def build_optimizer(net: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return the optimizer of all trained parameters of `net`."""
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    settings = {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(trained.values(), fused=True, **settings)
    matrices = [p for name, p in trained.items() if hidden_matrix(name, p)]
    others = [p for name, p in trained.items() if not hidden_matrix(name, p)]
    return Muon(matrices, others, config.momentum, fused=True, **settings)


def hidden_matrix(name: str, p: Tensor) -> bool:
    """Return True for the matrices in blocks, which Muon updates."""
    return p.dim() == 2 and "blocks." in name


def take_settings(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Let the settings, not the checkpoint, say how to go on: loading restores those of the past run."""
    for group in optimizer.param_groups:
        group.update(betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay)
        if group.get("momentum") is not None:
            group["momentum"] = config.momentum


def in_steps(time: str, steps_per_epoch: int, batch_size: int) -> int:
    """Convert a time such as 2400ba, 3ep or 76800sp to optimizer steps, rounded up."""
    parsed = Time.from_timestring(time)
    if parsed.unit == TimeUnit.EPOCH:
        return parsed.value * steps_per_epoch
    return math.ceil(parsed.value / batch_size) if parsed.unit == TimeUnit.SAMPLE else parsed.value


def learning_rate(config: OptimizerConfig, step: int, warmup: int, duration: int) -> float:
    """Return the rate of step k = 0, 1, ..., where a warm-up takes N steps and the run T.

    Warm-up: lr (k + 1) / N for k < N: the first step counts, and step N - 1 is the first at the full rate.
    Then, with u = (k - N) / (T - N): constant, lr; linear, lr (1 - u); cosine, lr (1 + cos(pi u)) / 2.
    """
    if step < warmup:
        return config.lr * ((step + 1) / warmup)
    u = min(1.0, (step - warmup) / max(1, duration - warmup))
    factor = {"constant": 1.0, "linear": 1 - u, "cosine": (1 + math.cos(math.pi * u)) / 2}[config.schedule]
    return config.lr * factor


class LearningRate(Callback):
    """Sets the learning rate before each step, and logs it."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def batch_start(self, state: State, logger: Logger) -> None:
        """Set the rate of all weights."""
        rate = rate_of_step(self.config, int(state.timestamp.batch), len(state.train_dataloader))
        for group in state.optimizers[0].param_groups:
            group["lr"] = rate
        logger.log_metrics({"train/learning_rate": rate})


def rate_of_step(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate that a run of these settings has at a step, numbered from 0."""
    o, batch = config.optimizer, config.data.batch_size
    warmup, duration = (in_steps(time, steps_per_epoch, batch) for time in (o.warmup, config.duration))
    return learning_rate(o, step, warmup, duration)
