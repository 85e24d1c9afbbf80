"""The planner's formulas against torch's FLOP counter, autograd's saved tensors and FSDP2's collectives."""

import base64
import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from composer.core import Precision
from composer.distributed.fsdp2 import apply_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from benchmarks.step import flops, random_draw
from kernels import operators
from recipe import plan, plan_finish
from recipe.adapter import AdapterConfig, add_adapter
from recipe.config import TrainConfig, load_config
from recipe.dit import DiT, DiTConfig
from recipe.dual import Dual
from recipe.model import GenerativeModel
from recipe.muon import orthogonal
from recipe.networks import CONFIGS, AnyNetwork, build
from recipe.normalizer import Normalizer
from recipe.objectives import IMF, OBJECTIVES, TVM, FlowMatching, MeanFlow
from recipe.parallel import ParallelConfig, parallelism, prepare_blocks
from recipe.preflight import checkpoint_bytes
from recipe.settings import make
from recipe.text import Prompts, Text, TextConfig, byte_tokens, summary
from recipe.train import dry_run, main
from tests.conftest import ROOT, TINY, finishing, refusal

FINISH = ["objective.name=frechet", "objective.features.pixels=x", "init_from=x"]

IMAGENET = {
    "imagenet256_w2": (256, (2, 2), True, "spectral", None),
    "imagenet256_w1p75": (256, (1.75, 1.75), True, "normal", None),
    "imagenet512_w2p5": (1024, (2.5, 2.5), False, "normal", 1.0),
    "imagenet512_w2p25": (1024, (2.25, 2.25), True, "spectral", 1.0),
}


@pytest.mark.parametrize("name", IMAGENET)
def test_the_yamls_hold_the_numbers_of_the_paper(name):
    config = load_config(TrainConfig, f"yamls/{name}.yaml", [])
    model, objective, optimizer = config.model, config.objective, config.optimizer
    found = model.tokens, objective.guidance_range, objective.scaled, model.time_init, config.step.clip
    assert found == IMAGENET[name]
    assert (model.width, model.depth, model.heads, model.patch, model.classes) == (1152, 28, 18, 2, 1000)
    assert (config.duration, config.data.batch_size, config.precision) == ("300000ba", 2048, "amp_bf16")
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (
        1e-4,
        [0.9, 0.95],
        1e-8,
        0,
    )
    assert (optimizer.schedule, optimizer.warmup) == ("constant", "0ba")
    assert (config.ema.decay, config.ema.target_decay, config.ema.ramp) == (0.9999, 0.99, False)
    assert (objective.label_dropout, objective.times, objective.equal_share) == (0.1, "gap*", 0)
    assert config.data.normalize["std"][0] == (4.85503674 if model.size == 32 else 5.27)
    assert config.parallel.fsdp2
    assert config.parallel.compile
    assert config.grid.interval
    assert config.data.remote


def test_a_dry_run_builds_xl_of_shapes_alone_and_stops(capsys, monkeypatch):
    monkeypatch.setattr("composer.utils.dist.get_world_size", lambda: 64)
    main(["yamls/imagenet512_w2p25.yaml", "--dry-run", "seed=3"])
    text = capsys.readouterr().out
    assert "(678M)" in text
    assert "tokens: 1024\n" in text
    assert "batch: 2048 = 64 ranks x 32, in microbatches of 8\n" in text
    assert "seed: 3\n" in text
    with pytest.raises(SystemExit, match=r"data.batch_size: 100 is not a multiple of the 64 ranks"):
        main(["yamls/imagenet256_w2.yaml", "--dry-run", "data.batch_size=100"])


STORED = TextConfig("dataset", tokens=77, width=1024)
SMALLER = {"width": 768, "heads": 12, "depth": 3}
MIT = {"network": "mit", **SMALLER, "head_depth": 1}
PMF = {**MIT, "channels": 3, "patch": 8, "output": "x", "rotary": "grid", "bottleneck": 128}


@pytest.mark.parametrize(
    ("shape", "objective", "tolerance"),
    [
        ({"preset": "XL/2-18", "size": 32}, TVM(guidance=2.0), 0.005),
        ({**SMALLER, "size": 64}, TVM(guidance=2.0), 0.005),
        ({**SMALLER, "size": 32}, TVM(guidance=1.0), 0.005),
        ({**SMALLER, "size": 32}, TVM(guidance=2.0, detach_jvp=True), 0.005),
        ({**SMALLER, "size": 32}, FlowMatching(), 0.005),
        ({**SMALLER, "size": 32}, MeanFlow(), 0.005),
        ({**SMALLER, "size": 32}, MeanFlow(omega=2.0), 0.005),
        ({**SMALLER, "size": 64}, MeanFlow(omega=0.2, kappa=0.9), 0.005),
        ({**SMALLER, "size": 32}, IMF(), 0.005),
        ({**SMALLER, "size": 64}, IMF(guidance=[1, 8]), 0.005),
        ({**SMALLER, "size": 32}, finishing(TVM(), (4, 32, 32), 8), 0.005),
        ({**SMALLER, "size": 32}, finishing(IMF(guidance=[1, 8]), (4, 32, 32), 8, nfe=2), 0.005),
        ({**MIT, "size": 32}, IMF(guidance=[1, 8]), 0.005),
        ({**MIT, "size": 32, "v_head": False}, IMF(guidance=[1, 8]), 0.005),
        ({**MIT, "size": 32}, TVM(guidance=2.0, scaled=False), 0.005),
        ({**MIT, "size": 32}, FlowMatching(), 0.005),
        ({**PMF, "size": 64}, IMF(guidance=[1, 8]), 0.005),
        ({**SMALLER, "size": 32, "text": STORED}, TVM(guidance=2.0), 0.005),
        ({**SMALLER, "size": 32, "text": STORED}, FlowMatching(), 0.005),
        ({**SMALLER, "size": 32, "text": TextConfig(width=256)}, IMF(guidance=[1, 8]), 0.005),
    ],
)
def test_flops_are_those_that_torch_counts(shape, objective, tolerance, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on meta
    model = make(AnyNetwork, shape)
    with torch.device("meta"):
        net = build(model)
        target = copy.deepcopy(net).requires_grad_(False)
        batch = random_draw(model, objective, 2, "meta")

        student, teacher = prompted(net), prompted(target)
    for match in objective.matches.values() if objective.finishes else ():
        match.to("meta").extractor.device = torch.device("meta")

    counted = flops(lambda: objective.loss(student, teacher, batch).total.mean().backward())
    assert 2 * plan.step_flops(model, objective) == pytest.approx(counted, rel=tolerance)


@pytest.mark.parametrize(
    ("shape", "objective", "whole"),
    [
        ({**SMALLER, "size": 32}, TVM(guidance=2.0), []),
        ({**SMALLER, "size": 32}, FlowMatching(), ["s_embedder"]),
        ({**MIT, "size": 32}, IMF(guidance=[1, 8]), []),
        ({**SMALLER, "size": 32, "text": STORED}, MeanFlow(), []),
    ],
)
def test_flops_below_an_adapter_leave_out_gradients_of_frozen_weights(shape, objective, whole, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model, adapter = make(AnyNetwork, shape), AdapterConfig(rank=16, modules_to_save=whole)
    with torch.device("meta"):
        net = build(model)
        add_adapter(net, adapter)
        for part in net.unused(objective.guidance_input, objective.auxiliary):
            part.requires_grad_(False)
        batch = random_draw(model, objective, 2, "meta")
        student, teacher = prompted(net), prompted(copy.deepcopy(net).requires_grad_(False))
    counted = flops(lambda: objective.loss(student, teacher, batch).total.mean().backward())
    assert 2 * plan.step_flops(model, objective, adapter) == pytest.approx(counted, rel=0.005)


def test_an_adapter_of_xl_fits_a_card_of_24_gb_and_all_of_it_does_not():
    one = ["parallel.fsdp2=false", "data.batch_size=256", "microbatch=8", "init_from=weights"]
    whole = load_config(TrainConfig, "yamls/imagenet256_sit_tvm.yaml", one)
    parts = plan.memory(replace(whole, adapter=AdapterConfig(rank=16)), 1)
    trained = 28 * 16 * (4 + 2 + 5 + 5) * 1152  # A and B of qkv, proj, fc1 and fc2
    assert parts["averages"] == 2 * 4 * trained
    assert parts["gradients"] == 4 * trained
    assert parts["weights"] == plan.memory(whole, 1)["weights"] + 4 * trained
    assert sum(parts.values()) < 0.9 * plan.GPUS["rtx4090"].memory < sum(plan.memory(whole, 1).values())


@pytest.mark.parametrize("objective", ["imf", "tvm", "meanflow"])
def test_what_is_never_evaluated_is_neither_sent_nor_optimized(objective):
    """The head for v of a network whose objective does not ask for it, and a guidance input."""
    given = ["model.network=mit", "model.head_depth=1", f"objective.name={objective}"]
    config = load_config(TrainConfig, "yamls/digits.yaml", [*TINY, *given])
    model = GenerativeModel(build(config.model), config.objective, Normalizer([0.0], [1.0]), 0)
    trained = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
    size = plan.count_parameters(config)
    assert size.trained == trained
    assert (size.trained < size.whole) == (objective != "imf")
    assert plan.memory(config, 2)["optimizer"] == 2 * plan.FP32 * trained
    assert [row.received for row in plan.traffic(config, 2)] == [plan.FP32 * trained]


def test_muon_keeps_one_number_a_weight_of_its_matrices_and_shares_their_products_among_gpus():
    def sized(*overrides):
        return load_config(TrainConfig, "yamls/imagenet256_pmf_b16.yaml", overrides)

    adamw, muon = sized("optimizer.name=adamw"), sized("optimizer.name=muon")
    saved = checkpoint_bytes(adamw) - checkpoint_bytes(muon)
    width, hidden = 768, int(768 * 8 / 3)
    shapes = {(3 * width, width), (width, width), (2 * hidden, width), (width, hidden)}
    size = plan.count_parameters(muon)
    assert set(size.matrices) == shapes
    assert len(size.matrices) == 4 * (16 + 8)  # of all blocks and those of the head for v
    assert plan.count_parameters(sized("optimizer.momentum=0")) == size
    assert saved == plan.FP32 * 24 * sum(m * n for m, n in shapes)
    assert plan.memory(adamw, 8)["optimizer"] - plan.memory(muon, 8)["optimizer"] == saved / 8
    cluster = plan.Cluster(gpus=[1], gpu="h100", hop=0.0)
    assert not plan.muon_traffic(adamw, 8)
    counted = flops(lambda: [orthogonal(torch.empty(shape, device="meta")) for shape in size.matrices])
    for gpus in (1, 8):
        products = counted / gpus / (cluster.gemm * cluster.sheet.flops)
        written = cluster.seconds(plan.updated_bytes(muon, gpus))
        assert plan.update_time(muon, gpus, cluster) - written == pytest.approx(products, rel=1e-9)
        sent = 2 * sum(m * n for m, n in size.matrices) * (gpus - 1) / gpus * 3 / cluster.sheet.node_rate
        assert plan.times(muon, gpus, cluster).update == pytest.approx(written + products + sent)


def prompted(net):
    """The network with two prompts, where it takes any."""
    text = net.config.text
    if text is None:
        return net
    bytes_ = text.encoder == "bytes"
    shape = (2, text.tokens) if bytes_ else (2, text.tokens, text.width)
    tokens = torch.zeros(shape, dtype=torch.int64 if bytes_ else torch.float16)
    given = Text(tokens, torch.full((2,), text.tokens))
    prompts = Prompts(text, {"empty": base64.b64encode(bytes(2 * text.width)).decode()}, net.config.null)
    return prompts.to(tokens.device)(net, given)


@pytest.fixture
def silent_kernels(monkeypatch):
    """The Triton operators as they are but for the launches: autograd keeps what it keeps on a GPU."""
    monkeypatch.setattr(kernels, "_operators", operators)
    monkeypatch.setattr(kernels, "_use_triton", lambda *_: True)
    monkeypatch.setattr(operators, "_launch", lambda *_, **__: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def saved_bytes(net, dual, bf16, batch):
    """Distinct storages that are kept for one pass, without parameters and their bf16 copies.

    A checkpoint holds its block's input by reference, which autograd's hooks do not see.
    """
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    weights = {tuple(sorted(p.shape)) for p in net.parameters() if p.dim() > 1}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters and tuple(sorted(x.shape)) not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    for block in net.blocks:
        block.register_forward_pre_hook(
            lambda _, inputs: [keep(z) for z in inputs[0] if z is not None] and None
        )
    x, t = torch.randn(batch, net.config.channels, net.config.size, net.config.size), torch.rand(batch)
    label, d = torch.zeros(batch, dtype=torch.int64), Dual(t, -t) if dual else t
    with (
        torch.autocast("cpu", torch.bfloat16, bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        result = prompted(net)(x, t, d, label, t)
    assert result.value.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text": TextConfig("dataset", tokens=80, width=48)},
        {"network": "mit", "head_depth": 1, "v_head": False},
    ],
    ids=["labels", "prompts", "mit"],
)
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(
    ("compiled", "budget", "every", "bf16", "tolerance"),
    [
        (False, 1, 0, True, 0.02),
        (True, 1, 0, True, 0.02),
        (True, 0.9, 0, True, 0.02),
        (False, 1, 2, True, 0.02),
        (False, 1, 0, False, 0.1),
    ],
)
@pytest.mark.slow
def test_activations_are_what_autograd_keeps(
    silent_kernels, monkeypatch, dual, compiled, budget, every, bf16, tolerance, options
):
    sizes = {"size": 32, "width": 96, "depth": 4, "heads": 2, "classes": 3}
    model = CONFIGS[options.get("network", "dit")](**sizes, **options)
    net = build(model)
    # Inductor's partition of forward and backward without its minutes of code generation
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    how = ParallelConfig(compile=compiled, activation_budget=budget, checkpoint_every=every)
    prepare_blocks(net, how, trained=True)
    planned = plan.activation_bytes(model, how, dual, plan.BF16 if bf16 else plan.FP32)
    assert 2 * planned == pytest.approx(saved_bytes(net, dual, bf16, 2), rel=tolerance)


class Collectives(TorchDispatchMode):
    """Counts FSDP2's messages and the bytes of their larger side."""

    def __init__(self):
        super().__init__()
        self.count, self.bytes = {}, {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        if name.startswith("c10d::"):
            size = max(x.numel() * x.element_size() for x in args if isinstance(x, torch.Tensor))
            self.count[name] = self.count.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + size
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def eight_ranks(monkeypatch):
    """A process group of eight in which nothing is sent."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # Composer sets it, and compares
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reshard", [True, False])
def test_traffic_is_what_fsdp2_sends(eight_ranks, objective, reshard):
    overrides = [
        f"objective.name={objective}",
        f"parallel.reshard_after_forward={reshard}",
        "microbatch=null",
    ]
    overrides += ["model.preset=null", "model.size=8", "model.width=32", "model.heads=2", "model.depth=3"]
    overrides += ["precision=fp32", "data.batch_size=16", "model.classes=3", "grid.labels=[]"]
    overrides += FINISH[1:] if objective == "frechet" else []
    config = load_config(TrainConfig, "yamls/imagenet256_w2.yaml", [*overrides, "parallel.compile=false"])
    if objective == "frechet":
        config.objective = finishing(TVM(), (4, 8, 8))
    net = DiT(config.model)
    net.guidance_embedder.requires_grad_(config.objective.guidance_input)
    target = copy.deepcopy(net).requires_grad_(False)
    networks = torch.nn.ModuleList([net, target])
    for network in networks:
        prepare_blocks(network, config.parallel, trained=network is net)
    sharding = parallelism(config.parallel, "cpu").fsdp2
    sharding.device_mesh = eight_ranks
    apply_fully_shard(networks, sharding, Precision.FP32, generate_composer_model_policy(networks))
    batch = random_draw(config.model, config.objective, 2, "cpu")
    with Collectives() as seen:
        loss = config.objective.loss(net, target, batch, 3)
        loss.total.mean().backward()
    rows = plan.traffic(config, 8)
    for name, word in (("c10d::_allgather_base_", "all-gather"), ("c10d::_reduce_scatter_base_", "reduce")):
        mine = [row for row in rows if row.name.startswith(word)]
        assert sum(row.count for row in mine) == seen.count[name]
        assert sum(row.received for row in mine) == pytest.approx(seen.bytes[name] * 7 / 8, rel=0.01)


@pytest.mark.slow
def test_the_plan_of_a_run_shards_what_is_sharded_and_says_what_does_not_fit(capsys):
    def table(*overrides):
        plan.main(["yamls/imagenet256_w2.yaml", *overrides])
        lines = [
            line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")
        ]
        return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in lines}

    sharded, whole = table("gpus=8,64"), table("gpus=8,64", "parallel.fsdp2=false")
    assert sharded["GPUs"] == ["8", "64"]
    state = 4 * 678068496 / 2**30
    assert [float(x) for x in sharded["weights, GiB"]] == pytest.approx([state / 8, state / 64], abs=0.005)
    assert [float(x) for x in whole["averages, GiB"]] == pytest.approx([2 * state] * 2, abs=0.005)
    kept = table("gpus=8", "ema.posthoc=[0.05,0.1]")  # two more copies, never gathered
    assert float(kept["averages, GiB"][0]) == pytest.approx(4 * state / 8, abs=0.005)
    assert kept["gathered weights, GiB"][0] == sharded["gathered weights, GiB"][0]
    update = "optimizer and averages, ms, predicted"
    assert float(kept[update][0]) / float(sharded[update][0]) == pytest.approx(16 / 12, rel=0.05)
    assert sharded["activations, GiB"] == whole["activations, GiB"]
    assert sharded["batch per GPU"] == ["8 x 32", "1 x 32"]
    # Half the efficiencies of products and of attention, half the memory's: everything takes twice as long
    halves = table("gpus=64", "gemm=0.325", "attention=0.225", "bandwidth=0.4")
    compute = "compute, ms, predicted"
    assert float(halves[compute][0]) == pytest.approx(2 * float(sharded[compute][1]), rel=0.001)
    flops = float(sharded["PFLOP per step"][0]) * 1e15
    assert float(sharded[compute][1]) > 1e3 * flops / 64 / 989e12 / 0.65
    assert "TOO MUCH" not in table("gpus=8", "gpu=b200", "microbatch=128")["memory, GiB"][0]
    assert "TOO MUCH" in table("gpus=8", "microbatch=128")["memory, GiB"][0]


def forward_and_backward(network, shape):
    """FLOPs forward, and of both together over forward, and bytes that autograd keeps beside parameters."""
    inputs, kept = torch.randn(1, *shape, device="meta", requires_grad=True), {}
    own = {p.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers())}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x

    ahead = flops(lambda: network(inputs))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        both = flops(lambda: network(inputs).sum().backward())
    return ahead, both / ahead, sum(x.untyped_storage().nbytes() for i, x in kept.items() if i not in own)


def stable_diffusions(size):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, **blocks
        )
    vae.requires_grad_(False).forward = lambda z: vae.decode(z).sample
    return vae, (4, size, size), plan_finish.decoder(DiTConfig(size=size))


def dinov2(_):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}
    with torch.device("meta"):
        network = transformers.Dinov2Model(transformers.Dinov2Config(**shape, patch_size=14))
    plain = network.requires_grad_(False).forward
    network.forward = lambda x: plain(x).last_hidden_state[:, 0]
    return network, (3, 224, 224), plan_finish.PUBLISHED["dinov2-vitl14"]


@pytest.mark.parametrize(("make", "size"), [(stable_diffusions, 32), (stable_diffusions, 64), (dinov2, 0)])
def test_frozen_networks_cost_what_torch_counts(make, size):
    network, shape, planned = make(size)
    ahead, both, kept = forward_and_backward(network, shape)
    assert planned.flops == pytest.approx(ahead, rel=0.005)
    assert both == pytest.approx(1 + plan_finish.BACKWARD, rel=0.03)
    assert planned.kept == pytest.approx(kept, rel=0.03)
    assert planned.parameters == pytest.approx(sum(p.numel() for p in network.parameters()), rel=0.005)


def test_moments_of_a_finish_take_the_bytes_that_the_plan_says():
    config = load_config(TrainConfig, "yamls/digits.yaml", [*FINISH, "objective.features.pixels:4=x"])
    (match,) = finishing(TVM(), (1, 8, 8)).matches.values()
    (pooled,) = finishing(TVM(), (1, 8, 8), 4).matches.values()
    finish = plan_finish.Finish(config)
    assert finish.sizes == [64, 4]
    saved = [x for one in (match, pooled) for x in one.state_dict().values()]
    assert finish.saved_bytes() == sum(x.nbytes for x in saved)
    held = sum(x.nbytes for one in (match, pooled) for x in one.buffers())
    assert finish.moment_bytes() == pytest.approx(held, rel=0.02)
    plain = load_config(TrainConfig, "yamls/digits.yaml", ["objective.name=flow_matching"])
    assert checkpoint_bytes(config) - checkpoint_bytes(plain) == finish.saved_bytes()
    assert finish.messages() == [match.sums.nbytes, pooled.sums.nbytes]


def test_the_joint_form_adds_classes_or_what_sums_up_a_prompt_to_each_map():
    overrides = [*FINISH, "objective.features.pixels:4=x", "objective.joint=1"]
    config = load_config(TrainConfig, "yamls/digits.yaml", overrides)
    assert plan_finish.Finish(config).sizes == [64 + 10, 4 + 10]
    config.model = replace(config.model, text=TextConfig(), classes=0)
    text = byte_tokens(["a prompt"], 16)[0]
    width = summary(text).shape[1]
    assert plan_finish.Finish(config).sizes == [64 + width, 4 + width]


def test_the_plan_of_a_finish_counts_what_is_known_and_names_the_rest(tmp_path):
    mean, covariance = np.zeros(6), np.eye(6)
    np.savez(tmp_path / "six.npz", mu=mean, sigma=covariance)
    features = (
        f"{{inception-2015: a.npz, classifier:1: b, image-model:c: {tmp_path}/six.npz, image-model:d: e}}"
    )
    overrides = ["objective={name: frechet, features: " + features + "}", "init_from=w"]
    config = load_config(TrainConfig, "yamls/imagenet256_w2.yaml", overrides)
    finish = plan_finish.Finish(config)
    assert finish.sizes == [2048, 64, 6]
    report = plan.report(config, plan.Cluster(gpus=[8]))
    assert (
        "first samples, passes of classifier:1, image-model:c, image-model:d, moments of image-model:d.\n"
        in report
    )
    flops = 2 * (622.2e9 + 11.42e9)
    assert f"| decoder and extractors, PFLOP per step, float32 | {flops * 2048 / 1e15:.2f} |" in report
    plain = replace(config, objective=FlowMatching(), init_from=None)
    cluster = plan.Cluster(gpus=[8])
    passes = flops * 2048 / 8 / 67e12 / 0.65
    found = plan.times(config, 8, cluster).compute - plan.times(plain, 8, cluster).compute
    assert found == pytest.approx(passes, rel=0.001)
    again = load_config(TrainConfig, "yamls/imagenet256_w2.yaml", [*overrides, "objective.recompute=true"])
    assert plan_finish.Finish(again).flops() == pytest.approx(1.5 * flops, rel=0.001)
    assert "Not counted" not in plan.report(plain, cluster)
    assert "moments and maps" not in plan.report(plain, cluster)


@pytest.mark.parametrize("name", ["imagenet256_w2_frechet", "imagenet256_sit_frechet"])
def test_the_yamls_of_the_finish_hold_the_published_numbers(name):
    config = load_config(TrainConfig, f"yamls/{name}.yaml", [])
    objective, optimizer = config.objective, config.optimizer
    assert (config.duration, config.data.batch_size, optimizer.warmup) == ("125000ba", 1024, "6250ba")
    assert (optimizer.lr, optimizer.schedule, optimizer.betas) == (1e-6, "cosine", [0.9, 0.95])
    assert optimizer.weight_decay == 0
    assert (objective.nfe, objective.decay, objective.population, objective.epsilon) == (
        1,
        0.999,
        50_000,
        0.01,
    )
    assert len(objective.features) == 3
    assert all(reference.endswith(".npz") for reference in objective.features.values())


@pytest.mark.parametrize("path", sorted(ROOT.glob("yamls/*_frechet.yaml")), ids=lambda path: path.stem)
def test_every_yaml_of_a_finish_is_a_run_of_the_weights_it_goes_on_from(path):
    config = load_config(TrainConfig, str(path), [])
    assert config.run_name == path.stem
    assert "parameters: " in dry_run(config)
    before = ROOT / f"yamls/{path.stem.removesuffix('_frechet')}.yaml"
    if before.exists():
        former = load_config(TrainConfig, str(before), [])
        assert config.model == former.model
        assert (config.data.local, config.data.normalize) == (former.data.local, former.data.normalize)
        assert config.init_from == f"{former.folder}/weights"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpu=b300"], "gpu: 'b300' must be one of a100, h100, h200, b200, rtx4090"),
        (["gpus=0"], "gpus"),
        (["gpus=3"], "data.batch_size: 2048 is not a multiple of the 3 ranks"),
        (["gpus=8", "parallel.replicas=3"], "parallel.replicas: 3 does not divide the 8 ranks"),
        (
            ["gpus=8", "microbatch=96"],
            "microbatch: 96 does not divide the 256 samples of a rank, and parallel.compile wants "
            "microbatches of one size. Fix: set microbatch=64",
        ),
        (["gemm=2"], "gemm: 2 must be a number more than 0 and at most 1"),
        (["duration=3ep"], "duration: 3ep must be in batches"),
    ],
)
def test_an_impossible_plan_is_one_line_that_names_the_key(overrides, message):
    said = refusal(SystemExit, plan.main, ["yamls/imagenet256_w2.yaml", *overrides])
    assert said.startswith("config error: ") and message in said


@pytest.mark.parametrize(
    ("batch", "gpus"), [(256, [8, 64]), (1024, [8, 64, 512]), (32, [8]), (10, [5]), (7, [7])]
)
def test_without_a_number_of_gpus_it_takes_usual_ones_that_divide_the_batch(batch, gpus):
    config = load_config(TrainConfig, "yamls/digits.yaml", [f"data.batch_size={batch}"])
    assert plan.usual_gpus(config) == gpus
