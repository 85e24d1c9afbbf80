"""What Inductor would run on a GPU: bytes and FLOPs against arithmetic, the command's table, its statuses."""

import math
import re

import numpy as np
import pytest
import torch
from torch._inductor.graph import GraphLowering

from benchmarks import Figure, compiled
from recipe import plan
from recipe.config import ParallelConfig, TrainConfig, load_config
from recipe.ema import lerps
from recipe.parallel import configure_compiler
from tests.conftest import OFFICIAL, refusal

H100 = plan.GPUS["h100"]
SMALL = [
    "model.preset=null",
    "model.size=8",
    "model.width=96",
    "model.heads=2",
    "model.depth=3",
    "microbatch=4",
]


def test_bytes_and_flops_of_three_operations_are_the_arithmetic():
    rows, inner, columns = 512, 256, 128

    def make():
        def three(x, w):
            return (torch.cos(torch.sin(x) @ w),)

        sizes = (rows, inner), (inner, columns)
        return three, [torch.empty(size, requires_grad=True) for size in sizes]

    configure_compiler(ParallelConfig(activation_budget=1.0))  # nothing is recomputed, whatever ran before
    found = {}
    graphs = compiled.trace(make, autocast=False)
    with compiled.pretended(H100):
        for direction, graph in graphs.items():
            found[direction] = compiled.lower(direction, *graph)[0]
    x, w, y = 4 * rows * inner, 4 * inner * columns, 4 * rows * columns
    product, work = x + w + y, 2 * rows * inner * columns
    assert [(k.group, k.bytes, k.flops, k.generated) for k in found["forward"]] == [
        ("rest", 2 * x, 0, True),
        ("GEMM", product, work, False),
        ("rest", 2 * y, 0, True),
    ]
    # The cosine's slope times the gradient of y, the gradients of w and of the sine, and the slope of that
    assert sorted((k.bytes, k.flops) for k in found["backward"]) == sorted(
        [(3 * y, 0), (product, work), (product, work), (3 * x, 0)]
    )


def test_the_averages_read_the_weights_once():
    sizes = [(64, 32), (32,)] * 10

    def make():
        weights, slow, fast = ([torch.empty(size) for size in sizes] for _ in range(3))

        def update(weights, slow, fast, *shares):
            lerps(weights, [slow, fast], shares)
            return ()

        return update, (weights, slow, fast, torch.tensor(0.1), torch.tensor(0.2))

    (graph,) = compiled.trace(make, grad=False, autocast=False).values()
    with compiled.pretended(H100):
        launches = compiled.lower("inference", *graph)[0]
    size = 4 * sum(math.prod(size) for size in sizes)
    assert sum(kernel.bytes for kernel in launches) == pytest.approx((1 + 2 * 2) * size, rel=1e-3)


def run(capsys, *overrides):
    status = compiled.main(["yamls/imagenet256_w2.yaml", *overrides])
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prices_every_pass_and_assembles_every_kernel(capsys):
    status, text = run(capsys, *SMALL, "objective.name=flow_matching", "gemm=0.5", "launch=0")
    assert status == 0
    assert "50% of 989 bf16 TFLOP/s in matrix products" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| student")]
    rows = {(line[0][2:], line[1]): line[2:] for line in lines}
    tokens, width = 4 * 16, 96
    block = 2 * tokens * 12 * width**2 + 2 * 4 * 6 * width**2
    products = rows["student, forward", "GEMM"], rows["student, backward", "GEMM"]
    assert [int(row[0]) for row in products] == [5, 10]
    assert [float(row[2]) for row in products] == pytest.approx([block / 1e9, 2 * block / 1e9], abs=0.05)
    assert float(rows["student, forward", "attention"][0]) == 1
    assert re.search(r"a generated kernel, bytes a thread, at most +0\.000\n", text)
    kept = (
        plan.block_bytes(load(*SMALL).model, dual=False, compiled=True, low=plan.BF16, budget=0.9) * 4 / 1e9
    )
    line = next(line for line in text.splitlines() if "kept for the backward" in line)
    assert float(line.split()[-1]) == pytest.approx(kept, abs=0.001)


@pytest.mark.slow
def test_a_block_of_the_other_network_is_priced_too():
    """A block of mit makes 4 products, the widest to both halves of SwiGLU; attention is one operation."""
    config = load(*SMALL, "model.network=mit", "model.head_depth=1", "objective.name=flow_matching")
    forward, backward = compiled.compile_step(config, 4, H100)
    tokens, width = 4 * (16 + 20), 96
    block = 2 * tokens * (4 * width**2 + 3 * width * 256)
    for direction, times in ((forward, 1), (backward, 2)):
        products = [kernel for kernel in direction.block.kernels if kernel.group == "GEMM"]
        assert (len(products), sum(k.flops for k in products)) == (4 * times, times * block)
    assert {"attention", "query-key norm", "activation"} <= {k.group for k in forward.block.kernels}


def test_an_auxiliary_head_has_its_own_blocks(monkeypatch):
    nothing = compiled.Compiled([], 0, {})
    monkeypatch.setattr(compiled, "compile_pass", lambda *_: {"forward": nothing, "backward": nothing})
    options = ["model.network=mit", "model.head_depth=1", "parallel.checkpoint_every=2"]
    config = load(*SMALL, *options, "objective={name: imf}")
    found = {one.title: (one.runs, one.keeping) for one in compiled.compile_step(config, 4, H100)}
    assert found["student, dual, forward"] == (5, 1)  # of 3 blocks and the head's, 2 are checkpointed
    assert found["student, auxiliary head, forward"] == (1, 1)


def test_the_update_of_muon_counts_its_products(monkeypatch, capsys):
    nothing = compiled.Compiled([], 0, {})
    monkeypatch.setattr(compiled, "compile_pass", lambda *_: {"forward": nothing, "backward": nothing})
    monkeypatch.setattr(compiled, "assembled", lambda *_: {"kernel": (0, 0)})
    updates = []
    for name in ("adamw", "muon"):
        assert compiled.main(["yamls/imagenet256_pmf_b16.yaml", f"optimizer.name={name}"]) == 0
        updates.append(float(re.search(r"update (\S+)\.\n", capsys.readouterr().out)[1]))
    assert updates == [2.6, 6.8]  # ms, of which 2.1 are bytes with Muon


def load(*overrides):
    return load_config(TrainConfig, "yamls/imagenet256_w2.yaml", list(overrides))


def test_a_bar_that_is_missed_is_named():
    row = Figure("step, s, predicted", 0.21, compiled.BARS["step"])
    assert row.missed
    assert str(row).endswith("0.210  at most 0.203  MISSED")
    assert not Figure("step, s, predicted", 0.21, None).missed


def test_an_inductor_that_changed_is_one_line_and_status_3(capsys, monkeypatch):
    monkeypatch.delattr(GraphLowering, "codegen")
    status, text = run(capsys, *SMALL, "objective.name=flow_matching")
    assert status == 3
    assert text.count("\n") == 1
    assert "AttributeError: 'GraphLowering' object has no attribute 'codegen'" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpu=b300"], "gpu: 'b300' must be one of"),
        (["gemm=0"], "gemm: 0 must be a number more than 0 and at most 1"),
        (["modle.depth=2"], "modle: is not a setting; did you mean model?"),
    ],
)
def test_a_wrong_key_is_one_line_that_names_it(overrides, message):
    said = refusal(SystemExit, compiled.main, ["yamls/imagenet256_w2.yaml", *overrides])
    assert said.startswith("config error: ") and message in said


MEANFLOW = ["objective.name=meanflow", "objective.omega=2"]
PROMPTS = [
    "grid.labels=[]",
    "model.classes=0",
    *(f"model.text.{x}" for x in ("encoder=dataset", "tokens=77", "width=1024")),
]


@pytest.mark.parametrize("overrides", [[], MEANFLOW, PROMPTS], ids=["tvm", "meanflow", "prompts"])
@pytest.mark.slow
def test_the_planner_s_table_is_what_inductor_makes_of_xl(overrides):
    config = load(*overrides)
    for one in config.objective.passes():
        found = compiled.compile_pass(config, one, 32 * one.batches, H100)
        unit = 32 * one.batches * config.model.tokens * config.model.width
        mine = [
            sum(
                k.bytes for k in direction.kernels if k.group != "GEMM" and (k.group == "attention") == inside
            )
            / unit
            for direction in found.values()
            for inside in (False, True)
        ]
        kind = one.dual, one.gradient
        stored = np.add(plan.BLOCK_BYTES[kind], plan.TEXT_BYTES[kind] if config.model.text else 0)
        stored = stored.flatten()[: len(mine)].tolist()
        # The table is that of 2.7; backward kernels of 2.11 move 9% more (docs/scale.md)
        close = 0.02 if OFFICIAL else 0.1
        assert mine == pytest.approx(stored, rel=close), one
        if one.gradient == "both":
            kept = plan.block_bytes(config.model, True, True, plan.BF16, config.parallel.activation_budget)
            # a prompt's tokens are counted with each block, and kept once for all
            assert found["forward"].kept == pytest.approx(32 * kept, rel=0.03 if config.model.text else 0.02)
