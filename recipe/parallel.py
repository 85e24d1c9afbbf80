"""Sharding, per-block compilation and activation checkpointing, applied in one place to a plain model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch._functorch.config
import torch._inductor.config
from composer.distributed import fsdp2
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.utils.checkpoint import checkpoint

from recipe.dit import Block, DiT


@dataclass
class ParallelConfig:
    """How a model is spread over ranks and how its blocks are run.

    fsdp2: shard student and averages block by block (false: DDP, whole copies); replicas: with fsdp2, shard
    within groups of world / replicas ranks and replicate across them (hybrid sharding);
    reshard_after_forward: free gathered weights between forward and backward; mixed_precision: DEFAULT
    (gather weights in the run's precision, reduce gradients in float32), PURE (both in the run's precision)
    or FULL (both in float32); compile: torch.compile of every block; activation_budget: with compile, share
    of what a block would keep for the backward pass that it may keep (1: all; from 0.7 to below 1: what costs
    no matrix product is computed again); checkpoint_every: recompute every k-th block of the student in the
    backward pass (0: none, 1: all).
    """

    fsdp2: bool = False
    replicas: int = 1
    reshard_after_forward: bool = True
    mixed_precision: str = "DEFAULT"
    compile: bool = False
    activation_budget: float = 0.9
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"parallel.replicas: {self.replicas} must be at least 1")
        if self.replicas > 1 and not self.fsdp2:
            raise ValueError(f"parallel.replicas: {self.replicas} needs parallel.fsdp2: true")
        if self.mixed_precision not in ("DEFAULT", "PURE", "FULL"):
            raise ValueError(
                f"parallel.mixed_precision: {self.mixed_precision!r} is not DEFAULT, PURE or FULL"
            )
        if not 0 <= self.activation_budget <= 1:
            raise ValueError(
                f"parallel.activation_budget: {self.activation_budget} must be between 0 and 1 (keep all)"
            )
        if self.checkpoint_every < 0:
            raise ValueError(f"parallel.checkpoint_every: {self.checkpoint_every} must be 0 (off) or more")


def configure_compiler(config: ParallelConfig) -> None:
    """Settings of torch.compile, for the whole process."""
    torch._functorch.config.activation_memory_budget = config.activation_budget
    # Sums over tokens join the kernels that make their terms: 7% less traffic backward (benchmarks.compiled)
    torch._inductor.config.loop_ordering_after_fusion = True


def prepare_blocks(net: DiT, config: ParallelConfig, trained: bool) -> None:
    """Compile and checkpoint the blocks of one network, and mark them as units of sharding.

    Only `forward` is replaced, so parameter names stay and FSDP2's hooks remain outside the compiled code.
    Value and tangent are recomputed together, since a block takes and returns both.
    """
    if config.compile:
        configure_compiler(config)
    net.fsdp_wrap_fn = lambda module: isinstance(module, Block)
    for i, block in enumerate(net.blocks):
        if config.compile:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        if trained and config.checkpoint_every and i % config.checkpoint_every == 0:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def parallelism(config: ParallelConfig, device: str) -> ParallelismConfig | None:
    """Composer's configuration of FSDP2; None leaves it to DistributedDataParallel. Raises ValueError."""
    if not config.fsdp2:
        return None
    if device == "cpu":
        _divide_gradients_explicitly()
    # Weights alone take the lower precision: neither the times that enter the network nor its residual stream
    fsdp2.MixedPrecisionPolicy = partial(MixedPrecisionPolicy, cast_forward_inputs=False)
    mesh, world = None, dist.get_world_size()
    if config.replicas > 1:
        if world % config.replicas:
            raise ValueError(f"parallel.replicas: {config.replicas} does not divide the {world} ranks")
        shape = (config.replicas, world // config.replicas)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    options = {
        "device_mesh": mesh,
        "reshard_after_forward": config.reshard_after_forward,
        "mixed_precision": config.mixed_precision,
    }
    return ParallelismConfig(fsdp2=FSDP2Config(**options))


def _divide_gradients_explicitly() -> None:
    """gloo's reduce_scatter takes AVG for SUM (pytorch 162338): have FSDP2 sum and divide, as for fp16."""
    original = _fsdp_collectives._get_gradient_divide_factors

    def explicit(scatter_group: object, reduce_group: object, _dtype: torch.dtype, *rest: object) -> object:
        return original(scatter_group, reduce_group, torch.float16, *rest)

    _fsdp_collectives._get_gradient_divide_factors = explicit
