# ruff: noqa: ANN001, ANN201, ANN202
"""The Triton kernels of attention with a tangent: one forward, two backward (by rows and by columns).

With S = c QK', P = softmax(S), tS = c (tQ K' + Q tK'), mu = rowsum(P * tS), tP = P * (tS - mu), O = PV and
tO = tP V + P tV, and dO, dtO the gradients of the outputs, the backward is

    a = rowsum(dtO * O)        delta = rowsum(dO * O) + rowsum(dtO * tO)        G = dtO V'
    dtS = P * (G - a)          dS = P * (dO V' + dtO tV' - delta + (G - a) * (tS - mu))

A matrix argument is a tuple (tensor, stride of batch, of head, of token); its tangent, or the gradient of
that, follows as a bare tensor of the same strides, or None where it is zero; without dto all of them are,
which leaves plain attention. A tile is a tuple: its first BLOCK_D columns and, unless TAIL is 0, TAIL more,
so that D = 72 costs what 80 does. Arguments in capitals are known when a kernel is compiled. Everything is
accumulated in float32; P, tP, dS and dtS are rounded to the inputs' type where they become left operands of
a product. lse is in base 2, which spares a multiplication per exponential. `lengths` (int32, one per
batch element) is the number of valid keys; the others are not read.
"""

import os
from pathlib import Path

import triton
import triton.language as tl

from kernels.reference import EPS as NORM_EPS

# Triton 3.3 ships two assemblers and uses the older for Hopper, which adds a wait to each wgmma (C7515).
NEWER_PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
if triton.__version__.startswith("3.3.") and NEWER_PTXAS.exists():
    os.environ.setdefault("TRITON_PTXAS_PATH", str(NEWER_PTXAS))

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(NORM_EPS)
NORM_ROWS = tl.constexpr(16)  # rows of queries or keys that are normed at a time


@triton.jit
def _block(n, BLOCK):
    """Return which head of batch * heads this program works on, and its first token of n."""
    blocks = tl.cdiv(n, BLOCK)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK


@triton.jit
def _head(matrix, tangent, index, heads, ALIGNED):
    """Return (pointer, stride of tokens) of one head and of its tangent; without one, the value's twice.

    ALIGNED: strides of heads are multiples of 8 elements, which a head dimension of 72 would hide.
    """
    start = (index // heads).to(tl.int64) * matrix[1] + (index % heads).to(tl.int64) * matrix[2]
    if ALIGNED:
        start = tl.multiple_of(start, 8)
    if tangent is None:
        tangent = matrix[0]
    return (matrix[0] + start, matrix[3]), (tangent + start, matrix[3])


@triton.jit
def _count(lengths, index, heads, n):
    """Return how many of n keys are valid: all, or the number in `lengths`."""
    if lengths is not None:
        n = tl.load(lengths + index // heads)
    return n


@triton.jit
def _part(head, start, n, FIRST, D, BLOCK_N, WIDTH, MASKED):
    """Return pointers (BLOCK_N, WIDTH) to the columns from FIRST of the tokens from `start`, and a mask."""
    rows = tl.arange(0, BLOCK_N)
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = head[0] + tl.cast(start, tl.int64) * head[1] + (rows[:, None] * head[1] + columns[None, :])
    inside = (columns < D)[None, :]
    if MASKED and FIRST + WIDTH > D:
        inside = inside & (start + rows < n)[:, None]
    elif MASKED:
        inside = (start + rows < n)[:, None]
    return pointers, inside


@triton.jit
def _load_part(head, start, n, FIRST, D, BLOCK_N, WIDTH, MASKED):
    pointers, inside = _part(head, start, n, FIRST, D, BLOCK_N, WIDTH, MASKED)
    partial: tl.constexpr = MASKED or FIRST + WIDTH > D
    return tl.load(pointers, mask=inside, other=0.0) if partial else tl.load(pointers)


@triton.jit
def _store_part(head, x, start, n, FIRST, D, BLOCK_N, WIDTH, MASKED):
    pointers, inside = _part(head, start, n, FIRST, D, BLOCK_N, WIDTH, MASKED)
    x = _round(x, head[0].dtype.element_ty)
    if MASKED or FIRST + WIDTH > D:
        tl.store(pointers, x, mask=inside)
    else:
        tl.store(pointers, x)


@triton.jit
def _load(head, start, n, D, BLOCK_N, BLOCK_D, TAIL, MASKED):
    """Load BLOCK_N tokens from `start` as a tuple: BLOCK_D columns and, unless it is 0, TAIL more."""
    x = _load_part(head, start, n, 0, D, BLOCK_N, BLOCK_D, MASKED)
    return (x, _load_part(head, start, n, BLOCK_D, D, BLOCK_N, TAIL, MASKED)) if TAIL > 0 else (x,)


@triton.jit
def _store(head, x, factor, start, n, D, BLOCK_N, BLOCK_D, TAIL, MASKED):
    """Store x times a factor, which is one number or one per token."""
    _store_part(head, x[0] * factor, start, n, 0, D, BLOCK_N, BLOCK_D, MASKED)
    if TAIL > 0:
        _store_part(head, x[1] * factor, start, n, BLOCK_D, D, BLOCK_N, TAIL, MASKED)


@triton.jit
def _store_both(
    matrix, tangent, x, tx, factor, index, heads, start, n, D, BLOCK_N, BLOCK_D, TAIL, MASKED, ALIGNED
):
    """Store x and, where it has one, its tangent tx, times a factor; return where they are, as `_head`."""
    head, thead = _head(matrix, tangent, index, heads, ALIGNED)
    _store(head, x, factor, start, n, D, BLOCK_N, BLOCK_D, TAIL, MASKED)
    if tangent is not None:
        _store(thead, tx, factor, start, n, D, BLOCK_N, BLOCK_D, TAIL, MASKED)
    return head, thead


@triton.jit
def _zeros(BLOCK_N, BLOCK_D, TAIL):
    x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    return (x, tl.zeros([BLOCK_N, TAIL], tl.float32)) if TAIL > 0 else (x,)


@triton.jit
def _scale(x, factor):
    """Multiply each row of x by its factor."""
    y = x[0] * factor[:, None]
    return (y, x[1] * factor[:, None]) if len(x) == 2 else (y,)


@triton.jit
def _subtract(x, factor, y):
    """Compute x - factor * y with a factor per row."""
    z = x[0] - factor[:, None] * y[0]
    return (z, x[1] - factor[:, None] * y[1]) if len(x) == 2 else (z,)


@triton.jit
def _weigh(x, weights):
    """Multiply each column of x by its weight; without weights return x."""
    if weights is not None:
        y = x[0] * weights[0][None, :]
        x = (y, x[1] * weights[1][None, :]) if len(x) == 2 else (y,)
    return x


@triton.jit
def _row_products(x, y):
    """Compute rowsum(x * y) in float32."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    if len(x) == 2:
        total += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
    return total


@triton.jit
def _scores(x, y, accumulator, PRECISION):
    """Compute accumulator + x y', where None is zero."""
    if x is not None and y is not None:
        accumulator = _dot(x[0], tl.trans(y[0]), accumulator, PRECISION)
        if len(x) == 2:
            accumulator = _dot(x[1], tl.trans(y[1]), accumulator, PRECISION)
    return accumulator


@triton.jit
def _mix(p, y, accumulator, PRECISION):
    """Compute accumulator + p y with p rounded to the type of y, where None is zero."""
    if y is not None:
        p = _round(p, y[0].dtype)
        z = _dot(p, y[0], accumulator[0], PRECISION)
        accumulator = (z, _dot(p, y[1], accumulator[1], PRECISION)) if len(y) == 2 else (z,)
    return accumulator


@triton.jit
def _load_statistic(pointer, index, start, n, outside, BLOCK_N, MASKED):
    rows = tl.arange(0, BLOCK_N)
    pointers = pointer + (tl.cast(index, tl.int64) * n + start) + rows
    return tl.load(pointers, mask=start + rows < n, other=outside) if MASKED else tl.load(pointers)


@triton.jit
def _store_statistic(pointer, x, index, start, n, BLOCK_N):
    rows = start + tl.arange(0, BLOCK_N)
    tl.store(pointer + tl.cast(index, tl.int64) * n + rows, x, mask=rows < n)


@triton.jit
def _load_gain(gain, D, BLOCK_D, TAIL):
    """Load the gain of each column; None without one."""
    x = None
    if gain is not None:
        columns = tl.arange(0, BLOCK_D)
        x = (tl.load(gain + columns, mask=columns < D, other=0.0),)
        if TAIL > 0:
            columns = BLOCK_D + tl.arange(0, TAIL)
            x = (x[0], tl.load(gain + columns, mask=columns < D, other=0.0))
    return x


@triton.jit
def _store_gain(gain, x, D, BLOCK_D, TAIL):
    columns = tl.arange(0, BLOCK_D)
    tl.store(gain + columns, x[0], mask=columns < D)
    if TAIL > 0:
        columns = BLOCK_D + tl.arange(0, TAIL)
        tl.store(gain + columns, x[1], mask=columns < D)


@triton.jit
def _add_column_products(total, x, y):
    """Compute total + colsum(x * y)."""
    z = total[0] + tl.sum(x[0] * y[0], 0)
    return (z, total[1] + tl.sum(x[1] * y[1], 0)) if len(x) == 2 else (z,)


@triton.jit
def _statistics(x, tx, D):
    """Compute (r, bend) of each row: its RMS norm is y = r x, with the tangent ty = r (tx - bend x).

    Without tx, bend has no meaning.
    """
    if tx is None:
        tx = x
    r = tl.rsqrt(_row_products(x, x) * (1 / D) + EPS)
    return r, r * r * (_row_products(x, tx) * (1 / D))


@triton.jit
def _norm(
    matrix, tangent, normed, tnormed, gain, index, heads, start, n, D, BLOCK_N, BLOCK_D, TAIL, MASKED, ALIGNED
):
    """Store the RMS norm of BLOCK_N rows, times the gain of its columns, and its tangent, if there is one."""
    head, thead = _head(matrix, tangent, index, heads, ALIGNED)
    y_head, ty_head = _head(normed, tnormed, index, heads, ALIGNED)
    weights = _load_gain(gain, D, BLOCK_D, TAIL)
    for first in range(start, start + BLOCK_N, NORM_ROWS):
        x = _load(head, first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)
        tx = None if tangent is None else _load(thead, first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)
        r, bend = _statistics(x, tx, D)
        _store(y_head, _weigh(x, weights), r[:, None], first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)
        if tangent is not None:
            ty = _weigh(_subtract(tx, bend, x), weights)
            _store(ty_head, ty, r[:, None], first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)


@triton.jit
def _norm_backward(
    matrix, tangent, dhead, dthead, gain, index, heads, start, n, D, BLOCK_N, BLOCK_D, TAIL, MASKED, ALIGNED
):
    """Replace the gradients of what `_norm` stored by those of its inputs; return the gradient of the gain.

    With dy, dty the gradients times the gain and u = dy - bend dty - r mean(y dty) tx:

        dx = r (u - y (mean(y u) + mean(ty dty)))    dtx = r (dty - y mean(y dty))

    This runs after the sums over scores are stored: registers hold both only at D = 64, and barely.
    """
    head, thead = _head(matrix, tangent, index, heads, ALIGNED)
    weights = _load_gain(gain, D, BLOCK_D, TAIL)
    tl.debug_barrier()
    total = tl.zeros([BLOCK_D], tl.float32)
    total = (total, tl.zeros([TAIL], tl.float32)) if TAIL > 0 else (total,)
    for first in range(start, start + BLOCK_N, NORM_ROWS):
        x = _load(head, first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)
        tx = None if tangent is None else _load(thead, first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)
        r, bend = _statistics(x, tx, D)
        y = _scale(x, r)
        dy = _load(dhead, first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)
        total = _add_column_products(total, y, dy)
        u = _weigh(dy, weights)
        turn = 0 * r
        if tangent is not None:
            ty = _scale(_subtract(tx, bend, x), r)
            dty = _load(dthead, first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)
            total = _add_column_products(total, ty, dty)
            dty = _weigh(dty, weights)
            slope = _row_products(y, dty) * (1 / D)
            turn = _row_products(ty, dty) * (1 / D)
            dtx = _subtract(dty, slope, y)
            _store(dthead, dtx, r[:, None], first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)
            u = _subtract(_subtract(u, bend, dty), r * slope, tx)
        dx = _subtract(u, _row_products(y, u) * (1 / D) + turn, y)
        _store(dhead, dx, r[:, None], first, n, D, NORM_ROWS, BLOCK_D, TAIL, MASKED)
    return total


@triton.jit
def _round(x, dtype):
    """Round x to the nearest number of a narrower type (Triton's interpreter would truncate to bf16)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(x, y, accumulator, PRECISION):
    """Compute accumulator + x y in float32 (Triton's interpreter returns garbage for bf16 operands)."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, accumulator, input_precision=PRECISION)


@triton.jit
def forward(q, tq, k, tk, v, tv, o, to, lse, mu, nq, ntq, nk, ntk, gain, lengths, scale, heads, n_q, n_k,
            D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr,
            BLOCK_K: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Store o, to and the row statistics lse, mu (float32, (B * H, Nq)) of BLOCK_Q queries; 6 products.

    This is online softmax over blocks of keys. tP is formed around the running mean mu, not as P * tS - mu P,
    so that nothing cancels if mu is large, as in rows with one dominant key; the sum for to follows mu.
    """
    index, start_q = _block(n_q, BLOCK_Q)
    n_k = _count(lengths, index, heads, n_k)
    q_head, tq_head = _head(q, tq, index, heads, ALIGNED)
    k_head, tk_head = _head(k, tk, index, heads, ALIGNED)
    v_head, tv_head = _head(v, tv, index, heads, ALIGNED)
    if gain is not None:
        if nk is not None:
            _norm(k, tk, nk, ntk, None, index, heads, start_q, n_k,
                  D, BLOCK_Q, BLOCK_D, TAIL, MASKED, ALIGNED)  # fmt: skip
        _norm(q, tq, nq, ntq, gain, index, heads, start_q, n_q,
              D, BLOCK_Q, BLOCK_D, TAIL, MASKED, ALIGNED)  # fmt: skip
        tl.debug_barrier()
        q_head, tq_head = _head(nq, ntq, index, heads, ALIGNED)
    q_tile = _load(q_head, start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
    tq_tile = None if tq is None else _load(tq_head, start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
    o_sum = _zeros(BLOCK_Q, BLOCK_D, TAIL)
    if to is not None:
        to_sum = _zeros(BLOCK_Q, BLOCK_D, TAIL)
        row_mu = tl.zeros([BLOCK_Q], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    zero = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for start in range(0, n_k, BLOCK_K):
        k_tile = _load(k_head, start, n_k, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
        v_tile = _load(v_head, start, n_k, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
        tk_tile = None if tk is None else _load(tk_head, start, n_k, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
        products = _scores(q_tile, k_tile, zero, PRECISION)
        if gain is not None:
            r, bend = _statistics(k_tile, tk_tile, D)
            products *= r[None, :]
        s = products * (scale * LOG2E)
        if MASKED:
            s = tl.where((start + tl.arange(0, BLOCK_K) < n_k)[None, :], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shrink = tl.exp2(row_max - new_max)
        p = tl.exp2(s - new_max[:, None])
        row_max = new_max
        row_sum = row_sum * shrink + tl.sum(p, 1)
        o_sum = _scale(o_sum, shrink)
        if to is not None:
            to_sum = _scale(to_sum, shrink)
        if tq is not None or tk is not None:
            ts = _scores(tq_tile, k_tile, zero, PRECISION)
            ts = _scores(q_tile, tk_tile, ts, PRECISION)
            if gain is not None:
                ts = ts * r[None, :] - products * bend[None, :]
            ts = ts * scale - row_mu[:, None]
            step = tl.sum(p * ts, 1) / row_sum
            row_mu += step
            tp = p * (ts - step[:, None])
            to_sum = _mix(tp, v_tile, _subtract(to_sum, step, o_sum), PRECISION)
        o_sum = _mix(p, v_tile, o_sum, PRECISION)
        if tv is not None:
            tv_tile = _load(tv_head, start, n_k, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
            to_sum = _mix(p, tv_tile, to_sum, PRECISION)
    o_head, to_head = _head(o, to, index, heads, ALIGNED)
    _store(o_head, o_sum, 1 / row_sum[:, None], start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
    _store_statistic(lse, row_max + tl.log2(row_sum), index, start_q, n_q, BLOCK_Q)
    if to is not None:
        _store(to_head, to_sum, 1 / row_sum[:, None], start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
        _store_statistic(mu, row_mu, index, start_q, n_q, BLOCK_Q)


@triton.jit
def backward_rows(q, tq, k, tk, v, tv, o, to, do, dto, lse, mu, delta, a, dq, dtq, x, tx, gain, dgain,
                  lengths, scale, heads, n_q, n_k,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr,
                  BLOCK_K: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Store dq, dtq of BLOCK_Q queries, and the statistics delta, a for backward_columns; 9 products.

    dQ = c (dS K + dtS tK), dtQ = c dtS K.
    """
    index, start_q = _block(n_q, BLOCK_Q)
    n_k = _count(lengths, index, heads, n_k)
    o_head, to_head = _head(o, to, index, heads, ALIGNED)
    do_head, dto_head = _head(do, dto, index, heads, ALIGNED)
    do_tile = _load(do_head, start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
    o_tile = _load(o_head, start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
    row_delta = _row_products(do_tile, o_tile)
    if dto is not None:
        dto_tile = _load(dto_head, start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
        to_tile = _load(to_head, start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
        row_a = _row_products(dto_tile, o_tile)
        row_delta += _row_products(dto_tile, to_tile)
        _store_statistic(a, row_a, index, start_q, n_q, BLOCK_Q)
        row_mu = _load_statistic(mu, index, start_q, n_q, 0.0, BLOCK_Q, MASKED)
    _store_statistic(delta, row_delta, index, start_q, n_q, BLOCK_Q)
    row_lse = _load_statistic(lse, index, start_q, n_q, float("inf"), BLOCK_Q, MASKED)
    q_head, tq_head = _head(q, tq, index, heads, ALIGNED)
    k_head, tk_head = _head(k, tk, index, heads, ALIGNED)
    v_head, tv_head = _head(v, tv, index, heads, ALIGNED)
    q_tile = _load(q_head, start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
    tq_tile = None if tq is None else _load(tq_head, start_q, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
    dq_sum = _zeros(BLOCK_Q, BLOCK_D, TAIL)
    dtq_sum = _zeros(BLOCK_Q, BLOCK_D, TAIL)
    zero = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for start in range(0, n_k, BLOCK_K):
        k_tile = _load(k_head, start, n_k, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
        v_tile = _load(v_head, start, n_k, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
        s = _scores(q_tile, k_tile, zero, PRECISION)
        p = tl.exp2(s * (scale * LOG2E) - row_lse[:, None])
        if MASKED:
            p = tl.where((start + tl.arange(0, BLOCK_K) < n_k)[None, :], p, 0.0)
        ds = zero
        if tq is not None or tk is not None:
            ts = _scores(tq_tile, k_tile, zero, PRECISION)
            tk_tile = None if tk is None else _load(tk_head, start, n_k, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
            ts = _scores(q_tile, tk_tile, ts, PRECISION)
            g = _scores(dto_tile, v_tile, zero, PRECISION) - row_a[:, None]
            ds = g * (ts * scale - row_mu[:, None])
            dts = p * g
            if tq is not None:
                dtq_sum = _mix(dts, k_tile, dtq_sum, PRECISION)
            dq_sum = _mix(dts, tk_tile, dq_sum, PRECISION)
        ds = _scores(do_tile, v_tile, ds, PRECISION)
        if tv is not None:
            tv_tile = _load(tv_head, start, n_k, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
            ds = _scores(dto_tile, tv_tile, ds, PRECISION)
        ds = p * (ds - row_delta[:, None])
        dq_sum = _mix(ds, k_tile, dq_sum, PRECISION)
    dq_head, dtq_head = _store_both(dq, dtq, dq_sum, dtq_sum, scale, index, heads, start_q, n_q,
                                    D, BLOCK_Q, BLOCK_D, TAIL, MASKED, ALIGNED)  # fmt: skip
    if gain is not None:
        total = _norm_backward(x, tx, dq_head, dtq_head, gain, index, heads, start_q, n_q,
                               D, BLOCK_Q, BLOCK_D, TAIL, MASKED, ALIGNED)  # fmt: skip
        _store_gain(dgain + tl.program_id(0) * D, total, D, BLOCK_D, TAIL)


@triton.jit
def backward_columns(q, tq, k, tk, v, tv, do, dto, lse, mu, delta, a, dk, dtk, dv, dtv, x, tx,
                     lengths, scale, heads, n_q, n_k,
                     D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr,
                     BLOCK_K: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
                     PRECISION: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Store dk, dtk (if KEYS) and dv, dtv (if VALUES) of BLOCK_K keys; 12 products, or 9 and 6 apart.

    dK = c (dS'Q + dtS'tQ), dtK = c dtS'Q, dV = P'dO + tP'dtO, dtV = P'dtO. Scores are formed transposed, so
    that P' and the like become left operands without a detour through shared memory.
    """
    index, start_k = _block(n_k, BLOCK_K)
    n_seen = _count(lengths, index, heads, n_k)
    q_head, tq_head = _head(q, tq, index, heads, ALIGNED)
    k_head, tk_head = _head(k, tk, index, heads, ALIGNED)
    v_head, tv_head = _head(v, tv, index, heads, ALIGNED)
    do_head, dto_head = _head(do, dto, index, heads, ALIGNED)
    k_tile = _load(k_head, start_k, n_seen, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
    tk_tile = None if tk is None else _load(tk_head, start_k, n_seen, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
    if KEYS:
        v_tile = _load(v_head, start_k, n_seen, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
        tv_tile = None if tv is None else _load(tv_head, start_k, n_seen, D, BLOCK_K, BLOCK_D, TAIL, MASKED)
    dk_sum, dtk_sum = _zeros(BLOCK_K, BLOCK_D, TAIL), _zeros(BLOCK_K, BLOCK_D, TAIL)
    dv_sum, dtv_sum = _zeros(BLOCK_K, BLOCK_D, TAIL), _zeros(BLOCK_K, BLOCK_D, TAIL)
    zero = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for start in range(0, n_q, BLOCK_Q):
        q_tile = _load(q_head, start, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
        do_tile = _load(do_head, start, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
        dto_tile = None if dto is None else _load(dto_head, start, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
        row_lse = _load_statistic(lse, index, start, n_q, float("inf"), BLOCK_Q, MASKED)
        p = tl.exp2(_scores(k_tile, q_tile, zero, PRECISION) * (scale * LOG2E) - row_lse[None, :])
        if lengths is not None:
            p = tl.where((start_k + tl.arange(0, BLOCK_K) < n_seen)[:, None], p, 0.0)
        if VALUES:
            dv_sum = _mix(p, do_tile, dv_sum, PRECISION)
            if tv is not None:
                dtv_sum = _mix(p, dto_tile, dtv_sum, PRECISION)
        if tq is not None or tk is not None:
            tq_tile = None if tq is None else _load(tq_head, start, n_q, D, BLOCK_Q, BLOCK_D, TAIL, MASKED)
            ts = _scores(k_tile, tq_tile, zero, PRECISION)
            ts = _scores(tk_tile, q_tile, ts, PRECISION)
            ts = ts * scale - _load_statistic(mu, index, start, n_q, 0.0, BLOCK_Q, MASKED)[None, :]
            if VALUES:
                dv_sum = _mix(p * ts, dto_tile, dv_sum, PRECISION)
        if KEYS:
            ds = zero
            if tq is not None or tk is not None:
                row_a = _load_statistic(a, index, start, n_q, 0.0, BLOCK_Q, MASKED)
                g = _scores(v_tile, dto_tile, zero, PRECISION) - row_a[None, :]
                ds = g * ts
                dts = p * g
                if tk is not None:
                    dtk_sum = _mix(dts, q_tile, dtk_sum, PRECISION)
                dk_sum = _mix(dts, tq_tile, dk_sum, PRECISION)
            ds = _scores(v_tile, do_tile, ds, PRECISION)
            ds = _scores(tv_tile, dto_tile, ds, PRECISION)
            row_delta = _load_statistic(delta, index, start, n_q, 0.0, BLOCK_Q, MASKED)
            ds = p * (ds - row_delta[None, :])
            dk_sum = _mix(ds, q_tile, dk_sum, PRECISION)
    if VALUES:
        _store_both(dv, dtv, dv_sum, dtv_sum, 1.0, index, heads, start_k, n_k,
                    D, BLOCK_K, BLOCK_D, TAIL, MASKED, ALIGNED)  # fmt: skip
    if KEYS:
        dk_head, dtk_head = _store_both(dk, dtk, dk_sum, dtk_sum, scale, index, heads, start_k, n_k,
                                        D, BLOCK_K, BLOCK_D, TAIL, MASKED, ALIGNED)  # fmt: skip
        if x is not None:
            _norm_backward(x, tx, dk_head, dtk_head, None, index, heads, start_k, n_k,
                           D, BLOCK_K, BLOCK_D, TAIL, MASKED, ALIGNED)  # fmt: skip
