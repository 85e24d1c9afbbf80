"""Attention with an explicit tangent: fused Triton kernels on CUDA, plain PyTorch elsewhere.

    from kernels import attention, jvp_attention

B batch, H heads, N tokens, D head dimension. Every tensor is (B, H, N, D).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference

__all__ = ["attention", "jvp_attention", "set_backend"]

BACKENDS = ("auto", "reference", "triton")

_backend = "auto"
reference.count_cpu_attention_flops()


def set_backend(name: str) -> None:
    """Choose what computes `jvp_attention` from here on.

    "auto" (the default) is Triton for CUDA tensors and the PyTorch reference for all others; "reference" and
    "triton" force one. Triton takes CPU tensors only in its interpreter (TRITON_INTERPRET=1 from the start).
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    _backend = name


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(scale * q k') v by torch's fused attention; scale defaults to D ** -0.5."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def jvp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its tangent: (o, to), both shaped like q, differentiable once in all six inputs.

    q, tq are (B, H, Nq, D); k, v, tk, tv are (B, H, Nk, D); scale defaults to D ** -0.5. A tangent that is
    None is zero everywhere and costs nothing; at least one must be given. Under torch.autocast the inputs are
    cast as those of scaled_dot_product_attention are. Raises ValueError naming the argument that is wrong.
    """
    tensors = _autocast({"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv})
    _check(tensors)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with _without_autocast(q.device.type):
        return reference.jvp_attention(*tensors.values(), scale)


def _without_autocast(device: str) -> AbstractContextManager:
    available = torch.amp.is_autocast_available(device)  # it is not on meta tensors
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _autocast(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Cast as autocast does the operands of a product: all but float64 become the autocast type."""
    device = tensors["q"].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return {
        name: x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for name, x in tensors.items()
    }


def _check(tensors: dict[str, Tensor | None]) -> None:
    q, k = tensors["q"], tensors["k"]
    if all(tensors[name] is None for name in ("tq", "tk", "tv")):
        raise ValueError("tq, tk and tv are all None: give at least one tangent, or call attention()")
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} of shape {tuple(q.shape)}; it must be floating-point (B, H, N, D)")
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be (B, H, Nk, D)")
    for name, x in tensors.items():
        if x is None:
            continue
        like = "q" if name in ("q", "tq") else "k"
        if x.shape != tensors[like].shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be that of {like}, {tuple(tensors[like].shape)}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}; it must be that of q, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; it must be on that of q, {q.device}")
