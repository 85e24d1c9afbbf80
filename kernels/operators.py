"""The Triton kernels as torch operators: allocation, launches, autograd, fake tensors, FLOP counts.

`terminal_velocity::jvp_attention` takes q, k, v and their tangents apart, `jvp_attention_qkv` as one buffer
each. Both save inputs, outputs and two float32 numbers per row and head, lse and mu: nothing N x N.
"""

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import configs, triton_attention
from kernels.reference import attention_flops

MAX_HEAD_DIM = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton_attention.INTERPRETED.value

MaybeTensor = Tensor | None


def _layout(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _aligned(x: Tensor, tx: MaybeTensor) -> tuple[Tensor, MaybeTensor]:
    """x and its tangent with equal strides and a contiguous last dimension; copied only if need be."""
    if x.stride(-1) == 1 and (tx is None or _layout(x) == _layout(tx)):
        return x, tx
    return x.contiguous(), None if tx is None else tx.contiguous()


def _empty(x: Tensor) -> Tensor:
    """Uninitialised, in the order of x in memory, with a contiguous last dimension."""
    order = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(x, memory_format=order)


def _matrix(x: Tensor) -> tuple[Tensor, int, int, int]:
    return x, *x.stride()[:3]


def _config(q: Tensor) -> configs.Config:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    return configs.choose(capability, q.shape[-1], q.element_size())


def _launch(
    kernel: triton.JITFunction,
    tile: configs.Tile,
    blocks: int,
    matrices: tuple,
    sizes: tuple,
    scale: float,
    **flags: bool,
) -> None:
    """Run `kernel` on `blocks` blocks of every head of every batch element, all on grid axis 0.

    PRECISION concerns float32 alone: tf32x3 is float32's own accuracy from three tf32 products.
    """
    batch, heads, n_q, n_k, head_dim = sizes
    padded = configs.padded_head_dim(head_dim)
    with torch.cuda.device_of(matrices[0][0]):
        kernel[(batch * heads * blocks,)](
            *matrices, scale, heads, n_q, n_k,
            D=head_dim, BLOCK_D=padded, BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
            MASKED=n_q % tile.queries != 0 or n_k % tile.keys != 0 or head_dim != padded,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
            num_warps=tile.warps, num_stages=tile.stages, **flags,
        )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, to, lse, mu = _forward_outputs(q)
    (q, tq), (k, tk), (v, tv) = _aligned(q, tq), _aligned(k, tk), _aligned(v, tv)
    tile = _config(q).forward
    matrices = (_matrix(q), tq, _matrix(k), tk, _matrix(v), tv, _matrix(o), to, lse, mu)
    sizes = (*q.shape[:3], k.shape[2], q.shape[3])
    _launch(triton_attention.forward, tile, triton.cdiv(q.shape[2], tile.queries), matrices, sizes, scale)
    return o, to, lse, mu


def _forward_outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, mu = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    return _empty(q), _empty(q), lse, mu


def _backward(
    do: Tensor, dto: Tensor,
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    o: Tensor, to: Tensor, lse: Tensor, mu: Tensor, scale: float, gradients: tuple[MaybeTensor, ...],
) -> None:  # fmt: skip
    """Write the gradients of q, k, v, tq, tk, tv into `gradients`, tangents' with values' strides."""
    dq, dk, dv, dtq, dtk, dtv = gradients
    (q, tq), (k, tk), (v, tv) = _aligned(q, tq), _aligned(k, tk), _aligned(v, tv)
    do, dto = _aligned(do, dto)
    delta, a = torch.empty_like(lse), torch.empty_like(mu)
    config = _config(q)
    inputs = (_matrix(q), tq, _matrix(k), tk, _matrix(v), tv)
    statistics = (lse, mu, delta, a)
    sizes = (*q.shape[:3], k.shape[2], q.shape[3])
    matrices = (*inputs, _matrix(o), to, _matrix(do), dto, *statistics, _matrix(dq), dtq)
    blocks = triton.cdiv(q.shape[2], config.rows.queries)
    _launch(triton_attention.backward_rows, config.rows, blocks, matrices, sizes, scale)
    matrices = (*inputs, _matrix(do), dto, *statistics, _matrix(dk), dtk, _matrix(dv), dtv)
    together = len(config.columns) == 1
    for part, tile in enumerate(config.columns):
        flags = {"KEYS": together or part == 0, "VALUES": together or part == 1}
        blocks = triton.cdiv(k.shape[2], tile.keys)
        _launch(triton_attention.backward_columns, tile, blocks, matrices, sizes, scale, **flags)


@torch.library.custom_op("terminal_velocity::jvp_attention", mutates_args=())
def jvp_attention(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, to, lse, mu) of heads (B, H, N, D), tangents None where zero; lse is in base 2."""
    return _forward(q, k, v, tq, tk, tv, scale)


@jvp_attention.register_fake
def _(q, k, v, tq, tk, tv, scale):  # noqa: ANN001, ANN202
    return _forward_outputs(q)


@torch.library.custom_op("terminal_velocity::jvp_attention_backward", mutates_args=())
def jvp_attention_backward(
    do: Tensor, dto: Tensor,
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    o: Tensor, to: Tensor, lse: Tensor, mu: Tensor, scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v and of those tangents that are not None, in this order."""
    gradients = _gradients(q, k, v, tq, tk, tv)
    _backward(do, dto, q, k, v, tq, tk, tv, o, to, lse, mu, scale, gradients)
    return [x for x in gradients if x is not None]


@jvp_attention_backward.register_fake
def _(do, dto, q, k, v, tq, tk, tv, o, to, lse, mu, scale):  # noqa: ANN001, ANN202
    return [x for x in _gradients(q, k, v, tq, tk, tv) if x is not None]


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor
) -> tuple[MaybeTensor, ...]:
    tangents = ((q, tq), (k, tk), (v, tv))
    return _empty(q), _empty(k), _empty(v), *(None if tx is None else _empty(x) for x, tx in tangents)


@torch.library.custom_op("terminal_velocity::jvp_attention_qkv", mutates_args=())
def jvp_attention_qkv(qkv: Tensor, tqkv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, to, lse, mu), o and to (B, H, N, D), of the projections' outputs qkv and tqkv, (B, N, 3, H, D)."""
    return _forward(*split_qkv(qkv), *split_qkv(tqkv), scale)


@jvp_attention_qkv.register_fake
def _(qkv, tqkv, scale):  # noqa: ANN001, ANN202
    return _forward_outputs(split_qkv(qkv)[0])


@torch.library.custom_op("terminal_velocity::jvp_attention_qkv_backward", mutates_args=())
def jvp_attention_qkv_backward(
    do: Tensor,
    dto: Tensor,
    qkv: Tensor,
    tqkv: Tensor,
    o: Tensor,
    to: Tensor,
    lse: Tensor,
    mu: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and tqkv, each written in place of its parts."""
    dqkv, dtqkv = _empty(qkv), _empty(qkv)
    gradients = (*split_qkv(dqkv), *split_qkv(dtqkv))
    _backward(do, dto, *split_qkv(qkv), *split_qkv(tqkv), o, to, lse, mu, scale, gradients)
    return dqkv, dtqkv


@jvp_attention_qkv_backward.register_fake
def _(do, dto, qkv, tqkv, o, to, lse, mu, scale):  # noqa: ANN001, ANN202
    return _empty(qkv), _empty(qkv)


def split_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3, H, D) => three views (B, H, N, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _save(ctx, inputs: tuple, output: tuple) -> None:  # noqa: ANN001
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, do: Tensor, dto: Tensor, *statistics: None) -> tuple[MaybeTensor, ...]:  # noqa: ANN001
    saved = ctx.saved_tensors  # once: checkpointing computes them anew at every access
    gradients = iter(jvp_attention_backward(do, dto, *saved, ctx.scale))
    return *(None if x is None else next(gradients) for x in saved[:6]), None


def _differentiate_qkv(ctx, do: Tensor, dto: Tensor, *statistics: None) -> tuple[MaybeTensor, ...]:  # noqa: ANN001
    return *jvp_attention_qkv_backward(do, dto, *ctx.saved_tensors, ctx.scale), None


def _refuse(ctx, *gradients: Tensor) -> None:  # noqa: ANN001
    raise NotImplementedError(
        "the fused jvp_attention has no second derivatives; kernels.set_backend('reference') has"
    )


jvp_attention.register_autograd(_differentiate, setup_context=_save)
jvp_attention_qkv.register_autograd(_differentiate_qkv, setup_context=_save)
jvp_attention_backward.register_autograd(_refuse)
jvp_attention_qkv_backward.register_autograd(_refuse)


# The products that the mathematics needs are counted, not those that the backward computes a second time, so
# that every back end reports the same: 6 + 12 with all tangents.
@register_flop_formula(torch.ops.terminal_velocity.jvp_attention)
def _(q, k, v, tq, tk, tv, *args, **kwargs) -> int:  # noqa: ANN001
    return attention_flops(q, k, _products(tq, tk, tv))


@register_flop_formula(torch.ops.terminal_velocity.jvp_attention_backward)
def _(do, dto, q, k, v, tq, tk, tv, *args, **kwargs) -> int:  # noqa: ANN001
    return attention_flops(q, k, 2 * _products(tq, tk, tv))


def _products(tq: object, tk: object, tv: object) -> int:
    """Matrix products forward: QK' and PV; tQ K' and Q tK', and with either tP V; P tV."""
    scores = (tq is not None) + (tk is not None)
    return 2 + scores + (scores > 0) + (tv is not None)


@register_flop_formula(torch.ops.terminal_velocity.jvp_attention_qkv)
def _(qkv, *args, **kwargs) -> int:  # noqa: ANN001
    return _qkv_flops(qkv, 6)


@register_flop_formula(torch.ops.terminal_velocity.jvp_attention_qkv_backward)
def _(do, dto, qkv, *args, **kwargs) -> int:  # noqa: ANN001
    return _qkv_flops(qkv, 12)


def _qkv_flops(qkv: tuple[int, ...], products: int) -> int:
    batch, n, _, heads, head_dim = qkv
    return attention_flops((batch, heads, n, head_dim), (batch, heads, n, head_dim), products)
