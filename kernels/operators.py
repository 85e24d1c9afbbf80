"""The Triton kernels as torch operators: allocation, launches, autograd, fake tensors, FLOP counts.

`terminal_velocity::jvp_attention` takes q, k, v and their tangents apart; `qkv_norm_attention` takes them as
one buffer each, norms queries and keys, and does without a tangent too. Both save inputs, outputs and two
float32 numbers per row and head, lse and mu: nothing N x N, nothing normed. Where no gradient arrives for the
tangent of the output, the backward is that of plain attention.
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


def _launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: object, **constants: object) -> None:
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    with torch.cuda.device_of(first):
        kernel[grid](*args, **constants)


def _launch_attention(
    kernel: triton.JITFunction,
    tile: configs.Tile,
    blocks: int,
    matrices: tuple,
    sizes: tuple,
    lengths: MaybeTensor,
    scale: float,
    **flags: bool,
) -> None:
    """Run `kernel` on `blocks` blocks of every head of every batch element, all on grid axis 0.

    PRECISION concerns float32 alone: tf32x3 is float32's own accuracy from three tf32 products.
    """
    batch, heads, n_q, n_k, head_dim = sizes
    block_d, tail = configs.widths(head_dim)
    strides = [stride for x in matrices if isinstance(x, tuple) for stride in x[1:3]]
    _launch(
        kernel, (batch * heads * blocks,), *matrices, lengths, scale, heads, n_q, n_k,
        D=head_dim, BLOCK_D=block_d, TAIL=tail, BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
        MASKED=lengths is not None or n_q % tile.queries != 0 or n_k % tile.keys != 0,
        ALIGNED=all(stride % 8 == 0 for stride in strides),
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
        num_warps=tile.warps, num_stages=tile.stages, **flags,
    )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    lengths: MaybeTensor, o: Tensor, to: MaybeTensor, lse: Tensor, mu: MaybeTensor, scale: float,
) -> None:  # fmt: skip
    """Write o, lse and, where there is a tangent, to and mu."""
    (q, tq), (k, tk), (v, tv) = _aligned(q, tq), _aligned(k, tk), _aligned(v, tv)
    tile = _config(q).forward
    matrices = (_matrix(q), tq, _matrix(k), tk, _matrix(v), tv, _matrix(o), to, lse, mu)
    sizes = (*q.shape[:3], k.shape[2], q.shape[3])
    blocks = triton.cdiv(q.shape[2], tile.queries)
    _launch_attention(triton_attention.forward, tile, blocks, matrices, sizes, lengths, scale)


def _backward(
    do: Tensor, dto: MaybeTensor,
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    lengths: MaybeTensor, o: Tensor, to: MaybeTensor, lse: Tensor, mu: MaybeTensor, scale: float,
    gradients: tuple[MaybeTensor, ...],
) -> None:  # fmt: skip
    """Write the gradients of q, k, v, tq, tk, tv into `gradients`, tangents' with values' strides.

    Without dto everything that concerns the tangent is None: the backward of plain attention.
    """
    dq, dk, dv, dtq, dtk, dtv = gradients
    (q, tq), (k, tk), (v, tv) = _aligned(q, tq), _aligned(k, tk), _aligned(v, tv)
    do, dto = _aligned(do, dto)
    delta, a = torch.empty_like(lse), None if dto is None else torch.empty_like(mu)
    config = _config(q)
    inputs = (_matrix(q), tq, _matrix(k), tk, _matrix(v), tv)
    statistics = (lse, mu, delta, a)
    sizes = (*q.shape[:3], k.shape[2], q.shape[3])
    matrices = (*inputs, _matrix(o), to, _matrix(do), dto, *statistics, _matrix(dq), dtq)
    blocks = triton.cdiv(q.shape[2], config.rows.queries)
    _launch_attention(triton_attention.backward_rows, config.rows, blocks, matrices, sizes, lengths, scale)
    matrices = (*inputs, _matrix(do), dto, *statistics, _matrix(dk), dtk, _matrix(dv), dtv)
    together = len(config.columns) == 1
    for part, tile in enumerate(config.columns):
        flags = {"KEYS": together or part == 0, "VALUES": together or part == 1}
        blocks = triton.cdiv(k.shape[2], tile.keys)
        _launch_attention(
            triton_attention.backward_columns, tile, blocks, matrices, sizes, lengths, scale, **flags
        )


@torch.library.custom_op("terminal_velocity::jvp_attention", mutates_args=())
def jvp_attention(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    lengths: MaybeTensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, to, lse, mu) of heads (B, H, N, D), tangents None where zero; lse is in base 2."""
    outputs = _outputs(q)
    _forward(q, k, v, tq, tk, tv, lengths, *outputs, scale)
    return outputs


@jvp_attention.register_fake
def _(q, k, v, tq, tk, tv, lengths, scale):  # noqa: ANN001, ANN202
    return _outputs(q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, mu = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    return _empty(q), _empty(q), lse, mu


@torch.library.custom_op("terminal_velocity::jvp_attention_backward", mutates_args=())
def jvp_attention_backward(
    do: Tensor, dto: MaybeTensor,
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    lengths: MaybeTensor, o: Tensor, to: MaybeTensor, lse: Tensor, mu: MaybeTensor, scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v and of those tangents that are not None, in this order."""
    gradients = _gradients(q, k, v, tq, tk, tv)
    _backward(do, dto, q, k, v, tq, tk, tv, lengths, o, to, lse, mu, scale, gradients)
    return [x for x in gradients if x is not None]


@jvp_attention_backward.register_fake
def _(do, dto, q, k, v, tq, tk, tv, lengths, o, to, lse, mu, scale):  # noqa: ANN001, ANN202
    return [x for x in _gradients(q, k, v, tq, tk, tv) if x is not None]


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor
) -> tuple[MaybeTensor, ...]:
    tangents = ((q, tq), (k, tk), (v, tv))
    return _empty(q), _empty(k), _empty(v), *(None if tx is None else _empty(x) for x, tx in tangents)


@torch.library.custom_op("terminal_velocity::qkv_norm_attention", mutates_args=())
def qkv_norm_attention(
    qkv: Tensor, tqkv: MaybeTensor, gains: MaybeTensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, to, lse, mu), o and to (B, N, H, D), of projections (B, N, 3, H, D) and the norms' gains (2, D).

    Without tqkv, to and mu are empty.
    """
    outputs = _packed_outputs(qkv, tqkv)
    o, to, lse, mu = outputs
    to, mu = (None, None) if tqkv is None else (to.transpose(1, 2), mu)
    _forward(*_normed_heads(qkv, tqkv, gains), None, o.transpose(1, 2), to, lse, mu, scale)
    return outputs


@qkv_norm_attention.register_fake
def _(qkv, tqkv, gains, scale):  # noqa: ANN001, ANN202
    return _packed_outputs(qkv, tqkv)


def _packed_outputs(qkv: Tensor, tqkv: MaybeTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, _, heads, head_dim = qkv.shape
    matrix, rows = (batch, n, heads, head_dim), (batch, heads, n)
    return (
        qkv.new_empty(matrix),
        qkv.new_empty(0 if tqkv is None else matrix),
        qkv.new_empty(rows, dtype=torch.float32),
        qkv.new_empty(0 if tqkv is None else rows, dtype=torch.float32),
    )


@torch.library.custom_op("terminal_velocity::qkv_norm_attention_backward", mutates_args=())
def qkv_norm_attention_backward(
    do: Tensor, dto: MaybeTensor, qkv: Tensor, tqkv: MaybeTensor, gains: MaybeTensor,
    o: Tensor, to: MaybeTensor, lse: Tensor, mu: MaybeTensor, scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of qkv and of those of tqkv, gains that are not None; tqkv, to, mu are None as dto is.

    Each is written in place of its parts, first with respect to what is normed, then, in the same memory,
    with respect to what was given.
    """
    heads = _normed_heads(qkv, tqkv, gains)
    dqkv, dtqkv, dgains = _packed_gradients(qkv, tqkv, gains)
    do, dto, o, to = (None if x is None else x.transpose(1, 2) for x in (do, dto, o, to))
    gradients = (*split_heads(dqkv), *split_heads(dtqkv))
    _backward(do, dto, *heads, None, o, to, lse, mu, scale, gradients)
    if gains is not None:
        blocks = _norm_blocks(qkv)
        partial = qkv.new_empty((2, blocks, qkv.shape[-1]), dtype=torch.float32)
        qkv, tqkv = _contiguous(qkv), _contiguous(tqkv)
        _launch_norm(triton_attention.norm_backward, qkv, tqkv, gains, dqkv, dtqkv, partial)
        torch.sum(partial, 1, out=dgains)
    return [x for x in (dqkv, dtqkv, dgains) if x is not None]


@qkv_norm_attention_backward.register_fake
def _(do, dto, qkv, tqkv, gains, o, to, lse, mu, scale):  # noqa: ANN001, ANN202
    return [x for x in _packed_gradients(qkv, tqkv, gains) if x is not None]


def _packed_gradients(
    qkv: Tensor, tqkv: MaybeTensor, gains: MaybeTensor
) -> tuple[Tensor, MaybeTensor, MaybeTensor]:
    return (
        qkv.new_empty(qkv.shape),
        None if tqkv is None else qkv.new_empty(qkv.shape),
        None if gains is None else gains.new_empty(gains.shape),
    )


def split_heads(packed: MaybeTensor) -> tuple[MaybeTensor, ...]:
    """(B, N, 3, H, D) => three views (B, H, N, D); None => three times None."""
    return (None,) * 3 if packed is None else packed.permute(2, 0, 3, 1, 4).unbind()


def _normed_heads(qkv: Tensor, tqkv: MaybeTensor, gains: MaybeTensor) -> tuple[MaybeTensor, ...]:
    """What attention takes: q, k, v, tq, tk, tv, (B, H, N, D)."""
    (q, k, v), (tq, tk, tv) = split_heads(qkv), split_heads(tqkv)
    if gains is not None:
        qkv, tqkv = _contiguous(qkv), _contiguous(tqkv)
        qk, tqk = (None if x is None else x.new_empty(x[:, :, :2].shape) for x in (qkv, tqkv))
        _launch_norm(triton_attention.norm, qkv, tqkv, gains, qk, tqk)
        q, k = qk.permute(2, 0, 3, 1, 4).unbind()
        if tqk is not None:
            tq, tk = tqk.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v, tq, tk, tv


def _contiguous(x: MaybeTensor) -> MaybeTensor:
    return None if x is None else x.contiguous()


def _norm_blocks(qkv: Tensor) -> int:
    batch, n, _, heads, _ = qkv.shape
    return triton.cdiv(batch * n * heads, configs.NORM_ROWS)


def _launch_norm(kernel: triton.JITFunction, qkv: Tensor, *tensors: MaybeTensor) -> None:
    """Run `kernel` on the queries (grid axis 1 at 0) and the keys (at 1) of a packed projection."""
    batch, n, _, heads, head_dim = qkv.shape
    _launch(
        kernel, (_norm_blocks(qkv), 2), qkv, *tensors, batch * n * heads, heads,
        D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), ROWS=configs.NORM_ROWS,
    )  # fmt: skip


def _save(ctx, inputs: tuple, output: tuple) -> None:  # noqa: ANN001
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # None, not zeros, where nothing is differentiated through the tangent


def _differentiate(ctx, do: MaybeTensor, dto: MaybeTensor, *rows: None) -> tuple[MaybeTensor, ...]:  # noqa: ANN001
    q, k, v, *tangents, lengths, o, to, lse, mu = (
        ctx.saved_tensors
    )  # once: checkpointing computes them at each access
    if dto is None:
        *tangents, to, mu = (None,) * 5
    do = torch.zeros_like(dto) if do is None else do
    gradients = iter(jvp_attention_backward(do, dto, q, k, v, *tangents, lengths, o, to, lse, mu, ctx.scale))
    return *(None if x is None else next(gradients) for x in (q, k, v, *tangents)), None, None


def _differentiate_packed(ctx, do: MaybeTensor, dto: MaybeTensor, *rows: None) -> tuple[MaybeTensor, ...]:  # noqa: ANN001
    qkv, tqkv, gains, o, to, lse, mu = ctx.saved_tensors
    if dto is None or tqkv is None:
        dto = tqkv = to = mu = None
    do = torch.zeros_like(dto) if do is None else do
    gradients = iter(qkv_norm_attention_backward(do, dto, qkv, tqkv, gains, o, to, lse, mu, ctx.scale))
    return *(None if x is None else next(gradients) for x in (qkv, tqkv, gains)), None


def _refuse(ctx, *gradients: Tensor) -> None:  # noqa: ANN001
    raise NotImplementedError(
        "the fused attention has no second derivatives; kernels.set_backend('reference') has"
    )


jvp_attention.register_autograd(_differentiate, setup_context=_save)
qkv_norm_attention.register_autograd(_differentiate_packed, setup_context=_save)
jvp_attention_backward.register_autograd(_refuse)
qkv_norm_attention_backward.register_autograd(_refuse)


# The products that the mathematics needs are counted, not those that the backward computes a second time, so
# that every back end reports the same: 6 + 12 with all tangents, 2 + 4 with none.
@register_flop_formula(torch.ops.terminal_velocity.jvp_attention)
def _(q, k, v, tq, tk, tv, *args, **kwargs) -> int:  # noqa: ANN001
    return attention_flops(q, k, _products(tq, tk, tv))


@register_flop_formula(torch.ops.terminal_velocity.jvp_attention_backward)
def _(do, dto, q, k, v, tq, tk, tv, *args, **kwargs) -> int:  # noqa: ANN001
    return attention_flops(q, k, 2 * _products(tq, tk, tv))


@register_flop_formula(torch.ops.terminal_velocity.qkv_norm_attention)
def _(qkv, tqkv, *args, **kwargs) -> int:  # noqa: ANN001
    return _packed_flops(qkv, _products(tqkv, tqkv, tqkv))


@register_flop_formula(torch.ops.terminal_velocity.qkv_norm_attention_backward)
def _(do, dto, qkv, tqkv, *args, **kwargs) -> int:  # noqa: ANN001
    return _packed_flops(qkv, 2 * _products(tqkv, tqkv, tqkv))


def _products(tq: object, tk: object, tv: object) -> int:
    """Matrix products forward: QK' and PV; tQ K' and Q tK', and with either tP V; P tV."""
    scores = (tq is not None) + (tk is not None)
    return 2 + scores + (scores > 0) + (tv is not None)


def _packed_flops(qkv: tuple[int, ...], products: int) -> int:
    batch, n, _, heads, head_dim = qkv
    return attention_flops((batch, heads, n, head_dim), (batch, heads, n, head_dim), products)
