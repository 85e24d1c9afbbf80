"""Forward-mode differentiation written out: every operation maps a (value, tangent) pair to a pair.

A tangent is the directional derivative of its value. `None` is a tangent known to be zero: it is never
computed, so the same network serves plain evaluation (all tangents None) and dual evaluation, and ordinary
autograd differentiates through both. Nothing here needs torch.func, so FSDP2, DDP, torch.compile and
activation checkpointing see ordinary tensors.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import kernels


class Dual(NamedTuple):
    """A value and its directional derivative (same shape); `tangent=None` means exactly zero."""

    value: Tensor
    tangent: Tensor | None = None


def dual(x: Tensor | Dual) -> Dual:
    """Return a plain tensor as a pair with zero tangent, and a pair as it is."""
    return x if isinstance(x, Dual) else Dual(x)


def detach(x: Dual) -> Dual:
    """Return the pair without gradient through its tangent."""
    return Dual(x.value, None if x.tangent is None else x.tangent.detach())


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def add(*pairs: Dual) -> Dual:
    """Return the sum of pairs."""
    return Dual(_sum(*(p.value for p in pairs)), _sum(*(p.tangent for p in pairs)))


def mul(a: Dual, b: Dual) -> Dual:
    """Return the product of two pairs: (ab)' = a'b + ab'."""
    left = None if a.tangent is None else a.tangent * b.value
    right = None if b.tangent is None else a.value * b.tangent
    return Dual(a.value * b.value, _sum(left, right))


def map_linear(f, x: Dual) -> Dual:  # noqa: ANN001
    """Apply a linear map f without a constant term (a reshape, a permutation) to value and tangent alike."""
    return Dual(f(x.value), None if x.tangent is None else f(x.tangent))


def cat(pairs: list[Dual], dim: int) -> Dual:
    """Return pairs joined along `dim`; where one has a tangent, zeros stand for those of the others."""
    value = torch.cat([p.value for p in pairs], dim)
    if all(p.tangent is None for p in pairs):
        return Dual(value)
    tangents = [torch.zeros_like(p.value) if p.tangent is None else p.tangent for p in pairs]
    return Dual(value, torch.cat(tangents, dim))


def divide(a: Dual, b: Dual) -> Dual:
    """Return the quotient by its rule: y = a / b, y' = (a' - y b') / b."""
    y = a.value / b.value
    top = _sum(a.tangent, None if b.tangent is None else -y * b.tangent)
    return Dual(y, None if top is None else top / b.value)


def unbind(x: Dual, dim: int) -> list[Dual]:
    """Return the slices of a pair along `dim`."""
    values = x.value.unbind(dim)
    tangents = [None] * len(values) if x.tangent is None else x.tangent.unbind(dim)
    return [Dual(*pair) for pair in zip(values, tangents, strict=True)]


def linear(layer: torch.nn.Module, x: Dual) -> Dual:
    """Return x W' + b; the tangent sees W alone. `layer` has `weight` (out, in, ...) and `bias` (out).

    Where it has an adapter (recipe/adapter.py), its product is added to both.
    """
    weight = layer.weight.flatten(1)
    y = Dual(
        F.linear(x.value, weight, layer.bias),
        None if x.tangent is None else F.linear(x.tangent, weight),
    )
    if not hasattr(layer, "lora_A"):
        return y
    return add(y, map_linear(lambda z: layer.lora_B(layer.lora_scale * layer.lora_A(z)), x))


def silu(x: Dual) -> Dual:
    """Return x sigmoid(x)."""
    if x.tangent is None:
        return Dual(F.silu(x.value))
    gate = torch.sigmoid(x.value)
    y = x.value * gate
    return Dual(y, x.tangent * (gate + y * (1 - gate)))


def linear_gelu(layer: torch.nn.Linear, x: Dual, detach_tangent: bool = False) -> Dual:
    """Return `gelu` of `linear`, in one kernel where there is neither tangent nor adapter."""
    if x.tangent is None and not hasattr(layer, "lora_A"):
        return Dual(kernels.linear_gelu(x.value, layer.weight, layer.bias))
    h = linear(layer, x)
    return gelu(detach(h) if detach_tangent else h)


def gelu(x: Dual) -> Dual:
    """Return GELU of x, in its tanh form."""
    if x.tangent is None:
        return Dual(F.gelu(x.value, approximate="tanh"))
    if not x.tangent.requires_grad:  # dynamo would give the function below zeros to differentiate
        slope = _gelu_slope_times(x.tangent, x.value.detach())
        return Dual(F.gelu(x.value, approximate="tanh"), slope)
    return Dual(*_DualGELU.apply(x.value, x.tangent))


class _DualGELU(torch.autograd.Function):
    """(y, y') = (g(x), g'(x) x'), with g'' written out for the backward pass.

    Autograd's own second derivative of GELU is a chain of some thirty elementwise passes (a fifth of a small
    step on a CPU) and keeps its intermediates; this keeps x and x'.
    """

    @staticmethod
    def forward(ctx, x: Tensor, tx: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        ctx.save_for_backward(x, tx)
        ctx.set_materialize_grads(False)  # a detached tangent costs nothing
        return F.gelu(x, approximate="tanh"), _gelu_slope_times(tx, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor | None, grad_ty: Tensor | None) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN001
        x, tx = ctx.saved_tensors
        grad_x = None if grad_y is None else _gelu_slope_times(grad_y, x)
        if grad_ty is None:
            return grad_x, None
        bend = (_gelu_second_derivative(x) * tx * grad_ty).to(x.dtype)
        return bend if grad_x is None else grad_x + bend, _gelu_slope_times(grad_ty, x)


def _gelu_slope_times(y: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(y, x, approximate="tanh")


def _gelu_second_derivative(x: Tensor) -> Tensor:
    """Return g'' of g = x (1 + h) / 2, h = tanh(a x + c x^3). With i = a + 3 c x^2,

        g'' = (1 - h^2) (i + 3 c x^2 - x h i^2).

    In float32 at least; in place where it can be, since a CPU spends its time on fresh pages here.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    a, c = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715
    square = x * x
    h = (square * c).add_(a).mul_(x).tanh_()
    i = square.mul_(3 * c) + a
    return square.add_(i).sub_(i.square_().mul_(h).mul_(x)).mul_(h.square_().neg_().add_(1))


def swiglu(x: Dual) -> Dual:
    """Return silu(a) b of the two halves of the last axis, (..., 2 D) -> (..., D)."""
    a, b = unbind(map_linear(lambda z: z.unflatten(-1, (2, -1)), x), -2)
    return mul(silu(a), b)


def rms_norm(x: Dual, gain: Tensor | None = None) -> Dual:
    """Return x / sqrt(mean(x^2) + 1e-6) over the last axis, times the gain, at least in float32."""
    y = Dual(*kernels.rms_norm(*x))
    return y if gain is None else mul(y, Dual(gain))


def layer_norm(x: Dual) -> Dual:
    """Return LayerNorm without gain and bias: `rms_norm` of x - mean(x)."""
    return rms_norm(map_linear(lambda z: z - z.mean(-1, keepdim=True), x))


def modulate(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """Return x (1 + scale) + shift; shift and scale (B, 1, D) apply to every token of x (B, N, D)."""
    return add(mul(x, Dual(1 + scale.value, scale.tangent)), shift)


def attention(qkv: Dual, q_gain: Tensor | None, k_gain: Tensor | None) -> Dual:
    """Return self-attention (B, N, H, D) of a projection (B, N, 3, H, D), with scores over sqrt(D).

    Queries and keys are RMS-normed with these gains (D,); not at all where both are None.
    """
    return Dual(*kernels.qkv_norm_attention(*qkv, q_gain, k_gain))


def attend(q: Dual, k: Dual, v: Dual, length: Tensor | None = None) -> Dual:
    """Return attention (B, H, N, D) to tokens (B, H, L, D), or to the first `length` (B,) of them."""
    values, tangents = zip(q, k, v, strict=True)
    if all(tangent is None for tangent in tangents):
        return Dual(kernels.attention(*values, lengths=length))
    return Dual(*kernels.jvp_attention(*values, *tangents, lengths=length))


def rotate(x: Dual, cos: Tensor, sin: Tensor) -> Dual:
    """Turn the pairs (2i, 2i + 1) of features (..., N, D) by angles of cosine and sine (N, D / 2)."""

    def turn(z: Tensor) -> Tensor:
        a, b = z.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    return map_linear(turn, x)


def sinusoid(u: Dual, width: int) -> Dual:
    """Return [cos(u f_i), sin(u f_i)] with f_i = 10000^(-2i/width): (B,) => (B, width).

    The angles are taken in float64 and the result has the type of u: no factor of 1000 on the time.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float64, device=u.value.device)
    freqs = 10000.0 ** (-steps / half)
    angles = u.value.double()[:, None] * freqs
    cos, sin = angles.cos(), angles.sin()
    value = torch.cat([cos, sin], -1).to(u.value.dtype)
    if u.tangent is None:
        return Dual(value)
    slope = torch.cat([-sin * freqs, cos * freqs], -1)
    return Dual(value, (u.tangent.double()[:, None] * slope).to(u.value.dtype))
