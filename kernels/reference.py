"""Attention and its tangent in plain PyTorch: the CPU path and the yardstick of the Triton kernels.

B batch, H heads, Nq queries, Nk keys, D head dimension. Every tensor is (B, H, N, D).
"""

from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula


def jvp_attention(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention o and its tangent to along (tq, tk, tv); None is a tangent that is zero everywhere.

    S = c QK', tS = c (tQ K' + Q tK'), P = softmax(S), tP = P * (tS - rowsum(P * tS)),
    O = PV, tO = tP V + P tV: two matrix products for the value and up to four for the tangent, all
    differentiable. Scores are kept in float32 at least, as in the fused kernels; P and tP are rounded to the
    inputs' type for the products with V, tV.
    """
    p = _scores(q, k, scale).softmax(-1)
    p_rounded = p.to(v.dtype)
    to = None if tv is None else p_rounded @ tv
    ts = _sum(_scores(tq, k, scale), _scores(q, tk, scale))
    if ts is not None:
        tp = p * (ts - (p * ts).sum(-1, keepdim=True))
        to = _sum(tp.to(v.dtype) @ v, to)
    return p_rounded @ v, to


def _scores(rows: Tensor | None, columns: Tensor | None, scale: float) -> Tensor | None:
    """scale * rows columns', in float32 at least."""
    if rows is None or columns is None:
        return None
    wide = torch.promote_types(rows.dtype, torch.float32)
    return scale * (rows.to(wide) @ columns.to(wide).mT)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """x + y, where None is zero."""
    if x is None or y is None:
        return y if x is None else x
    return x + y


def attention_flops(q_shape: tuple[int, ...], k_shape: tuple[int, ...], products: int) -> int:
    """FLOPs of `products` matrix products of size (Nq, D) x (D, Nk) in each of the B * H heads."""
    return 2 * products * prod(q_shape) * k_shape[-2]


def count_cpu_attention_flops() -> None:
    """Tell torch.utils.flop_counter about the CPU's fused SDPA, which it passes over in silence.

    Counted are the products that the mathematics needs, 2 forward and 4 backward, not what is recomputed.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if forward not in flop_registry:
        register_flop_formula(forward)(lambda q, k, *args, **kwargs: attention_flops(q, k, 2))
    if backward not in flop_registry:
        register_flop_formula(backward)(lambda grad, q, k, *args, **kwargs: attention_flops(q, k, 4))
