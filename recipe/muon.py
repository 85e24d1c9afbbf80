"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): matrices move along orthogonal matrices."""

from collections.abc import Callable
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


class Muon(torch.optim.AdamW):
    """Muon for matrices, AdamW for all other weights, both at the same learning rate.

    For the gradient G of a matrix W (m, n), in every step:

        M <- b M + (1 - b) G,    W <- W - lr 0.2 sqrt(max(m, n)) orthogonal(b M + (1 - b) G)

    The factor lets the update be as large as AdamW's (Moonlight, arXiv 2502.16982, eq. 4).
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], momentum: float, **settings: Any
    ) -> None:
        groups = [{"params": others, "momentum": None}, {"params": matrices, "momentum": momentum}]
        # An empty one, above frozen weights, would come out of a sharded checkpoint without its settings
        super().__init__([group for group in groups if group["params"]], **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all weights that have a gradient."""
        loss = None
        if closure is not None:  # it frees the last step's gradients, of all groups
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:  # AdamW's own step sees its weights alone
            self.param_groups = [group for group in groups if group["momentum"] is None]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["momentum"] is not None:
                self.update(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def update(self, group: dict[str, Any], matrices: list[nn.Parameter]) -> None:
        """Update matrices, those of one shape together: each rank makes its share of them orthogonal."""
        rank, ranks = dist.get_global_rank(), dist.get_world_size()
        for shape in sorted({p.shape for p in matrices}):
            alike = [p for p in matrices if p.shape == shape]
            ahead = whole(torch.stack([self.look_ahead(p, group["momentum"]) for p in alike]))
            directions = torch.zeros_like(ahead)
            directions[rank::ranks] = orthogonal(ahead[rank::ranks])
            dist.all_reduce(directions)  # exact: all ranks but one have zeros
            for p, direction in zip(alike, directions, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(like(direction.to(p.dtype), p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def look_ahead(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Return b M + (1 - b) G of a matrix, after M <- b M + (1 - b) G."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # which AdamW wants to find when a checkpoint is loaded
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)


def whole(x: Tensor) -> Tensor:
    """Return a tensor that may be sharded, on every rank; in bf16 on a GPU."""
    x = x.bfloat16() if x.is_cuda else x
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, p: Tensor) -> Tensor:
    """Return x, which every rank holds whole, sharded as p is."""
    if not isinstance(p, DTensor):
        return x
    everywhere = [Replicate()] * p.device_mesh.ndim
    return DTensor.from_local(x, p.device_mesh, everywhere).redistribute(placements=p.placements)


def orthogonal(x: Tensor) -> Tensor:
    """Return about U V' for matrices x = U S V' (..., m, n): their singular values become 0.7 to 1.2.

    Five steps X <- a X + (b X X' + c (X X')^2) X of Newton and Schulz, with the factors of Jordan et al.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x) / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x
