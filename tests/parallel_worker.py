"""Runs the same steps under several settings in one process group; rank 0 writes what came of them.

composer -n RANKS tests/parallel_worker.py DIGITS OUT 'NAME=DTYPE;override;...' ...

A case is 14 steps, of which losses and weights are written; one whose name begins with `gradients` is the
first step alone, from weights that are all far from zero, and its gradients are written. Besides the
configuration's keys: save_folder and load_path of Composer's own checkpoints, one every 6 steps.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from composer import Trainer
from composer.core import Callback
from composer.utils import dist
from torch.distributed.tensor import DTensor

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipe.config import TrainConfig, load_config
from recipe.data import train_loader
from recipe.model import StepKey
from recipe.optimizer import build_optimizer
from recipe.parallel import parallelism, unwrap
from recipe.train import build_algorithms, build_model
from tests.conftest import TINY, documented_objective, findings

STEPS = 14  # two after the second checkpoint; the joint form's queue is full after 13


class Losses(Callback):
    """Global mean loss and sorted sample ids of every step, in full precision."""

    def __init__(self):
        self.losses, self.samples = [], []

    def after_dataloader(self, state, logger):
        self.sum = torch.zeros(1, dtype=torch.float64)
        ids = dist.all_gather_object(state.batch["sample"].tolist())
        self.samples.append(sorted(i for part in ids for i in part))

    def after_loss(self, state, logger):
        self.sum += state.outputs.total.detach().sum().double()

    def batch_end(self, state, logger):
        dist.all_reduce(self.sum)
        self.losses.append(self.sum.item() / len(self.samples[-1]))


class Gradients(Callback):
    """The gradient of every trained weight in the last step, whole, over all ranks and microbatches."""

    def after_train_batch(self, state, logger):
        net = unwrap(state.model).net
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.last = {name: p.grad if p.grad is None else full(p.grad).clone() for name, p in trained.items()}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def perturb(model):
    """Add the same noise to student and averages: a new network's output is zero, as are most gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.net.named_parameters():
            noise = 0.1 * torch.randn(p.shape, generator=generator)
            nets = filter(None, (model.net, model.target, model.ema))
            for one in {net.get_parameter(name) for net in nets}:  # below an adapter they share it
                one.add_(noise)


def build(digits, dtype, overrides, steps, callback, **paths):
    example = "objective.name=alpha_flow" in overrides  # of the documentation: no run knows it by its name
    known = [o for o in overrides if not (example and o.startswith("objective."))]
    config = load_config(TrainConfig, "yamls/digits.yaml", [f"data.local={digits}", *TINY, *known])
    if example:
        config.objective = documented_objective()(kappa=0.25)
    model, sharding = build_model(config, findings(config)), parallelism(config.parallel, "cpu")
    if isinstance(callback, Gradients):
        perturb(model)
    if dtype == "bf16":  # Composer has no bf16 on a CPU: what its trainer and amp_bf16 do on a GPU
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        if sharding:
            sharding.fsdp2.mixed_precision = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
    else:
        model = model.to(getattr(torch, dtype))
    return Trainer(
        model=model,
        train_dataloader=train_loader(config.data, config.seed, config.model.text),
        optimizers=build_optimizer(model.net, config.optimizer),
        max_duration=f"{steps}ba",
        algorithms=build_algorithms(config),
        callbacks=[StepKey(), callback],
        parallelism_config=sharding,
        device="cpu",
        device_train_microbatch_size=config.microbatch,
        progress_bar=False,
        save_interval="6ba",
        save_filename="ba{batch}.pt",
        **paths,
    )


def run(digits, dtype, overrides):
    paths = dict(o.split("=") for o in overrides if o.startswith(("save_folder", "load_path")))
    overrides = [o for o in overrides if o.split("=")[0] not in paths]
    losses = Losses()
    trainer = build(digits, dtype, overrides, STEPS, losses, **paths)
    trainer.fit()
    model = unwrap(trainer.state.model)
    weights = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
    trainer.close()
    return {"losses": losses.losses, "samples": losses.samples, "weights": weights}


def gradients(digits, dtype, overrides):
    torch._dynamo.reset()
    found = Gradients()
    trainer = build(digits, dtype, overrides, 1, found)
    trainer.fit()
    trainer.close()
    return found.last


def main():
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="aot_eager")  # traces like inductor, in far less time
    dist.initialize_dist("cpu")
    digits, out, *cases = sys.argv[1:]
    results = {}
    for case in cases:
        name, settings = case.split("=", 1)
        dtype, *overrides = settings.split(";")
        results[name] = (gradients if name.startswith("gradients") else run)(digits, dtype, overrides)
    if dist.get_global_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main()
