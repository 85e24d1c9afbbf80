"""The ComposerModel: a student, its averages, and one training step as a pure function of the batch."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from composer import ComposerModel
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn

from recipe.dit import Denoiser
from recipe.normalizer import Normalizer
from recipe.objectives.base import Loss, Network, Objective, draw
from recipe.objectives.flow_matching import flow_matching_loss
from recipe.text import Prompts, Text


def frozen_copy(net: nn.Module, shared: Iterable[nn.Parameter]) -> nn.Module:
    """Return a copy of the network that is never trained; it uses the parameters in `shared` itself."""
    return copy.deepcopy(net, {id(p): p for p in shared}).requires_grad_(False)


class GenerativeModel(ComposerModel):
    """net: the student; target: its fast average, the teacher of the loss (or None); ema: its slow
    average, the weights that are evaluated. All are sharded and checkpointed alike.

    A batch holds `image` or `latents`, `label`, `sample` (dataset ids) and `step` (see `StepKey`), all of
    length B, and `text` and `text_length` for a network with prompts. Every random draw is keyed by (seed,
    step, sample), so ranks, microbatches and resumes change nothing. A network without classes takes every
    label for its only one. adapter: what weights say of the student's (recipe/adapter.py); share: whether
    the averages use the student's own frozen weights instead of copies; not under FSDP2, which needs copies.
    tangent_scale, flow_matching: the state of the warm-ups, set before each step (`ScaleParameter`).
    """

    def __init__(
        self,
        net: Denoiser,
        objective: Objective,
        normalizer: Normalizer,
        seed: int,
        prompts: Prompts | None = None,
        adapter: dict[str, Any] | None = None,
        share: bool = False,
    ) -> None:
        super().__init__()
        for part in net.unused(objective.guidance_input, objective.auxiliary):
            part.requires_grad_(False)  # never evaluated, and DDP wants a gradient of all
        self.net = net
        frozen = [p for p in net.parameters() if share and not p.requires_grad]
        self.ema = frozen_copy(net, frozen)
        self.target = frozen_copy(net, frozen) if objective.teacher else None
        self.adapter = adapter
        self.objective, self.normalizer = objective, normalizer
        self.seed = seed
        self.prompts = prompts
        for i, match in enumerate(objective.matches.values() if objective.finishes else ()):
            self.add_module(f"match_{i}", match)  # not a list: FSDP2 takes none
        # DDP would send these from rank 0 in every step: they are equal on all ranks, but for a rank's sums.
        moments = [name for name, _ in self.named_buffers() if name.startswith("match_")]
        self._ddp_params_and_buffers_to_ignore = moments
        self.tangent_scale, self.flow_matching = 1.0, False

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """Return the loss of each sample (B,)."""
        config = self.net.config
        step, sample = batch["step"], batch["sample"]
        label = batch["label"].clamp(max=config.classes)
        with torch.no_grad():
            x0 = self.normalizer(batch, step, self.seed)
            drawn = draw(x0, label, step, sample, self.seed, self.objective, config)
        if self.prompts is not None:
            drawn = drawn._replace(text=Text(batch["text"], batch["text_length"]))
        student, teacher = self.prompted(self.net, drawn.text), self.prompted(self.target, drawn.text)
        if self.flow_matching:
            return flow_matching_loss(self.objective, student, drawn)
        return self.objective.loss(student, teacher, drawn, self.tangent_scale)

    def prompted(self, net: Denoiser | None, text: Text | None) -> Network | None:
        """Return the network, told the batch's prompts where it takes any."""
        return net if net is None or text is None else self.prompts(net, text)

    def loss(self, outputs: Loss, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the means over the microbatch; Composer differentiates `total` and logs all."""
        terms = {name: term.value.detach().mean() for name, term in outputs.terms.items()}
        return {"total": outputs.total.mean(), **terms}


class StepKey(Callback):
    """Writes the step into the batch, so that the forward pass depends on nothing else."""

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Add the batch's `step`, int64 (B,)."""
        state.batch["step"] = torch.full_like(state.batch["sample"], int(state.timestamp.batch))
