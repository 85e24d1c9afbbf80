"""What a run will need: `python -m recipe.plan CONFIG.yaml gpus=8,64,512 gpu=h100 [key=value ...]`.

FLOPs, memory and traffic follow from the network's shape by formulas that the tests hold against torch's FLOP
counter, against the tensors that autograd saves and against the collectives that FSDP2 issues. Times are
predicted: from those, from the bytes that compiled kernels move (benchmarks.compiled), from a data sheet, and
from efficiencies and a latency, which are assumptions and are printed as such.

Letters: P parameters, N tokens, D width, r = mlp_ratio, G ranks that hold one sharded copy.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from composer.core import Time, TimeUnit
from pydantic import Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from recipe.adapter import AdapterConfig, add_adapter
from recipe.config import ConfigError, TrainConfig, load_config, yaml_of
from recipe.dit import TEXT_LAYERS, NetworkConfig
from recipe.ema import average_names
from recipe.manual import answer
from recipe.mit import MiTConfig
from recipe.networks import build
from recipe.objectives.base import Objective, Pass
from recipe.optimizer import build_optimizer
from recipe.parallel import ParallelConfig
from recipe.plan_finish import Finish
from recipe.settings import NotNegative, Positive, Says, Settings

GIB = 2**30
FP32, BF16 = 4, 2
DDP_BUCKET = 25 * 2**20  # DistributedDataParallel's default


@dataclass
class GPU(Settings):
    """Data sheet of a GPU."""

    flops: Positive = Field(description="Dense bf16 FLOP/s.")
    memory: Positive = Field(description="Bytes of memory.")
    memory_rate: Positive = Field(description="Bytes/s of memory.")
    node_rate: Positive = Field(description="Bytes/s of one GPU's NVLink in one direction.")
    network_rate: Positive = Field(description="Bytes/s of all network cards of a node together.")
    arch: int = Field(90, ge=80, le=200, description="Compute capability times ten, 90 for 9.0.")
    multiprocessors: int = Field(132, ge=1, le=10**4, description="Number of multiprocessors.")
    exact: Positive = Field(67e12, description="FLOP/s in float32, without TF32.")


GPUS = {
    "a100": GPU(312e12, 80 * GIB, 2.0e12, 300e9, 200e9, 80, 108, 19.5e12),
    "h100": GPU(989e12, 79.6 * GIB, 3.35e12, 450e9, 400e9, 90, 132),
    "h200": GPU(989e12, 140.4 * GIB, 4.8e12, 450e9, 400e9, 90, 132),
    "b200": GPU(2250e12, 180 * GIB, 7.7e12, 900e9, 400e9, 100, 148, 75e12),
    "rtx4090": GPU(165e12, 24 * GIB, 1.01e12, 32e9, 12.5e9, 89, 128, 82.6e12),
}


Reached = Annotated[float, Field(gt=0, le=1)]
Sheet = Annotated[
    Annotated[
        Literal[tuple(GPUS)],
        Says(
            f"must be one of {', '.join(GPUS)}; add it to GPUS in recipe/plan.py, or give its data sheet: "
            f"gpu={{{', '.join(f'{f.name}: ...' for f in fields(GPU))}}}"
        ),
        Tag("name"),
    ]
    | Annotated[GPU, Tag("sheet")],
    Discriminator(lambda gpu: "sheet" if isinstance(gpu, dict | GPU) else "name"),
]

# Bytes that kernels of one block move, for each token and unit of width, by (dual, gradient) of a pass:
# forward and backward, each (between products and attention, in attention). What benchmarks.compiled has for
# XL/2-18, compiled, at 32 images, bf16 weights and the default activation_budget; tests/test_compiled.py
# holds them against it.
BLOCK_BYTES = {
    (True, "both"): ((85.0, 24.1), (190.7, 56.2)),
    (True, "value"): ((85.0, 24.1), (92.9, 28.1)),
    (False, "value"): ((42.5, 12.1), (92.9, 28.1)),
    (False, "none"): ((26.2, 10.1), (0.0, 0.0)),
}
# What attention to a prompt adds, of 77 tokens to 256 of the image (yamls/text_to_image_256.yaml).
TEXT_BYTES = {
    (True, "both"): ((36.0, 9.4), (125.4, 18.6)),
    (True, "value"): ((36.0, 9.4), (66.5, 10.5)),
    (False, "value"): ((19.9, 5.3), (66.5, 10.5)),
    (False, "none"): ((19.7, 5.2), (0.0, 0.0)),
}

# What a block of the network mit keeps where it is eager, by whether it is dual: tensors of S x D in float32,
# and in the autocast type for each value or tangent; where it is compiled, the latter (tests/test_plan.py).
MIT_KEPT = {False: (10.1, 17.7), True: (24.2, 21.7), "compiled": 19.2, "recomputed": 14.5}


@dataclass
class Roofline(Settings):
    """What times are predicted from, all assumed."""

    gpu: Sheet = Field("h100", description="Name of a GPU, or the numbers of its data sheet.")
    gemm: Reached = Field(0.65, description="Share of the data sheet's FLOP/s that matrix products reach.")
    attention: Reached = Field(0.45, description="Share of the data sheet's FLOP/s that attention reaches.")
    bandwidth: Reached = Field(0.80, description="Share of the memory's bytes/s that kernels reach.")
    launch: NotNegative = Field(3e-6, description="Seconds that any kernel takes at least.")

    @property
    def sheet(self) -> GPU:
        """The data sheet."""
        return GPUS[self.gpu] if isinstance(self.gpu, str) else self.gpu

    @property
    def name(self) -> str:
        """The GPU's display name."""
        return self.gpu if isinstance(self.gpu, str) else "this GPU"

    def seconds(self, size: float, flops: float = 0, share: float = 1) -> float:
        """Return the seconds of work on `size` bytes whose `flops` reach `share` of the FLOP/s."""
        return max(flops / (share * self.sheet.flops), size / (self.bandwidth * self.sheet.memory_rate))

    def assumptions(self) -> str:
        """Return what is assumed, in one line."""
        gpu = self.sheet
        return (
            f"Predicted, not measured. Assumed of {self.name}: {self.gemm:.0%} of {gpu.flops / 1e12:.0f} "
            f"bf16 TFLOP/s in matrix products, {self.attention:.0%} in attention, {self.bandwidth:.0%} of "
            f"{gpu.memory_rate / 1e12:.2f} TB/s, at least {self.launch * 1e6:g} us a kernel."
        )


@dataclass
class Cluster(Roofline):
    """The GPUs that a run is planned for."""

    gpus: list[Annotated[int, Field(ge=1, le=10**6)]] = Field(
        [],
        description="Numbers of GPUs, one column of the table each, as gpus=8,64; "
        "empty for those of 8, 64 and 512 that divide the batch.",
    )
    per_node: int = Field(8, ge=1, le=10**6, description="Number of GPUs in a node.")
    hop: NotNegative = Field(2e-6, description="Seconds that each rank adds to a collective's latency.")


class Parameters(NamedTuple):
    """Numbers of parameters: in blocks and outside of them, without an adapter; of the whole student; of
    what is trained; of all averages together; of the optimizer's state. matrices: sizes of what Muon updates.
    """

    blocks: int
    rest: int
    whole: int
    trained: int
    averages: int
    optimizer: int
    matrices: list[torch.Size]


def count_parameters(config: TrainConfig) -> Parameters:
    """Return the numbers of parameters of a run; what its objective never evaluates is not trained.

    Averages share what is frozen below an adapter with the student, unless FSDP2 shards each by itself.
    """
    with torch.device("meta"):
        net = build(config.model)
        plain = {name: p.numel() for name, p in net.named_parameters()}
        if config.adapter is not None:
            add_adapter(net, config.adapter)
    for part in net.unused(config.objective.guidance_input, config.objective.auxiliary):
        part.requires_grad_(False)
    blocks = sum(size for name, size in plain.items() if name.partition(".")[0].endswith("blocks"))
    whole = sum(p.numel() for p in net.parameters())
    optimizer = build_optimizer(net, config.optimizer)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    copied = trained if config.adapter and not config.parallel.fsdp2 else whole
    averages = copied * len(average_names(config.ema, config.objective))
    muon = [group for group in optimizer.param_groups if group.get("momentum") is not None]
    matrices = [p.shape for group in muon for p in group["params"]]
    state = 2 * trained - sum(map(math.prod, matrices))  # two moments of AdamW, one of Muon
    return Parameters(blocks, sum(plain.values()) - blocks, whole, trained, averages, state, matrices)


def adapter_flops(model: NetworkConfig, adapter: AdapterConfig | None) -> tuple[float, float]:
    """Return the FLOPs that an adapter adds to a plain forward pass through all blocks, and those of products
    whose input needs no gradient.

    They are the embedders, the modulation and the first block's qkv, where the adapter alone is trained. Text
    counts as the image's tokens.
    """
    if adapter is None:
        return 0, 0
    with torch.device("meta"):
        net = build(model)
        add_adapter(net, adapter)
    low = unfed = 0
    for name, p in net.named_parameters():
        if ".lora_" in name:
            low += 2 * model.sequence * p.numel()
        elif name == "blocks.0.attn.qkv.weight" or (name.startswith("x_embedder") and p.dim() > 1):
            unfed += 2 * model.sequence * p.numel()
        elif p.dim() > 1 and "text" not in name and ("adaLN" in name or "_embedder.mlp" in name):
            unfed += 2 * p.numel()
    return low, 0 if adapter.modules_to_save else unfed


def block_count(model: NetworkConfig) -> int:
    """Return the number of blocks, those of an auxiliary head among them."""
    return model.depth + (model.head_depth if model.v_head else 0)


def forward_flops(model: NetworkConfig, head: bool = False) -> tuple[int, int, int]:
    """Return the FLOPs of one plain forward pass of one sample, or of its auxiliary head alone.

    They are those of linear layers, of attention's two products, and of what sees the prompt alone. Attention
    to the prompt counts as linear layers, since its text has no tangent.
    """
    N, S, D = model.tokens, model.sequence, model.width
    patch, text = model.patch**2 * model.channels, model.text
    if isinstance(model, MiTConfig):
        depth, narrow = model.head_depth if head else model.depth, model.bottleneck
        products = S * depth * (4 * D * D + 3 * D * model.hidden) + N * D * patch
        if not head:
            products += N * (patch * D if narrow is None else narrow * (patch + D)) + 4 * (256 * D + D * D)
        return 2 * products, 4 * depth * S * S * D, 0
    tokens = N * (model.depth * (4 + 2 * model.mlp_ratio) * D * D + 2 * patch * D)
    conditioning = model.depth * 6 * D * D + 2 * D * D + 3 * (256 * D + D * D)
    prompt = 0
    if text is not None:
        tokens += N * model.depth * (2 * D * D + 2 * text.tokens * D)
        conditioning += model.depth * D * D
        prompt = text.tokens * (model.depth * 2 * D * D + text.width * D) + text.width * D
        if text.encoder == "bytes":
            prompt += TEXT_LAYERS * text.tokens * (12 * text.width**2 + 2 * text.tokens * text.width)
    return int(2 * (tokens + conditioning)), 4 * model.depth * N * N * D, 2 * prompt


# Work of a pass in units of a plain forward, (linear layers, attention: 6 products for 2 where dual, prompt):
# forward and, by what is differentiated, backward.
FORWARD = {False: (1, 1, 1), True: (2, 3, 1)}
BACKWARD = {"none": (0, 0, 0), "value": (2, 2, 2), "both": (4, 6, 2)}


class Work(NamedTuple):
    """What one direction of a pass over one sample costs: FLOPs and bytes."""

    products: float
    attention: float
    attention_bytes: float
    other_bytes: float


def work(
    model: NetworkConfig, objective: Objective, again: float = 0, adapter: AdapterConfig | None = None
) -> Iterator[Work]:
    """Yield the work of every pass, forward and backward; again: share of blocks that run forward twice.

    Below an adapter, a frozen product has a gradient of its input alone.
    """
    adapted, unfed = adapter_flops(model, adapter)
    for one in objective.passes(model.v_head):
        linear, attention, prompt = forward_flops(model, one.head)
        low = adapted * (model.head_depth if one.head else model.depth) / block_count(model)
        each = [(linear + low, prompt), (linear, prompt)]
        if adapter is not None:
            each[1] = low + (linear - (0 if one.head else unfed)) / 2, 0
        unit = (model.head_depth if one.head else model.depth) * model.sequence * model.width
        kind = one.dual, one.gradient
        ahead = one.batches * (1 if one.gradient == "none" else 1 + again)
        units = FORWARD[one.dual], BACKWARD[one.gradient]
        sizes = np.add(BLOCK_BYTES[kind], TEXT_BYTES[kind] if model.text else 0).tolist()
        for runs, (linear, prompt), (products, scores, texts), (between, inside) in zip(
            (ahead, 1), each, units, sizes, strict=True
        ):
            costs = products * linear + texts * prompt, scores * attention, inside * unit, between * unit
            yield Work(*(runs * cost for cost in costs))


def step_flops(model: NetworkConfig, objective: Objective, adapter: AdapterConfig | None = None) -> float:
    """Return the FLOPs of one sample's step, nothing recomputed (flow matching: 1 + 2 forward passes)."""
    return sum(one.products + one.attention for one in work(model, objective, adapter=adapter))


def trained_passes(model: NetworkConfig, objective: Objective) -> list[Pass]:
    """Return the passes that are differentiated."""
    return [one for one in objective.passes(model.v_head) if one.gradient != "none"]


def checkpointed_share(model: NetworkConfig, parallel: ParallelConfig) -> float:
    """Return the share of the blocks that run forward twice."""
    every = parallel.checkpoint_every
    return math.ceil(block_count(model) / every) / block_count(model) if every else 0


def block_bytes(model: NetworkConfig, dual: bool, compiled: bool, low: int, budget: float = 1) -> float:
    """Return the bytes that autograd keeps of one sample in one block, where attention keeps no N x N matrix.

    A value (and as much again for a tangent) keeps 8 + 2r tensors of N x D in the autocast type (`low`
    bytes): inputs of qkv, proj and fc1 (3), of fc2 and GELU (2r), qkv's output (3), the outputs of both
    branches (2); and 2 more, queries and keys, where those are normed. Norms, modulation and gates keep
    float32 tensors: 4, or 10 with tangents; the compiler recomputes them from the block's input (1 or 2).
    With a budget below 1 it also recomputes the inputs of qkv, fc1 and fc2 (2 + r); what a budget below 0.7
    would recompute is not known here. Attention to a prompt of L tokens keeps 6 or 7 more of N x D, 3 where
    recomputed, and 3 or 2 of L x D without tangent; its norms 2 in float32, 7 with tangents, and 2 of L x D.
    """
    pair = 2 if dual else 1
    if isinstance(model, MiTConfig):  # which has other numbers
        wide = pair if compiled else MIT_KEPT[dual][0]
        narrow = MIT_KEPT["compiled" if budget == 1 else "recomputed"] if compiled else MIT_KEPT[dual][1]
        return model.width * model.sequence * (FP32 * wide + low * pair * narrow)
    wide = pair if compiled else (10 if dual else 4)
    narrow = 6 + model.mlp_ratio if compiled and budget < 1 else 8 + 2 * model.mlp_ratio
    narrow, texts = narrow + 2 * model.qk_norm, 0
    if model.text is not None:
        recomputed = compiled and budget < 1
        wide += 0 if compiled else 7 if dual else 2
        narrow += 3 if recomputed else 7 if compiled else 6
        texts = model.text.tokens * ((0 if compiled else 2 * FP32) + low * (2 if recomputed else 3))
    return model.width * (model.tokens * (FP32 * wide + low * pair * narrow) + texts)


def activation_bytes(
    model: NetworkConfig, parallel: ParallelConfig, dual: bool, low: int, head: bool = False
) -> float:
    """Return the bytes that autograd keeps of a sample in a student pass; a checkpointed block its input.

    low: bytes of the autocast type; head: of the auxiliary head alone.
    """
    unit = model.sequence * model.width * (2 if dual else 1)
    blocks = model.head_depth if head else model.depth
    again = checkpointed_share(model, parallel)
    kept = block_bytes(model, dual, parallel.compile, low, parallel.activation_budget)
    ends = unit * (2 * FP32 + low)
    if model.text is not None:
        ends += low * model.text.tokens * (model.width + model.text.width)
        if model.text.encoder == "bytes":
            ends += TEXT_LAYERS * model.text.tokens * model.text.width * (4 * FP32 + low * 16)
    return blocks * ((1 - again) * kept + again * FP32 * unit) + ends


def step_activations(config: TrainConfig, parallel: ParallelConfig) -> float:
    """Return the bytes of one sample at the peak: all student passes, and the block in its backward pass."""
    low = BF16 if config.precision == "amp_bf16" else FP32
    kept = sum(
        activation_bytes(config.model, parallel, one.dual and one.gradient == "both", low, one.head)
        for one in trained_passes(config.model, config.objective)
    )
    return kept + working_bytes(config)


def working_bytes(config: TrainConfig) -> float:
    """Return the bytes of one sample in the block that is in its backward pass, as if it were eager."""
    low = BF16 if config.precision == "amp_bf16" else FP32
    dual = any(one.dual and one.gradient == "both" for one in trained_passes(config.model, config.objective))
    return block_bytes(config.model, dual, False, low)


def layout(config: TrainConfig, gpus: int) -> tuple[int, int]:
    """Return the samples of a GPU's microbatch, and the number of microbatches. Raises ConfigError."""
    if problems := config.uneven(gpus):
        raise ConfigError("\n".join(problems))
    batch = config.data.batch_size // gpus
    microbatch = min(config.microbatch or batch, batch)
    return microbatch, math.ceil(batch / microbatch)


def gathered_size(config: TrainConfig) -> int:
    """Return the bytes of a parameter when it is gathered; Composer's FULL leaves it in float32."""
    low = config.precision == "amp_bf16" and config.parallel.mixed_precision != "FULL"
    return BF16 if low else FP32


def memory(config: TrainConfig, gpus: int) -> dict[str, float]:
    """Return the bytes on each GPU, by part.

    Gathered are what is not in blocks, of student and target, and two blocks (one is prefetched).
    """
    size, parallel = count_parameters(config), config.parallel
    shards = gpus // parallel.replicas if parallel.fsdp2 else 1
    trained = trained_passes(config.model, config.objective)
    eager = sum(1 + one.dual for one in trained) if config.adapter else 1  # autocast keeps no frozen weight
    passes = len(trained) if parallel.compile else eager
    sharded = parallel.fsdp2 and shards > 1
    ends, pair = (1 + config.objective.teacher) * size.rest, 2 * size.blocks / block_count(config.model)
    gathered = ends + pair if sharded else 0
    autocast = config.precision == "amp_bf16" and not (sharded and gathered_size(config) == BF16)
    unchecked = 1 - checkpointed_share(config.model, parallel)
    rounded = size.blocks * unchecked * passes if autocast else 0
    finish, samples = Finish(config), layout(config, gpus)[0]
    beside = {
        "decoder and extractors": finish.frozen_bytes(samples),
        "moments and maps": finish.moment_bytes(),
    }
    return {
        "weights": FP32 * size.whole / shards,
        "averages": FP32 * size.averages / shards,
        "optimizer": FP32 * size.optimizer / shards,
        "gradients": FP32 * size.trained / shards,
        "gathered weights": gathered_size(config) * gathered,
        "bf16 copies of weights": BF16 * rounded,
        "activations": step_activations(config, parallel) * samples,
    } | (beside if finish.counts else {})


def gathers(config: TrainConfig) -> tuple[float, float]:
    """Return the number of all-gathers of every block in a microbatch, of the student and of the target.

    A pass gathers its share of the blocks forward and, if it is differentiated, backward. Unless weights are
    freed after a forward pass, all share the first one; a backward pass frees them: the next gathers again.
    """
    model = config.model

    def count(passes: Iterable[Pass]) -> float:
        return sum(model.head_depth if one.head else model.depth for one in passes) / block_count(model)

    passes, trained = config.objective.passes(model.v_head), count(trained_passes(model, config.objective))
    target = count(one for one in passes if one.teacher)
    student = count(passes) - target
    return (student + trained if config.parallel.reshard_after_forward else trained), target


class Collective(NamedTuple):
    """One kind of message between GPUs.

    received: bytes that each GPU receives in a step; count: messages; ranks: of the group; stride: distance
    between neighbours in it.
    """

    name: str
    received: float
    count: int
    ranks: int
    stride: int = 1


def traffic(config: TrainConfig, gpus: int) -> list[Collective]:
    """Return the collectives of one step: the network's (FSDP2: in every microbatch), and a finish's."""
    size, messages = count_parameters(config), block_count(config.model) + 1
    sums, trained = Finish(config).messages(), size.trained
    received = 2 * sum(sums) * (gpus - 1) / gpus
    moments = [Collective("all-reduce moments", received, len(sums), gpus)] if sums else []
    if not config.parallel.fsdp2:
        received = 2 * FP32 * trained * (gpus - 1) / gpus
        buckets = math.ceil(FP32 * trained / DDP_BUCKET)
        return [Collective("all-reduce gradients", received, buckets, gpus), *moments]
    microbatches, replicas = layout(config, gpus)[1], config.parallel.replicas
    shards, width = gpus // replicas, gathered_size(config)
    reduced = width if config.parallel.mixed_precision == "PURE" else FP32
    share, count = microbatches * (shards - 1) / shards, microbatches * messages
    rows = []
    for name, n in zip(("all-gather student", "all-gather target"), gathers(config), strict=True):
        received = width * share * (n * size.blocks + size.rest)
        if n:
            rows.append(Collective(name, received, microbatches * (n * (messages - 1) + 1), shards))
    rows.append(Collective("reduce-scatter gradients", reduced * share * trained, count, shards))
    if replicas > 1:
        received = microbatches * 2 * reduced * trained / shards * (replicas - 1) / replicas
        rows.append(Collective("all-reduce gradients", received, count, replicas, shards))
    return rows + moments


def communication_time(collectives: list[Collective], cluster: Cluster) -> tuple[float, float]:
    """Return the seconds of a step's collectives as rings, for bandwidth and for latency.

    A group inside a node has NVLink. Between nodes a ring of neighbours uses all network cards of a node;
    groups of distant ranks, as many as there are of them in a node, share those.
    """
    gpu = cluster.sheet
    bandwidth = latency = 0.0
    for c in collectives:
        inside = c.ranks * c.stride <= cluster.per_node
        rate = gpu.node_rate if inside else gpu.network_rate / min(c.stride, cluster.per_node)
        bandwidth += c.received / rate
        latency += c.count * cluster.hop * (c.ranks - 1)
    return bandwidth, latency


class Times(NamedTuple):
    """The seconds of one step, by what they are spent on."""

    compute: float
    bandwidth: float
    latency: float
    update: float

    @property
    def step(self) -> float:
        """The seconds of a step with all communication hidden behind the compute."""
        return max(self.compute, self.bandwidth + self.latency) + self.update

    @property
    def exposed(self) -> float:
        """The seconds of a step with no communication hidden."""
        return self.compute + self.bandwidth + self.latency + self.update


def updated_bytes(config: TrainConfig, gpus: int) -> float:
    """Return the bytes that optimizer and averages read and write.

    The optimizer reads gradients, and reads and writes weights and its state; the kernel of the averages
    reads the weights, and reads and writes each average.
    """
    shards = gpus // config.parallel.replicas if config.parallel.fsdp2 else 1
    copies, size = len(average_names(config.ema, config.objective)), count_parameters(config)
    return FP32 * ((3 + 1 + 2 * copies) * size.trained + 2 * size.optimizer) / shards


def update_time(config: TrainConfig, gpus: int, roofline: Roofline) -> float:
    """Return the seconds in which a GPU updates weights and averages, without messages.

    All GPUs share Muon's matrices: each of five steps on one of (m, n), m <= n, takes 4 m^2 n + 2 m^3 FLOPs.
    """
    flops = 0
    for shape, count in Counter(count_parameters(config).matrices).items():
        m, n = sorted(shape)
        flops += math.ceil(count / gpus) * 5 * (4 * m * m * n + 2 * m**3)
    products = roofline.seconds(0, flops, roofline.gemm)
    return roofline.seconds(updated_bytes(config, gpus)) + products


def muon_traffic(config: TrainConfig, gpus: int) -> list[Collective]:
    """Return Muon's collectives: matrices of a shape are gathered and summed up together, in bf16.

    No compute hides them.
    """
    shards = gpus // config.parallel.replicas if config.parallel.fsdp2 else 1
    rows = []
    for shape, count in Counter(count_parameters(config).matrices).items():
        size = BF16 * count * math.prod(shape)
        rows.append(Collective("all-gather momentum", size * (shards - 1) / shards, 1, shards))
        rows.append(Collective("all-reduce directions", 2 * size * (gpus - 1) / gpus, 2, gpus))
    return rows


def compute_time(config: TrainConfig, roofline: Roofline) -> float:
    """Return the seconds of one sample's passes, also of repeated blocks and a finish's networks."""
    frozen = Finish(config).flops() / roofline.sheet.exact / roofline.gemm
    again = checkpointed_share(config.model, config.parallel)
    return frozen + sum(
        roofline.seconds(0, one.products, roofline.gemm)
        + roofline.seconds(one.attention_bytes, one.attention, roofline.attention)
        + roofline.seconds(one.other_bytes)
        for one in work(config.model, config.objective, again, config.adapter)
    )


def times(config: TrainConfig, gpus: int, cluster: Cluster) -> Times:
    """Predict the times of a step; averages and the optimizer's state go at the memory's speed."""
    return Times(
        config.data.batch_size / gpus * compute_time(config, cluster),
        *communication_time(traffic(config, gpus), cluster),
        update_time(config, gpus, cluster) + sum(communication_time(muon_traffic(config, gpus), cluster)),
    )


def column(config: TrainConfig, gpus: int, cluster: Cluster) -> dict[str, str]:
    """Return all figures for one number of GPUs, as text by row."""
    microbatch, microbatches = layout(config, gpus)
    parts, t = memory(config, gpus), times(config, gpus, cluster)
    gpu = cluster.sheet
    flops = step_flops(config.model, config.objective, config.adapter) * config.data.batch_size
    others = {
        "eager": replace(config.parallel, compile=False, checkpoint_every=0),
        "compiled": replace(config.parallel, compile=True, checkpoint_every=0),
        "every block checkpointed": replace(config.parallel, checkpoint_every=1),
    }
    total = sum(parts.values())
    rows = {"batch per GPU": f"{microbatches} x {microbatch}"}
    rows |= {f"{name}, GiB": f"{value / GIB:.2f}" for name, value in parts.items()}
    rows |= {"memory, GiB": f"{total / GIB:.1f}" + ("" if total < 0.9 * gpu.memory else " TOO MUCH")}
    rows |= {
        f"  activations {name}, GiB": f"{step_activations(config, other) * microbatch / GIB:.2f}"
        for name, other in others.items()
    }
    if config.model.text is not None and config.model.text.encoder == "dataset":
        size = BF16 * config.model.text.tokens * config.model.text.width * config.data.batch_size / gpus
        rows |= {"embeddings of prompts per GPU, MB/s": f"{size / t.step / 1e6:.1f}"}
    rows |= {"PFLOP per step": f"{flops / 1e15:.2f}", "compute, ms, predicted": f"{1e3 * t.compute:.1f}"}
    if (finish := Finish(config)).counts:
        frozen = finish.flops() * config.data.batch_size
        rows |= {
            "decoder and extractors, PFLOP per step, float32": f"{frozen / 1e15:.2f}",
            "maps, TFLOP per step and GPU, float64": f"{finish.map_flops() / 1e12:.3f}",
        }
    rows |= {f"{c.name}, GB": f"{c.received / 1e9:.2f}" for c in traffic(config, gpus)}
    duration = Time.from_timestring(config.duration)
    if duration.unit != TimeUnit.BATCH:
        raise ConfigError(f"duration: {config.duration} must be in batches, e.g. 300000ba, to be planned")
    seconds = t.step * duration.value
    return rows | {
        "communication, ms, predicted": f"{1e3 * t.bandwidth:.1f} + {1e3 * t.latency:.1f}",
        "optimizer and averages, ms, predicted": f"{1e3 * t.update:.1f}",
        "step, s, predicted": f"{t.step:.3f}" + (f" to {t.exposed:.3f}" if gpus > 1 else ""),
        "images/s, predicted": f"{config.data.batch_size / t.step:.0f}",
        "MFU, predicted": f"{flops / gpus / t.step / gpu.flops:.0%}",
        "days, predicted": f"{seconds / 86400:.2f}",
        "GPU-hours, predicted": f"{seconds / 3600 * gpus:.0f}",
    }


def usual_gpus(config: TrainConfig) -> list[int]:
    """Return those of 8, 64 and 512 GPUs that divide the run's batch, or else the most of a node that do."""
    fitting = [gpus for gpus in (8, 64, 512) if not config.uneven(gpus)]
    return fitting or [next(gpus for gpus in range(7, 0, -1) if gpus == 1 or not config.uneven(gpus))]


def report(config: TrainConfig, cluster: Cluster) -> str:
    """Return a Markdown table, one column for each number of GPUs, under the assumptions that it rests on."""
    size, counts = count_parameters(config), cluster.gpus or usual_gpus(config)
    columns = [column(config, gpus, cluster) for gpus in counts]
    finish, left_out = Finish(config), ["the time of maps and of the first samples"]
    left_out += [f"passes of {', '.join(finish.missing)}"] if finish.missing else []
    left_out += [f"moments of {name}" for name, known in finish.counts.items() if known is None]
    adapted = f", {size.trained / 1e6:.2f}M of an adapter trained" if config.adapter else ""
    lines = [
        f"{config.run_name}: {(size.blocks + size.rest) / 1e6:.0f}M parameters{adapted}, "
        f"{config.model.tokens} tokens, batch {config.data.batch_size}, {config.duration}, "
        f"{config.precision}.",
        f"{cluster.assumptions()} {cluster.hop * 1e6:g} us a hop; compiled blocks.",
        "Communication is bandwidth + latency. A step takes from the first time (all of it hidden behind",
        "compute) to the second (none of it); the rows below go by the first.",
        *([f"Not counted: {', '.join(left_out)}."] if finish.counts else []),
        "",
        "| GPUs | " + " | ".join(map(str, counts)) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    lines += [f"| {name} | " + " | ".join(c[name] for c in columns) + " |" for name in columns[0]]
    return "\n".join(lines) + "\n"


def read(arguments: list[str], own: type[Roofline]) -> tuple[TrainConfig, Roofline]:
    """Read CONFIG.yaml, then keys of `own` and of the configuration, as key=value. Raises ConfigError."""
    names = {f.name for f in fields(own)}
    mine = [a for a in arguments[1:] if a.split("=")[0] in names]
    others = [a for a in arguments[1:] if a not in mine]
    mine = [f"gpus=[{a[5:].strip('[]')}]" if a.startswith("gpus=") else a for a in mine]
    return load_config(TrainConfig, yaml_of(arguments[0]), others), load_config(own, None, mine)


def main(arguments: list[str]) -> None:
    """Run the command line: CONFIG.yaml, then keys of Cluster and of the configuration, as key=value."""
    usage = "python -m recipe.plan CONFIG.yaml [gpus=8,64,512] [gpu=h100] [key=value ...]"
    answer(arguments, usage, __doc__, Cluster, TrainConfig)
    try:
        sys.stdout.write(report(*read(arguments, Cluster)))
    except ConfigError as error:
        raise SystemExit(f"config error: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
