"""Sharding, compilation by block and activation checkpointing of a plain model; what looks through them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import torch
import torch._functorch.config
import torch._inductor.config
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from recipe import patches
from recipe.dit import Block, Denoiser
from recipe.mit import MiTBlock
from recipe.settings import ConfigError, Count, CountOrZero, Settings, Share
from storage import StorageError

T = TypeVar("T")


@dataclass
class ParallelConfig(Settings):
    """How the model is spread over ranks, and how its blocks are run."""

    fsdp2: bool = Field(
        False,
        description="Whether student and averages are sharded block by block (FSDP2); otherwise every rank "
        "holds whole copies (DDP).",
    )
    replicas: Count = Field(
        1,
        description="With fsdp2, number of groups of ranks that each hold a whole sharded copy (hybrid "
        "sharding).",
    )
    reshard_after_forward: bool = Field(
        True, description="Whether gathered weights are freed between forward and backward pass."
    )
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = Field(
        "DEFAULT",
        description="What is sent in bf16 under amp_bf16: gathered weights (DEFAULT), reduced gradients, too "
        "(PURE), or nothing (FULL).",
    )
    compile: bool = Field(False, description="Whether every block is compiled by torch.compile.")
    activation_budget: Share = Field(
        0.9,
        description="With compile, share of a block's activations that is kept for the backward pass; 1 "
        "keeps all, and from 0.7 on no matrix product is computed again.",
    )
    checkpoint_every: CountOrZero = Field(
        0,
        description="Every how many blocks of the student one is computed again in the backward pass; 0 for "
        "none, 1 for all.",
    )

    @model_validator(mode="after")
    def combinations(self) -> ParallelConfig:
        """Raise ConfigError for hybrid sharding without sharding."""
        if self.replicas > 1 and not self.fsdp2:
            raise ConfigError(f"replicas: {self.replicas} needs parallel.fsdp2: true")
        return self


def unwrap(model: nn.Module) -> nn.Module:
    """Return the ComposerModel inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def local_shards(tensors: list[Tensor]) -> list[Tensor]:
    """Return the shards of these tensors that this rank holds; plain tensors stay as they are."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def on_rank_zero(action: Callable[[], T]) -> T:
    """Return, on all ranks, the result of `action`, which runs on rank 0 alone.

    A ConfigError or StorageError that it raises is raised on all ranks.
    """
    result = error = None
    if dist.get_global_rank() == 0:
        try:
            result = action()
        except (ConfigError, StorageError) as raised:
            error = raised
    answer = [result, error]
    dist.broadcast_object_list(answer)
    result, error = answer
    if error is not None:
        raise error
    return result


def configure_compiler(config: ParallelConfig) -> None:
    """Set torch.compile's options, for the whole process."""
    torch._functorch.config.activation_memory_budget = config.activation_budget
    inductor = torch._inductor.config
    # Sums over tokens join the kernels that make their terms: 7% less traffic backward (benchmarks.compiled)
    inductor.loop_ordering_after_fusion = True
    # What a second reader can compute again is not written for it: 4% less traffic
    inductor.realize_opcount_threshold = inductor.realize_reads_threshold = 1000
    inductor.realize_acc_reads_threshold = 1000


def prepare_blocks(net: Denoiser, config: ParallelConfig, trained: bool) -> None:
    """Compile and checkpoint the blocks of one network, and say how Composer is to shard them.

    Only `forward` is replaced, so parameter names stay and FSDP2's hooks remain outside the compiled code.
    Value and tangent are recomputed together, since a block takes and returns both.
    """
    if config.compile:
        configure_compiler(config)
    block_options = {"reshard_after_forward": config.reshard_after_forward}
    net.fsdp_wrap_fn = lambda module: block_options if isinstance(module, Block | MiTBlock) else False
    for i, block in enumerate(m for m in net.modules() if isinstance(m, Block | MiTBlock)):
        if config.compile:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        if trained and config.checkpoint_every and i % config.checkpoint_every == 0:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def parallelism(config: ParallelConfig, device: str) -> ParallelismConfig | None:
    """Return Composer's configuration of FSDP2, or None for DistributedDataParallel."""
    if not config.fsdp2:
        return None
    if device == "cpu":
        patches.divide_gradients_explicitly()
    patches.gather_weights_alone()
    mesh = None
    if config.replicas > 1:
        shape = (config.replicas, dist.get_world_size() // config.replicas)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    options = {
        "device_mesh": mesh,
        "reshard_after_forward": False,  # what is not in blocks: its backward pass begins at once
        "mixed_precision": config.mixed_precision,
    }
    return ParallelismConfig(fsdp2=FSDP2Config(**options))
