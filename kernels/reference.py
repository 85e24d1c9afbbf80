"""Attention, RMS norm and their tangents in plain PyTorch: the CPU path and the reference of the kernels.

B batch, H heads, Nq queries, Nk keys, D head dimension. Tensors are (B, H, N, D) unless stated otherwise.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

EPS = 1e-6

MaybeTensor = Tensor | None


def qkv_norm_attention(
    qkv: Tensor, tqkv: MaybeTensor, gains: tuple[Tensor, Tensor] | None, scale: float
) -> tuple[Tensor, MaybeTensor]:
    """Compute self-attention of a projection (B, N, 3, H, D) with RMS-normed queries and keys.

    gains: those of queries and of keys, each (D,); None for no norm. Returns (o, to), each (B, N, H, D); to
    is None if tqkv is.
    """
    (q, k, v), (tq, tk, tv) = split_heads(qkv), split_heads(tqkv)
    if gains is not None:
        (q, tq), (k, tk) = (
            tuple(None if y is None else (y * gain).to(qkv.dtype) for y in rms_norm(x, tx))
            for x, tx, gain in ((q, tq, gains[0]), (k, tk, gains[1]))
        )
    if tqkv is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2), None
    o, to = jvp_attention(q, k, v, tq, tk, tv, None, scale)
    return o.transpose(1, 2), to.transpose(1, 2)


def split_heads(packed: MaybeTensor, parts: int = 3) -> tuple[MaybeTensor, ...]:
    """Split (B, N, parts, H, D) into views (B, H, N, D).

    Returns two values at least: the second is None if parts is 1, and all are None if packed is.
    """
    if packed is None:
        return (None,) * max(2, parts)
    views = tuple(x.transpose(1, 2) for x in packed.unbind(2))
    return views if parts > 1 else (*views, None)


def rms_norm(x: Tensor, tx: MaybeTensor) -> tuple[Tensor, MaybeTensor]:
    """Compute y = x / sqrt(mean(x^2) + 1e-6) over the last axis and its tangent, at least in float32.

    With r = 1 / sqrt(mean(x^2) + 1e-6): y' = r (x' - y mean(y x')).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    y = x * r
    if tx is None:
        return y, None
    tx = tx.to(x.dtype)
    return y, (tx - y * (y * tx).mean(-1, keepdim=True)) * r


def jvp_attention(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    lengths: MaybeTensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention o and its tangent to along (tq, tk, tv); a tangent of None is zero everywhere.

    S = c QK', tS = c (tQ K' + Q tK'), P = softmax(S), tP = P * (tS - rowsum(P * tS)),
    O = PV, tO = tP V + P tV: two matrix products for the value and up to four for the tangent, all
    differentiable. Scores are kept in float32 at least, as in the fused kernels; P and tP are rounded to the
    inputs' type for the products with V, tV. lengths (B,): the number of valid keys of each sample.
    """
    s = _scores(q, k, scale)
    if lengths is not None:
        seen = valid_keys(lengths, k)
        s = s.masked_fill(~seen, -torch.inf)
        k, v, tk, tv = (None if x is None else x.masked_fill(~seen.mT, 0) for x in (k, v, tk, tv))
    p = s.softmax(-1)
    p_rounded = p.to(v.dtype)
    to = None if tv is None else p_rounded @ tv
    ts = _sum(_scores(tq, k, scale), _scores(q, tk, scale))
    if ts is not None:
        tp = p * (ts - (p * ts).sum(-1, keepdim=True))
        to = _sum(tp.to(v.dtype) @ v, to)
    return p_rounded @ v, to


def valid_keys(lengths: Tensor, k: Tensor) -> Tensor:
    """Return which keys are valid, bool (B, 1, 1, Nk), from their number in each sample, (B,)."""
    return (torch.arange(k.shape[2], device=k.device) < lengths[:, None])[:, None, None]


def _scores(rows: MaybeTensor, columns: MaybeTensor, scale: float) -> MaybeTensor:
    """Compute scale * rows columns' in float32 at least; None is zero."""
    if rows is None or columns is None:
        return None
    wide = torch.promote_types(rows.dtype, torch.float32)
    return scale * (rows.to(wide) @ columns.to(wide).mT)


def _sum(x: MaybeTensor, y: MaybeTensor) -> MaybeTensor:
    """Compute x + y, where None is zero."""
    if x is None or y is None:
        return y if x is None else x
    return x + y


def gelu(x: Tensor) -> Tensor:
    """Compute GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def attention_flops(q_shape: tuple[int, ...], k_shape: tuple[int, ...], products: int) -> int:
    """Return the FLOPs of `products` matrix products (Nq, D) x (D, Nk) in each of the B * H heads."""
    return 2 * products * prod(q_shape) * k_shape[-2]


def count_cpu_attention_flops() -> None:
    """Tell torch.utils.flop_counter about the CPU's fused SDPA, which it silently leaves out.

    Counted are the products that the mathematics needs, 2 forward and 4 backward, not what is recomputed.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if forward not in flop_registry:
        register_flop_formula(forward)(lambda q, k, *args, **kwargs: attention_flops(q, k, 2))
    if backward not in flop_registry:
        register_flop_formula(backward)(lambda grad, q, k, *args, **kwargs: attention_flops(q, k, 4))
