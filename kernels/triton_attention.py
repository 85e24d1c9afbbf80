# ruff: noqa: ANN001, ANN201, ANN202, SIM108
"""The Triton kernels of attention with a tangent: one forward, two backward (by rows and by columns).

With S = c QK', P = softmax(S), tS = c (tQ K' + Q tK'), mu = rowsum(P * tS), tP = P * (tS - mu), O = PV and
tO = tP V + P tV, and dO, dtO the gradients of the outputs, the backward is

    a = rowsum(dtO * O)        delta = rowsum(dO * O) + rowsum(dtO * tO)        G = dtO V'
    dtS = P * (G - a)          dS = P * (dO V' + dtO tV' - delta + (G - a) * (tS - mu))

A matrix argument is a tuple (tensor, stride of batch, of head, of token); its tangent, or the gradient of
that, follows as a bare tensor of the same strides, or None where it is zero. BLOCK_D is D padded to
a power of two. Everything is accumulated in float32; P, tP, dS and dtS are rounded to the inputs' type where
they become left operands of a product. lse is in base 2, which spares a multiplication per exponential.
"""

import os
from pathlib import Path

import triton
import triton.language as tl

from kernels.reference import EPS as NORM_EPS

# Triton 3.3 ships two assemblers and takes for Hopper the older, which puts a wait after each wgmma (C7515).
NEWER_PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
if triton.__version__.startswith("3.3.") and NEWER_PTXAS.exists():
    os.environ.setdefault("TRITON_PTXAS_PATH", str(NEWER_PTXAS))

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(NORM_EPS)


@triton.jit
def _head(matrix, index, heads):
    """Where head `index` of batch * heads begins, in elements, and the stride of its tokens."""
    start = (index // heads).to(tl.int64) * matrix[1] + (index % heads).to(tl.int64) * matrix[2]
    return start, matrix[3]


@triton.jit
def _tile(pointer, head, start, n, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (BLOCK_N, BLOCK_D) to the tokens from `start` and their mask; only scalars need 64 bits."""
    offset, stride = head
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    pointer += offset + tl.cast(start, tl.int64) * stride
    return pointer + (rows[:, None] * stride + columns[None, :]), (start + rows < n)[:, None] & (columns < D)[
        None, :
    ]


@triton.jit
def _load(pointer, head, start, n,
          D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    pointers, inside = _tile(pointer, head, start, n, D, BLOCK_N, BLOCK_D)
    if MASKED:
        x = tl.load(pointers, mask=inside, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _store(pointer, head, x, start, n,
           D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    pointers, inside = _tile(pointer, head, start, n, D, BLOCK_N, BLOCK_D)
    x = _round(x, pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointers, x, mask=inside)
    else:
        tl.store(pointers, x)


@triton.jit
def _load_statistic(pointer, index, start, n, outside, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    rows = tl.arange(0, BLOCK_N)
    pointers = pointer + (tl.cast(index, tl.int64) * n + start) + rows
    if MASKED:
        x = tl.load(pointers, mask=start + rows < n, other=outside)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _store_statistic(pointer, x, index, start, n, BLOCK_N: tl.constexpr):
    rows = start + tl.arange(0, BLOCK_N)
    tl.store(pointer + tl.cast(index, tl.int64) * n + rows, x, mask=rows < n)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """x to the nearest number of a narrower type (Triton's interpreter would cut bf16 off instead)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(x, y, accumulator, PRECISION: tl.constexpr):
    """accumulator + x y in float32 (Triton's interpreter returns garbage for bf16 operands)."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, accumulator, input_precision=PRECISION)


@triton.jit
def forward(q, tq, k, tk, v, tv, o, to, lse, mu, scale, heads, n_q, n_k,
            D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
            MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """o, to and the row statistics lse, mu (float32, (B * H, Nq)) of BLOCK_Q queries of one head; 6 products.

    Online softmax over blocks of keys. tP is formed around the running mean mu, not as P * tS - mu * P: the
    sum for to follows mu as it moves, and nothing cancels where mu is large, as in rows that one key rules.
    """
    blocks = tl.cdiv(n_q, BLOCK_Q)
    index = tl.program_id(0) // blocks
    start_q = (tl.program_id(0) % blocks) * BLOCK_Q
    head_q = _head(q, index, heads)
    head_k = _head(k, index, heads)
    head_v = _head(v, index, heads)
    q_tile = _load(q[0], head_q, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
    if tq is not None:
        tq_tile = _load(tq, head_q, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
    o_sum = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if to is not None:
        to_sum = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        row_mu = tl.zeros([BLOCK_Q], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    zero = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for start in range(0, n_k, BLOCK_K):
        k_tile = _load(k[0], head_k, start, n_k, D, BLOCK_K, BLOCK_D, MASKED)
        v_tile = _load(v[0], head_v, start, n_k, D, BLOCK_K, BLOCK_D, MASKED)
        s = _dot(q_tile, tl.trans(k_tile), zero, PRECISION) * (scale * LOG2E)
        if MASKED:
            s = tl.where((start + tl.arange(0, BLOCK_K) < n_k)[None, :], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shrink = tl.exp2(row_max - new_max)
        p = tl.exp2(s - new_max[:, None])
        row_max = new_max
        row_sum = row_sum * shrink + tl.sum(p, 1)
        o_sum *= shrink[:, None]
        if to is not None:
            to_sum *= shrink[:, None]
        if tq is not None or tk is not None:
            ts = zero
            if tq is not None:
                ts = _dot(tq_tile, tl.trans(k_tile), ts, PRECISION)
            if tk is not None:
                tk_tile = _load(tk, head_k, start, n_k, D, BLOCK_K, BLOCK_D, MASKED)
                ts = _dot(q_tile, tl.trans(tk_tile), ts, PRECISION)
            ts = ts * scale - row_mu[:, None]
            step = tl.sum(p * ts, 1) / row_sum
            row_mu += step
            tp = _round(p * (ts - step[:, None]), v_tile.dtype)
            to_sum = _dot(tp, v_tile, to_sum - step[:, None] * o_sum, PRECISION)
        p = _round(p, v_tile.dtype)
        o_sum = _dot(p, v_tile, o_sum, PRECISION)
        if tv is not None:
            tv_tile = _load(tv, head_v, start, n_k, D, BLOCK_K, BLOCK_D, MASKED)
            to_sum = _dot(p, tv_tile, to_sum, PRECISION)
    head_o = _head(o, index, heads)
    _store(o[0], head_o, o_sum / row_sum[:, None], start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
    _store_statistic(lse, row_max + tl.log2(row_sum), index, start_q, n_q, BLOCK_Q)
    if to is not None:
        _store(to, head_o, to_sum / row_sum[:, None], start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
        _store_statistic(mu, row_mu, index, start_q, n_q, BLOCK_Q)


@triton.jit
def backward_rows(q, tq, k, tk, v, tv, o, to, do, dto, lse, mu, delta, a, dq, dtq, scale, heads, n_q, n_k,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                  MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq, dtq of BLOCK_Q queries of one head, and the statistics delta, a for backward_columns; 9 products.

    dQ = c (dS K + dtS tK), dtQ = c dtS K.
    """
    blocks = tl.cdiv(n_q, BLOCK_Q)
    index = tl.program_id(0) // blocks
    start_q = (tl.program_id(0) % blocks) * BLOCK_Q
    head_o = _head(o, index, heads)
    head_do = _head(do, index, heads)
    do_tile = _load(do[0], head_do, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
    o_tile = _load(o[0], head_o, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED).to(tl.float32)
    delta_terms = do_tile.to(tl.float32) * o_tile
    if dto is not None:
        dto_tile = _load(dto, head_do, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
        to_tile = _load(to, head_o, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED).to(tl.float32)
        row_a = tl.sum(dto_tile.to(tl.float32) * o_tile, 1)
        delta_terms += dto_tile.to(tl.float32) * to_tile
        _store_statistic(a, row_a, index, start_q, n_q, BLOCK_Q)
        row_mu = _load_statistic(mu, index, start_q, n_q, 0.0, BLOCK_Q, MASKED)
    row_delta = tl.sum(delta_terms, 1)
    _store_statistic(delta, row_delta, index, start_q, n_q, BLOCK_Q)
    row_lse = _load_statistic(lse, index, start_q, n_q, float("inf"), BLOCK_Q, MASKED)
    head_q = _head(q, index, heads)
    head_k = _head(k, index, heads)
    head_v = _head(v, index, heads)
    q_tile = _load(q[0], head_q, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
    if tq is not None:
        tq_tile = _load(tq, head_q, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
    dq_sum = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    dtq_sum = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    zero = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for start in range(0, n_k, BLOCK_K):
        k_tile = _load(k[0], head_k, start, n_k, D, BLOCK_K, BLOCK_D, MASKED)
        v_tile = _load(v[0], head_v, start, n_k, D, BLOCK_K, BLOCK_D, MASKED)
        s = _dot(q_tile, tl.trans(k_tile), zero, PRECISION)
        p = tl.exp2(s * (scale * LOG2E) - row_lse[:, None])
        if MASKED:
            p = tl.where((start + tl.arange(0, BLOCK_K) < n_k)[None, :], p, 0.0)
        ds = zero
        if tq is not None or tk is not None:
            ts = zero
            if tq is not None:
                ts = _dot(tq_tile, tl.trans(k_tile), ts, PRECISION)
            if tk is not None:
                tk_tile = _load(tk, head_k, start, n_k, D, BLOCK_K, BLOCK_D, MASKED)
                ts = _dot(q_tile, tl.trans(tk_tile), ts, PRECISION)
            g = _dot(dto_tile, tl.trans(v_tile), zero, PRECISION) - row_a[:, None]
            ds = g * (ts * scale - row_mu[:, None])
            dts = _round(p * g, k_tile.dtype)
            if tq is not None:
                dtq_sum = _dot(dts, k_tile, dtq_sum, PRECISION)
            if tk is not None:
                dq_sum = _dot(dts, tk_tile, dq_sum, PRECISION)
        ds = _dot(do_tile, tl.trans(v_tile), ds, PRECISION)
        if tv is not None:
            tv_tile = _load(tv, head_v, start, n_k, D, BLOCK_K, BLOCK_D, MASKED)
            ds = _dot(dto_tile, tl.trans(tv_tile), ds, PRECISION)
        ds = p * (ds - row_delta[:, None])
        dq_sum = _dot(_round(ds, k_tile.dtype), k_tile, dq_sum, PRECISION)
    head_dq = _head(dq, index, heads)
    _store(dq[0], head_dq, dq_sum * scale, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
    if tq is not None:
        _store(dtq, head_dq, dtq_sum * scale, start_q, n_q, D, BLOCK_Q, BLOCK_D, MASKED)


@triton.jit
def backward_columns(q, tq, k, tk, v, tv, do, dto, lse, mu, delta, a, dk, dtk, dv, dtv,
                     scale, heads, n_q, n_k,
                     D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                     MASKED: tl.constexpr, PRECISION: tl.constexpr,
                     KEYS: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """dk, dtk (if KEYS) and dv, dtv (if VALUES) of BLOCK_K keys of one head; 12 products, or 9 and 6 apart.

    dK = c (dS'Q + dtS'tQ), dtK = c dtS'Q, dV = P'dO + tP'dtO, dtV = P'dtO. Scores are formed transposed, so
    that P' and its like are left operands without a detour through shared memory.
    """
    blocks = tl.cdiv(n_k, BLOCK_K)
    index = tl.program_id(0) // blocks
    start_k = (tl.program_id(0) % blocks) * BLOCK_K
    head_q = _head(q, index, heads)
    head_k = _head(k, index, heads)
    head_v = _head(v, index, heads)
    head_do = _head(do, index, heads)
    k_tile = _load(k[0], head_k, start_k, n_k, D, BLOCK_K, BLOCK_D, MASKED)
    if tk is not None:
        tk_tile = _load(tk, head_k, start_k, n_k, D, BLOCK_K, BLOCK_D, MASKED)
    if KEYS:
        v_tile = _load(v[0], head_v, start_k, n_k, D, BLOCK_K, BLOCK_D, MASKED)
        if tv is not None:
            tv_tile = _load(tv, head_v, start_k, n_k, D, BLOCK_K, BLOCK_D, MASKED)
    dk_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dtk_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dtv_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    zero = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for start in range(0, n_q, BLOCK_Q):
        q_tile = _load(q[0], head_q, start, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
        do_tile = _load(do[0], head_do, start, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
        if dto is not None:
            dto_tile = _load(dto, head_do, start, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
        row_lse = _load_statistic(lse, index, start, n_q, float("inf"), BLOCK_Q, MASKED)
        p = tl.exp2(_dot(k_tile, tl.trans(q_tile), zero, PRECISION) * (scale * LOG2E) - row_lse[None, :])
        if VALUES:
            p_rounded = _round(p, do_tile.dtype)
            dv_sum = _dot(p_rounded, do_tile, dv_sum, PRECISION)
            if tv is not None:
                dtv_sum = _dot(p_rounded, dto_tile, dtv_sum, PRECISION)
        if tq is not None or tk is not None:
            ts = zero
            if tq is not None:
                tq_tile = _load(tq, head_q, start, n_q, D, BLOCK_Q, BLOCK_D, MASKED)
                ts = _dot(k_tile, tl.trans(tq_tile), ts, PRECISION)
            if tk is not None:
                ts = _dot(tk_tile, tl.trans(q_tile), ts, PRECISION)
            ts = ts * scale - _load_statistic(mu, index, start, n_q, 0.0, BLOCK_Q, MASKED)[None, :]
            if VALUES:
                dv_sum = _dot(_round(p * ts, dto_tile.dtype), dto_tile, dv_sum, PRECISION)
        if KEYS:
            ds = zero
            if tq is not None or tk is not None:
                row_a = _load_statistic(a, index, start, n_q, 0.0, BLOCK_Q, MASKED)
                g = _dot(v_tile, tl.trans(dto_tile), zero, PRECISION) - row_a[None, :]
                ds = g * ts
                dts = _round(p * g, q_tile.dtype)
                if tk is not None:
                    dtk_sum = _dot(dts, q_tile, dtk_sum, PRECISION)
                if tq is not None:
                    dk_sum = _dot(dts, tq_tile, dk_sum, PRECISION)
            ds = _dot(v_tile, tl.trans(do_tile), ds, PRECISION)
            if tv is not None:
                ds = _dot(tv_tile, tl.trans(dto_tile), ds, PRECISION)
            row_delta = _load_statistic(delta, index, start, n_q, 0.0, BLOCK_Q, MASKED)
            ds = p * (ds - row_delta[None, :])
            dk_sum = _dot(_round(ds, q_tile.dtype), q_tile, dk_sum, PRECISION)
    if KEYS:
        head_dk = _head(dk, index, heads)
        _store(dk[0], head_dk, dk_sum * scale, start_k, n_k, D, BLOCK_K, BLOCK_D, MASKED)
        if tk is not None:
            _store(dtk, head_dk, dtk_sum * scale, start_k, n_k, D, BLOCK_K, BLOCK_D, MASKED)
    if VALUES:
        head_dv = _head(dv, index, heads)
        _store(dv[0], head_dv, dv_sum, start_k, n_k, D, BLOCK_K, BLOCK_D, MASKED)
        if tv is not None:
            _store(dtv, head_dv, dtv_sum, start_k, n_k, D, BLOCK_K, BLOCK_D, MASKED)


@triton.jit
def _norm_tile(parts, rows, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Offsets (ROWS, BLOCK_D) into a contiguous (B * N, parts, H, D), axis 1 of the grid being the part."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    start = (((row // heads).to(tl.int64) * parts + tl.program_id(1)) * heads + row % heads) * D
    return start[:, None] + columns[None, :], (row < rows)[:, None] & (columns < D)[None, :]


@triton.jit
def _mean(x, D: tl.constexpr):
    return tl.sum(x, 1)[:, None] * (1 / D)


@triton.jit
def _load_gain(gains, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    gain = tl.load(gains + tl.program_id(1) * D + columns, mask=columns < D, other=0.0)
    return gain.to(tl.float32)[None, :]


@triton.jit
def norm(qkv, tqkv, gains, qk, tqk, rows, heads,
         D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """RMS norm of ROWS rows (token and head) of queries or keys, and its tangent.

    With r = 1 / sqrt(mean(x^2) + eps): y = r x, ty = r (tx - y mean(y tx)), both times a gain.
    """
    source, inside = _norm_tile(3, rows, heads, D, BLOCK_D, ROWS)
    target, inside = _norm_tile(2, rows, heads, D, BLOCK_D, ROWS)
    gain = _load_gain(gains, D, BLOCK_D)
    x = tl.load(qkv + source, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(_mean(x * x, D) + EPS)
    y = x * r
    tl.store(qk + target, _round(y * gain, qk.dtype.element_ty), mask=inside)
    if tqkv is not None:
        tx = tl.load(tqkv + source, mask=inside, other=0.0).to(tl.float32)
        ty = (tx - y * _mean(y * tx, D)) * r
        tl.store(tqk + target, _round(ty * gain, tqk.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(qkv, tqkv, gains, dqkv, dtqkv, dgains, rows, heads,
                  D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Turn the gradients of `norm`'s outputs into those of its inputs where they lie; sums for the gains.

    With dy, dty the gradients times the gain, m = mean(y tx), u = dy - r (m dty + mean(y dty) tx):

        dx = r (u - y (mean(y u) + mean(ty dty)))    dtx = r (dty - y mean(y dty))

    dgains is (2, blocks, D) in float32: what each block of rows adds to the gradient of the gain.
    """
    offsets, inside = _norm_tile(3, rows, heads, D, BLOCK_D, ROWS)
    gain = _load_gain(gains, D, BLOCK_D)
    x = tl.load(qkv + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dqkv + offsets, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(_mean(x * x, D) + EPS)
    y = x * r
    dgain = tl.sum(dy * y, 0)
    u = dy * gain
    bend = tl.zeros([ROWS, 1], tl.float32)
    if tqkv is not None:
        tx = tl.load(tqkv + offsets, mask=inside, other=0.0).to(tl.float32)
        dty = tl.load(dtqkv + offsets, mask=inside, other=0.0).to(tl.float32)
        m = _mean(y * tx, D)
        ty = (tx - y * m) * r
        dgain += tl.sum(dty * ty, 0)
        dty *= gain
        slope = _mean(y * dty, D)
        bend = _mean(ty * dty, D)
        u -= r * (m * dty + slope * tx)
        tl.store(dtqkv + offsets, _round(r * (dty - y * slope), dtqkv.dtype.element_ty), mask=inside)
    dx = r * (u - y * (_mean(y * u, D) + bend))
    tl.store(dqkv + offsets, _round(dx, dqkv.dtype.element_ty), mask=inside)
    columns = tl.arange(0, BLOCK_D)
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dgains + block * D + columns, dgain, mask=columns < D)
