"""The Triton kernels as torch operators: allocation, launches, autograd, fake tensors, FLOP counts.

`terminal_velocity::jvp_attention` takes q, k, v and their tangents as separate tensors; `qkv_norm_attention`
takes all values in one tensor and all tangents, if any, in another, and norms queries and keys. Both save
inputs, outputs and two float32 numbers per row and head (lse, mu), the second what it normed, too: nothing
of size N x N. If no gradient arrives for the tangent of the output, the backward pass is that of plain
attention.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import configs, triton_attention
from kernels.reference import MaybeTensor, attention_flops, gelu, split_heads

MAX_HEAD_DIM = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton_attention.INTERPRETED.value


def _layout(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _aligned(x: Tensor, tx: MaybeTensor) -> tuple[Tensor, MaybeTensor]:
    """Return x and its tangent with equal strides and a contiguous last axis, copied only if necessary."""
    if x.stride(-1) == 1 and (tx is None or _layout(x) == _layout(tx)):
        return x, tx
    return x.contiguous(), None if tx is None else tx.contiguous()


def _empty(x: Tensor) -> Tensor:
    """Allocate a tensor like x, with its order of axes in memory and a contiguous last axis."""
    order = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(x, memory_format=order)


def _matrix(x: MaybeTensor) -> tuple[Tensor, int, int, int] | None:
    return None if x is None else (x, *x.stride()[:3])


def _matrices(*pairs: tuple[Tensor, MaybeTensor]) -> tuple:
    """Return what a kernel takes of pairs of a value and its tangent, in aligned memory."""
    aligned = [_aligned(*pair) for pair in pairs]
    return tuple(argument for x, tx in aligned for argument in (_matrix(x), tx))


def _config(q: Tensor) -> configs.Config:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    return configs.choose(capability, q.shape[-1], q.element_size())


def _launch(
    kernel: triton.JITFunction, tile: configs.Tile, blocks: int, q: Tensor, k: Tensor, matrices: tuple,
    lengths: MaybeTensor, scale: float, **flags: bool,
) -> None:  # fmt: skip
    """Run `kernel` on `blocks` blocks of every head of every batch element, all on grid axis 0.

    PRECISION concerns only float32: tf32x3 gives the accuracy of float32 by three tf32 products.
    """
    batch, heads, n_q, head_dim = q.shape
    n_k = k.shape[2]
    block_d, tail = configs.widths(head_dim)
    strides = [stride for x in matrices if isinstance(x, tuple) for stride in x[1:3]]
    with torch.cuda.device_of(q):
        kernel[(batch * heads * blocks,)](
            *matrices, lengths, scale, heads, n_q, n_k,
            D=head_dim, BLOCK_D=block_d, TAIL=tail, BLOCK_Q=tile.queries, BLOCK_K=tile.keys,
            MASKED=lengths is not None or n_q % tile.queries != 0 or n_k % tile.keys != 0,
            ALIGNED=all(stride % 8 == 0 for stride in strides),
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
            num_warps=tile.warps, num_stages=tile.stages, **flags,
        )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    lengths: MaybeTensor, o: Tensor, to: MaybeTensor, lse: Tensor, mu: MaybeTensor, scale: float,
    gain: MaybeTensor = None, normed: Sequence[MaybeTensor] = (None,) * 4,
) -> None:  # fmt: skip
    """Write o, lse and, where there is a tangent, to and mu; with a gain also `normed`, (q, tq, k, tk)."""
    config = _config(q)
    tile = config.forward if gain is None else config.normed or config.forward
    nq, ntq, nk, ntk = normed
    matrices = (*_matrices((q, tq), (k, tk), (v, tv)), _matrix(o), to, lse, mu)
    matrices += (_matrix(nq), ntq, _matrix(nk), ntk, gain)
    blocks = triton.cdiv(q.shape[2], tile.queries)
    _launch(triton_attention.forward, tile, blocks, q, k, matrices, lengths, scale)


def _backward(
    do: Tensor, dto: MaybeTensor,
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    lengths: MaybeTensor, o: Tensor, to: MaybeTensor, lse: Tensor, mu: MaybeTensor, scale: float,
    gradients: tuple[MaybeTensor, ...],
    gain: MaybeTensor = None, dgain: MaybeTensor = None, raw: Sequence[MaybeTensor] = (None,) * 4,
) -> None:  # fmt: skip
    """Write the gradients of q, k, v, tq, tk, tv into `gradients`, tangents' with values' strides.

    Without dto everything that concerns the tangent is None: the backward of plain attention. With a gain,
    q, k, tq, tk were normed from `raw`, (q, tq, k, tk), whose gradients take the place of theirs; dgain gets
    what each block of queries adds to the gradient of the gain.
    """
    dq, dk, dv, dtq, dtk, dtv = gradients
    x_q, tx_q, x_k, tx_k = raw
    inputs, outer = _matrices((q, tq), (k, tk), (v, tv)), _matrices((do, dto))
    statistics = (lse, mu, torch.empty_like(lse), None if dto is None else torch.empty_like(mu))
    config = _config(q)
    matrices = (*inputs, _matrix(o), to, *outer, *statistics, _matrix(dq), dtq)
    matrices += (_matrix(x_q), tx_q, gain, dgain)
    blocks = triton.cdiv(q.shape[2], config.rows.queries)
    _launch(triton_attention.backward_rows, config.rows, blocks, q, k, matrices, lengths, scale)
    matrices = (*inputs, *outer, *statistics, _matrix(dk), dtk, _matrix(dv), dtv, _matrix(x_k), tx_k)
    together = len(config.columns) == 1
    for part, tile in enumerate(config.columns):
        flags = {"KEYS": together or part == 0, "VALUES": together or part == 1}
        blocks = triton.cdiv(k.shape[2], tile.keys)
        _launch(triton_attention.backward_columns, tile, blocks, q, k, matrices, lengths, scale, **flags)


@torch.library.custom_op("terminal_velocity::jvp_attention", mutates_args=())
def jvp_attention(
    q: Tensor, k: Tensor, v: Tensor, tq: MaybeTensor, tk: MaybeTensor, tv: MaybeTensor,
    lengths: MaybeTensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute (o, to, lse, mu) of heads (B, H, N, D); a tangent of None is zero, lse is in base 2."""
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
    """Return the gradients of q, k, v and of those tangents that are not None, in this order."""
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
    qkv: Tensor, tqkv: MaybeTensor, gain: MaybeTensor, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute (o, to, lse, mu, qk, tqk) of projections (B, N, 3, H, D); o and to are (B, N, H, D).

    gain (D,) is the product of the gains of queries and keys, since scores depend on nothing else. qk and tqk
    hold the normed queries, times the gain, and with `keep` the normed keys, without it, for the backward
    pass: (B, N, 1 + keep, H, D). Missing outputs are empty tensors: to, mu and tqk without tqkv, qk and tqk
    without gain.
    """
    outputs = _packed_outputs(qkv, tqkv, gain, keep)
    o, to, lse, mu, qk, tqk = (x if x.numel() else None for x in outputs)
    qkv, tqkv = _aligned(qkv, tqkv)
    heads, normed = (*split_heads(qkv), *split_heads(tqkv)), (None,) * 4
    if gain is not None:
        (nq, nk), (ntq, ntk) = split_heads(qk, 1 + keep), split_heads(tqk, 1 + keep)
        normed = nq, ntq, nk, ntk
    to = None if to is None else to.transpose(1, 2)
    _forward(*heads, None, o.transpose(1, 2), to, lse, mu, scale, gain, normed)
    return outputs


@qkv_norm_attention.register_fake
def _(qkv, tqkv, gain, scale, keep):  # noqa: ANN001, ANN202
    return _packed_outputs(qkv, tqkv, gain, keep)


def _packed_outputs(qkv: Tensor, tqkv: MaybeTensor, gain: MaybeTensor, keep: bool) -> tuple[Tensor, ...]:
    batch, n, _, heads, head_dim = qkv.shape
    matrix, rows = (batch, n, heads, head_dim), (batch, heads, n)
    normed = (batch, n, 1 + keep, heads, head_dim)
    dual = tqkv is not None
    return (
        qkv.new_empty(matrix),
        qkv.new_empty(matrix if dual else 0),
        qkv.new_empty(rows, dtype=torch.float32),
        qkv.new_empty(rows if dual else 0, dtype=torch.float32),
        qkv.new_empty(0 if gain is None else normed),
        qkv.new_empty(0 if gain is None or not dual else normed),
    )


@torch.library.custom_op("terminal_velocity::qkv_norm_attention_backward", mutates_args=())
def qkv_norm_attention_backward(
    do: Tensor, dto: MaybeTensor, qkv: Tensor, tqkv: MaybeTensor, gain: MaybeTensor,
    o: Tensor, to: MaybeTensor, lse: Tensor, mu: MaybeTensor, qk: MaybeTensor, tqk: MaybeTensor, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of qkv and, if they are not None, of tqkv and gain.

    If dto is None, so must be tqkv, to, mu and tqk. The gradient of the gain is (blocks, D), to be summed.
    """
    gradients = _packed_gradients(qkv, tqkv, gain)
    dqkv, dtqkv, dgain = gradients
    qkv, tqkv = _aligned(qkv, tqkv)
    (q, k, v), (tq, tk, tv) = split_heads(qkv), split_heads(tqkv)
    raw = (None,) * 4
    if gain is not None:
        raw = q, tq, k, tk
        (q, k), (tq, tk) = split_heads(qk, 2), split_heads(tqk, 2)
    do, dto, o, to = (None if x is None else x.transpose(1, 2) for x in (do, dto, o, to))
    heads = (*split_heads(dqkv), *split_heads(dtqkv))
    _backward(do, dto, q, k, v, tq, tk, tv, None, o, to, lse, mu, scale, heads, gain, dgain, raw)
    return [x for x in gradients if x is not None]


@qkv_norm_attention_backward.register_fake
def _(do, dto, qkv, tqkv, gain, o, to, lse, mu, qk, tqk, scale):  # noqa: ANN001, ANN202
    return [x for x in _packed_gradients(qkv, tqkv, gain) if x is not None]


def _packed_gradients(
    qkv: Tensor, tqkv: MaybeTensor, gain: MaybeTensor
) -> tuple[Tensor, MaybeTensor, MaybeTensor]:
    batch, n, _, heads, head_dim = qkv.shape
    blocks = batch * heads * triton.cdiv(n, _config(qkv).rows.queries)
    return (
        qkv.new_empty(qkv.shape),
        None if tqkv is None else qkv.new_empty(qkv.shape),
        None if gain is None else gain.new_empty((blocks, head_dim)),
    )


@torch.library.custom_op("terminal_velocity::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute gelu(x W' + b), tanh form as in cuBLASLt's epilogue on a GPU; it has no gradient."""
    rows = x.flatten(0, -2)
    if x.is_cuda:
        y = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    else:
        y = gelu(F.linear(rows, weight, bias))
    return y.unflatten(0, x.shape[:-1])


@linear_gelu.register_fake
def _(x, weight, bias):  # noqa: ANN001, ANN202
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_flop_formula(torch.ops.terminal_velocity.linear_gelu)
def _(x, weight, *args, **kwargs) -> int:  # noqa: ANN001
    return 2 * prod(x) * weight[0]


def _save(ctx, inputs: tuple, output: tuple) -> None:  # noqa: ANN001
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # None instead of zeros tells that the tangent gets no gradient


def _differentiate(ctx, do: MaybeTensor, dto: MaybeTensor, *rows: None) -> tuple[MaybeTensor, ...]:  # noqa: ANN001
    # Read once, since checkpointing computes the saved tensors again at each access.
    q, k, v, tq, tk, tv, lengths, o, to, lse, mu = ctx.saved_tensors
    tangents = (tq, tk, tv)
    if dto is None:  # plain attention: nothing that belongs to the tangent matters
        to = mu = None
        tangents = (None, None, None)
    do = torch.zeros_like(dto) if do is None else do
    gradients = iter(jvp_attention_backward(do, dto, q, k, v, *tangents, lengths, o, to, lse, mu, ctx.scale))
    return *(None if x is None else next(gradients) for x in (q, k, v, *tangents)), None, None


def _differentiate_packed(ctx, do: MaybeTensor, dto: MaybeTensor, *rows: None) -> tuple[MaybeTensor, ...]:  # noqa: ANN001
    saved = ctx.saved_tensors
    qkv, tqkv, gain, o, _, lse, _, qk, _ = saved
    if dto is None or tqkv is None:  # plain attention: nothing that belongs to the tangent matters
        dto = tqkv = None
        saved = (qkv, None, gain, o, None, lse, None, qk, None)
    do = torch.zeros_like(dto) if do is None else do
    gradients = iter(qkv_norm_attention_backward(do, dto, *saved, ctx.scale))
    dqkv, dtqkv, dgain = (None if x is None else next(gradients) for x in (qkv, tqkv, gain))
    return dqkv, dtqkv, None if dgain is None else dgain.sum(0), None, None


def _refuse(ctx, *gradients: Tensor) -> None:  # noqa: ANN001
    raise NotImplementedError(
        "the fused attention has no second derivatives; kernels.set_backend('reference') has"
    )


jvp_attention.register_autograd(_differentiate, setup_context=_save)
qkv_norm_attention.register_autograd(
    _differentiate_packed,
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs[:-1], output),  # without `keep`
)
jvp_attention_backward.register_autograd(_refuse)
qkv_norm_attention_backward.register_autograd(_refuse)


# Only the products that the mathematics needs are counted, not those that the backward pass computes a second
# time, so every back end reports the same: 6 + 12 with all tangents, 2 + 4 with none.
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
