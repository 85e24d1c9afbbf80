"""The learning rate of every step: from the settings alone, on a straight run and after a resume."""

import json
import math

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from recipe.adapter import AdapterConfig, add_adapter
from recipe.checkpoints import Resume
from recipe.config import OptimizerConfig, TrainConfig, load_config
from recipe.muon import orthogonal
from recipe.networks import build
from recipe.optimizer import build_optimizer, in_steps, learning_rate, rate_of_step, take_settings
from recipe.preemption import Preemption
from recipe.train import build_trainer
from tests.conftest import TINY, findings


def rates(schedule, warmup, duration):
    config = OptimizerConfig(lr=0.5, schedule=schedule)
    return [learning_rate(config, step, warmup, duration) for step in range(duration)]


def test_the_first_step_of_a_warm_up_counts_and_its_last_has_the_full_rate():
    assert rates("constant", 4, 6) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert rates("constant", 0, 3) == [0.5, 0.5, 0.5]


def test_schedules_fall_from_the_full_rate_to_zero_where_the_run_ends():
    assert rates("linear", 2, 6) == [0.25, 0.5, 0.5, 0.375, 0.25, 0.125]
    assert rates("cosine", 0, 4) == pytest.approx(
        [0.5, 0.25 + math.sqrt(0.5) / 4, 0.25, 0.25 - math.sqrt(0.5) / 4]
    )
    for schedule in ("linear", "cosine"):
        assert learning_rate(OptimizerConfig(schedule=schedule), 6, 2, 6) == 0
        assert learning_rate(OptimizerConfig(schedule=schedule), 9, 2, 6) == 0


def test_times_in_steps():
    assert [in_steps(time, 7, 256) for time in ("12ba", "3ep", "512sp", "513sp")] == [12, 21, 2, 3]


def test_a_warmup_has_any_unit():
    overrides = ["data.batch_size=256", "optimizer.lr=0.01", "duration=6ba"]
    for warmup in ("2ba", "512sp", "500sp"):
        config = load_config(TrainConfig, "yamls/digits.yaml", [*overrides, f"optimizer.warmup={warmup}"])
        assert [rate_of_step(config, step, 7) for step in range(3)] == [0.005, 0.01, 0.01]


def logged_rates(digits, folder, *overrides, load_path=None):
    """Steps and rates in train.jsonl of a run in this process."""
    overrides = [
        f"data.local={digits}",
        f"folder={folder}",
        "log.interval=1",
        "grid.interval=null",
        *overrides,
    ]
    config = load_config(TrainConfig, "yamls/digits.yaml", [*TINY, "data.batch_size=256", *overrides])
    resume = load_path and Resume(load_path, load_path, None)
    trainer = build_trainer(config, findings(config), resume, Preemption(None))
    used = []
    step = trainer.state.optimizers[0].step
    trainer.state.optimizers[0].step = lambda *a, **k: (
        used.append(trainer.state.optimizers[0].param_groups[0]["lr"]),
        step(*a, **k),
    )[1]
    trainer.fit()
    trainer.close()
    lines = (folder / "train.jsonl").read_text().splitlines()[-len(used) :]
    assert [json.loads(line)["train/learning_rate"] for line in lines] == used
    return used


def test_every_step_has_its_rate_also_after_a_resume_with_other_settings(digits, tmp_path):
    decay = ["optimizer.lr=0.01", "optimizer.schedule=linear", "optimizer.warmup=2ba"]
    straight = logged_rates(digits, tmp_path / "a", *decay, "duration=6ba", "save_interval=3ba")
    assert straight == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    half = f"{tmp_path}/a/checkpoints/ep0-ba3/rank0.pt"
    assert logged_rates(digits, tmp_path / "b", *decay, "duration=6ba", load_path=half) == straight[3:]
    longer = logged_rates(digits, tmp_path / "c", *decay, "duration=1ep", load_path=half)
    assert longer == pytest.approx([0.008, 0.006, 0.004, 0.002])  # an epoch has 7 steps
    other = ["optimizer.lr=0.02", "optimizer.warmup=8ba", "duration=6ba"]
    assert logged_rates(digits, tmp_path / "d", *other, load_path=half) == pytest.approx(
        [0.01, 0.0125, 0.015]
    )


@pytest.mark.parametrize("shape", [(8, 8), (30, 12), (12, 30), (3, 5, 9)])
def test_a_direction_is_about_the_nearest_orthogonal_matrix(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    found = orthogonal(x)
    aligned = u.mT @ found @ v.mT  # diagonal where the singular vectors are those of x
    values = aligned.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(aligned, torch.diag_embed(values), rtol=0, atol=1e-12)
    assert 0.65 < values.min() < values.max() < 1.25
    assert torch.equal(orthogonal(torch.zeros(2, 3)), torch.zeros(2, 3))


def with_gradients(overrides, steps=3):
    """Weights before and after steps of a run's optimizer, and the gradients, which a generator drew."""
    config = load_config(TrainConfig, "yamls/digits.yaml", [*TINY, *overrides])
    torch.manual_seed(0)
    net, generator = build(config.model).double(), torch.Generator().manual_seed(1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer, gradients = build_optimizer(net, config.optimizer), {name: [] for name in before}
    for _ in range(steps):
        for name, p in net.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            gradients[name].append(p.grad.clone())
        optimizer.step()
    return before, dict(net.named_parameters()), gradients


MIT = ["model.network=mit", "model.head_depth=1"]


@pytest.mark.parametrize("network", [[], MIT])
def test_muon_moves_matrices_of_blocks_along_orthogonal_ones_and_the_rest_as_adamw_does(network):
    settings = [*network, "optimizer.lr=0.01", "optimizer.weight_decay=0.5"]
    before, after, gradients = with_gradients([*settings, "optimizer.name=muon", "optimizer.momentum=0.9"])
    *_, adamw, _ = with_gradients(settings)
    moved = {name for name in before if not torch.equal(after[name], adamw[name])}
    linear = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "adaLN_modulation.1.weight")
    assert moved == {name for name in before if "blocks." in name and name.endswith(linear)}
    assert ("v_blocks.0.mlp.fc2.weight" in moved) == bool(network)
    for name in moved:
        weight, mean = before[name], torch.zeros_like(before[name])
        for gradient in gradients[name]:
            mean = 0.9 * mean + 0.1 * gradient
            direction = orthogonal(0.9 * mean + 0.1 * gradient)
            weight = weight * (1 - 0.01 * 0.5) - 0.01 * 0.2 * max(weight.shape) ** 0.5 * direction
        torch.testing.assert_close(after[name], weight, rtol=1e-9, atol=1e-11)
        # about the size of a step of AdamW, as the rate is the same
        size = (after[name] - before[name] * (1 - 0.01 * 0.5) ** 3).square().mean().sqrt()
        assert 0.1 < size / (3 * 0.01) < 1


def test_a_step_without_gradients_leaves_matrices_alone_and_settings_go_before_the_checkpoint():
    net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    optimizer = build_optimizer(net, OptimizerConfig(name="muon"))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))
    assert not optimizer.state
    take_settings(optimizer, OptimizerConfig(name="muon", momentum=0.5, betas=[0.1, 0.2]))
    assert [group["momentum"] for group in optimizer.param_groups] == [None, 0.5]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.1, 0.2)] * 2


def test_above_frozen_weights_muon_goes_on_from_a_sharded_checkpoint_too():
    config = load_config(TrainConfig, "yamls/digits.yaml", [*TINY, "optimizer.name=muon"])
    net = build(config.model)
    add_adapter(net, AdapterConfig(rank=2))  # of matrices alone: nothing is left for AdamW
    matrices = [p for p in net.parameters() if p.requires_grad]
    saved, restored = (build_optimizer(net, config.optimizer) for _ in range(2))
    for p in matrices:
        p.grad = torch.ones_like(p)
    saved.step()
    set_optimizer_state_dict(net, restored, get_optimizer_state_dict(net, saved))
    for p in matrices:
        p.grad = torch.ones_like(p)
    restored.step()
    assert [restored.state[p]["step"].item() for p in matrices] == [2] * len(matrices)


def test_gradients_of_matrices_are_freed_by_the_closure_in_which_composer_trains():
    net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    optimizer, seen = build_optimizer(net, OptimizerConfig(name="muon")), []

    def closure():
        optimizer.zero_grad()
        loss = net["blocks"][0](torch.ones(1, 4)).sum()
        loss.backward()
        seen.append(net["blocks"][0].weight.grad.clone())
        return loss

    losses = [optimizer.step(closure) for _ in range(3)]
    assert losses[2] < losses[0]
    assert all(torch.equal(gradient, torch.ones(4, 4)) for gradient in seen)
