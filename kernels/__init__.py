"""Attention with an explicit tangent: fused Triton kernels on CUDA, plain PyTorch elsewhere.

    from kernels import attention, jvp_attention, qkv_norm_attention

B batch, H heads, N tokens, D head dimension. Tensors are (B, H, N, D) unless a docstring says otherwise.
"""

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.reference import MaybeTensor, gelu, rms_norm

__all__ = ["attention", "jvp_attention", "linear_gelu", "qkv_norm_attention", "rms_norm", "set_backend"]

BACKENDS = ("auto", "reference", "triton")


def set_backend(name: str) -> None:
    """Choose what computes `jvp_attention`, `qkv_norm_attention` and `linear_gelu` from now on.

    "auto" (the default) is Triton for CUDA tensors of 16 or 32 bits and the PyTorch reference for all others;
    "reference" and "triton" force one. Triton takes CPU tensors only in its interpreter, that is with
    TRITON_INTERPRET=1 in the environment before Python starts. Raises ValueError for any other name, and for
    "triton" where it is not installed.
    """
    global _backend, _operators
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "triton" and not has_triton:
        raise ValueError("backend is 'triton', which is not installed; it must be auto or reference")
    if name == "triton" or (
        name == "auto" and has_triton and torch.version.cuda and torch.cuda.is_available()
    ):
        _operators = importlib.import_module("kernels.operators")
    _backend = name


def attention(q: Tensor, k: Tensor, v: Tensor, *, lengths: MaybeTensor = None) -> Tensor:
    """Compute softmax(q k' / sqrt(D)) v by torch's fused attention.

    lengths: int (B,), the number of valid keys of each sample; the others may hold any finite number.
    """
    seen = None if lengths is None else reference.valid_keys(lengths, k)
    return F.scaled_dot_product_attention(q, k, v, seen)


def jvp_attention(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor, *,
    lengths: MaybeTensor = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention and its tangent, (o, to), both shaped like q, differentiable once in all six inputs.

    q, tq are (B, H, Nq, D); k, v, tk, tv are (B, H, Nk, D); scores are scaled by D ** -0.5. A tangent that
    is None is zero everywhere and costs nothing; at least one must be given. lengths: int (B,), from 1 to Nk,
    the number of valid keys of each sample; the others are never read. Under torch.autocast the inputs are
    cast as those of scaled_dot_product_attention are. Raises ValueError naming the argument that is wrong.
    """
    tensors = _autocast({"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv})
    _check(tensors)
    if lengths is not None:
        if lengths.shape != q.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; it must be int ({q.shape[0]},)"
            )
        lengths = lengths.to(torch.int32)
    scale = q.shape[-1] ** -0.5
    with _without_autocast(q.device.type):
        if _use_triton("q", tensors["q"], q.shape[-1]):
            return _operators.jvp_attention(*tensors.values(), lengths, scale)[:2]
        return reference.jvp_attention(*tensors.values(), lengths, scale)


def qkv_norm_attention(
    qkv: Tensor, tqkv: MaybeTensor, q_gain: MaybeTensor, k_gain: MaybeTensor
) -> tuple[Tensor, MaybeTensor]:
    """Compute self-attention, (o, to), of a projection's output (B, N, 3, H, D) with RMS-normed q and k.

    o and its tangent to are (B, N, H, D); to is None where tqkv is. The gains (D,), shared by the heads, are
    differentiable once, as qkv and tqkv are; if both are None, there is no norm. Under torch.autocast qkv and
    tqkv are cast. The projection and the normed queries and keys are kept for the backward pass. Raises
    ValueError naming the argument that is wrong.
    """
    qkv, tqkv = _autocast({"qkv": qkv, "tqkv": tqkv}).values()
    _check_qkv(qkv, tqkv, q_gain, k_gain)
    scale = qkv.shape[-1] ** -0.5
    gains = None if q_gain is None else (q_gain, k_gain)
    with _without_autocast(qkv.device.type):
        if not _use_triton("qkv", qkv, qkv.shape[-1]):
            return reference.qkv_norm_attention(qkv, tqkv, gains, scale)
        gain = None if gains is None else q_gain.float() * k_gain.float()
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (qkv, tqkv, gain))
        o, to, *_ = _operators.qkv_norm_attention(qkv, tqkv, gain, scale, keep)
        return o, None if tqkv is None else to


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute gelu(x W' + b), tanh form: (..., in) => (..., out); without gradient one kernel on a GPU."""
    tensors = {"x": x, "weight": weight, "bias": bias}
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    if differentiated or not _use_triton("x", x):
        return gelu(F.linear(x, weight, bias))
    return _operators.linear_gelu(*_autocast(tensors).values())


def _without_autocast(device: str) -> AbstractContextManager:
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _autocast(tensors: dict[str, MaybeTensor]) -> dict[str, MaybeTensor]:
    """Cast like autocast casts the operands of a product: all but float64 become the autocast type."""
    device = next(iter(tensors.values())).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return {
        name: x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for name, x in tensors.items()
    }


def _check(tensors: dict[str, MaybeTensor]) -> None:
    q, k = tensors["q"], tensors["k"]
    if all(tensors[name] is None for name in ("tq", "tk", "tv")):
        raise ValueError("tq, tk and tv are all None: give at least one tangent, or call attention()")
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} of shape {tuple(q.shape)}; it must be floating-point (B, H, N, D)")
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be (B, H, Nk, D)")
    _check_like("k", k, "q", q, shapes=False)
    for name, like in (("v", "k"), ("tq", "q"), ("tk", "k"), ("tv", "k")):
        if tensors[name] is not None:
            _check_like(name, tensors[name], like, tensors[like])


def _check_qkv(qkv: Tensor, tqkv: MaybeTensor, q_gain: MaybeTensor, k_gain: MaybeTensor) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not qkv.is_floating_point():
        raise ValueError(
            f"qkv is {qkv.dtype} of shape {tuple(qkv.shape)}; it must be floating-point (B, N, 3, H, D)"
        )
    if tqkv is not None:
        _check_like("tqkv", tqkv, "qkv", qkv)
    if (q_gain is None) != (k_gain is None):
        raise ValueError("q_gain and k_gain: give both, or None for both")
    for name, gain in (("q_gain", q_gain), ("k_gain", k_gain)):
        if gain is not None and gain.shape != qkv.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(gain.shape)}; it must be ({qkv.shape[-1]},)")


def _check_like(name: str, x: Tensor, like: str, y: Tensor, shapes: bool = True) -> None:
    if shapes and x.shape != y.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be that of {like}, {tuple(y.shape)}")
    if x.dtype != y.dtype:
        raise ValueError(f"{name} is {x.dtype}; it must be that of {like}, {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"{name} is on {x.device}; it must be on that of {like}, {y.device}")


def _use_triton(name: str, x: Tensor, head_dim: int = 1) -> bool:
    """Return True if the back end for x is Triton. Raises ValueError if it is, but cannot take x."""
    if _backend == "auto" and not (_operators is not None and x.is_cuda and x.dtype in _operators.DTYPES):
        return False
    if _backend == "reference":
        return False
    if x.dtype not in _operators.DTYPES:
        raise ValueError(f"{name} is {x.dtype}; the Triton kernels take bfloat16, float16 and float32")
    limit = _operators.MAX_HEAD_DIM
    if head_dim > limit:
        raise ValueError(f"{name} has head dimension {head_dim}; the Triton kernels take at most {limit}")
    if not (x.is_cuda or _operators.INTERPRETED):
        raise ValueError(
            f"{name} is on {x.device}; the Triton kernels take CUDA tensors (or TRITON_INTERPRET=1)"
        )
    return True


_operators = None
set_backend("auto")
reference.count_cpu_attention_flops()
