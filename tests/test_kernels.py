"""Attention with a tangent against float64 autograd of plain softmax attention, on every back end.

On a GPU the Triton kernels run compiled (marker gpu). Elsewhere they run in Triton's interpreter, which must
be chosen before anything imports triton: `test_in_the_interpreter` runs this file in a process of its own.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels
from tests.conftest import OFFICIAL

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # 3.3 replaces its language at every call, never back
        interpreter._patch_lang = functools.cache(interpreter._patch_lang)

fused_here = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")
gpu_here = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")
REFERENCE = pytest.param(("reference", "cpu"), id="reference")
FUSED = [
    pytest.param(("triton", "cpu"), id="interpreter", marks=fused_here),
    pytest.param(("triton", "cuda"), id="gpu", marks=[pytest.mark.gpu, gpu_here]),
]
every_backend = pytest.mark.parametrize("device", [REFERENCE, *FUSED], indirect=True)
every_fused = pytest.mark.parametrize("device", FUSED, indirect=True)

TOLERANCE = 1e-5  # float32 against float64
NAMES = ("o", "to", "dq", "dk", "dv", "dtq", "dtk", "dtv")


@pytest.fixture
def device(request):
    backend, name = request.param
    kernels.set_backend(backend)
    yield name
    kernels.set_backend("auto")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run in this process")
def test_in_the_interpreter():
    """Everything that is parametrised with the fused kernels, in Triton's interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", __file__, "-k", "interpreter", "-x", "-p", "no:cacheprovider"]
    command.append("--noconftest")  # what that imports takes a core ten seconds, and no test here needs it
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def inputs(n_q, n_k, head_dim, device, dtype=torch.float32, batch=1, heads=1, seed=0):
    """q, k, v, tq, tk, tv: views (B, H, N, D) of token-major tensors, as a projection gives them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (n_q, n_k, n_k) * 2
    tensors = [torch.randn(batch, n, heads, head_dim, generator=generator) for n in sizes]
    return [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in tensors]


def plain_attention(q, k, v, scale):
    return torch.softmax(scale * (q @ k.mT), dim=-1) @ v


def exact(tensors, gradients, scale):
    """Outputs and gradients by torch's own forward mode and autograd, in float64; a None tangent is zeros."""
    values = [x.detach().double().requires_grad_() for x in tensors[:3]]
    tangents = [
        (torch.zeros_like(x) if tx is None else tx.detach().double()).requires_grad_()
        for x, tx in zip(values, tensors[3:], strict=True)
    ]
    outputs = torch.func.jvp(lambda *x: plain_attention(*x, scale), tuple(values), tuple(tangents))
    wanted = [x for x, given in zip(values + tangents, tensors, strict=True) if given is not None]
    return [*outputs, *torch.autograd.grad(outputs, wanted, [g.double() for g in gradients])]


def measured(tensors, gradients):
    outputs = kernels.jvp_attention(*tensors)
    given = [x for x in tensors if x is not None]
    return [*outputs, *torch.autograd.grad(outputs, given, gradients)]


def output_gradients(q, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(q.shape, generator=generator).to(q) for _ in range(2)]


def errors(actual, expected):
    """Relative L2 errors; where the exact value is (almost) zero, relative to entries of 0.1."""
    return [
        ((x.double() - y).norm() / torch.maximum(y.norm(), torch.full_like(y, 0.1).norm())).item()
        for x, y in zip(actual, expected, strict=True)
    ]


def assert_close(tensors, tolerance):
    gradients = output_gradients(tensors[0])
    expected = exact(tensors, gradients, tensors[0].shape[-1] ** -0.5)
    actual = measured(tensors, gradients)
    worst = max(errors(actual, expected))
    assert worst < tolerance, dict(zip(NAMES, errors(actual, expected), strict=False))


@every_backend
@pytest.mark.parametrize(
    ("n_q", "n_k", "head_dim"),
    [
        (1, 1, 32),
        (17, 17, 32),
        (63, 63, 64),
        (17, 63, 72),
        (65, 17, 64),
        (1, 65, 32),
        (33, 40, 16),
        (20, 20, 128),
    ],
)
def test_outputs_and_gradients(device, n_q, n_k, head_dim):
    assert_close(inputs(n_q, n_k, head_dim, device), TOLERANCE)


def test_reference_in_float64():
    assert_close(inputs(17, 9, 16, "cpu", torch.float64), 1e-14)


@pytest.mark.gpu
@gpu_here
@pytest.mark.parametrize("head_dim", [32, 64, 72, 96, 128])
@pytest.mark.parametrize(("n_q", "n_k"), [(257, 257), (1024, 1024), (63, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_sizes_on_gpu(n_q, n_k, head_dim, dtype):
    kernels.set_backend("auto")
    assert_close(
        inputs(n_q, n_k, head_dim, "cuda", dtype, batch=2, heads=3), 1e-2 if dtype is torch.bfloat16 else 2e-3
    )


@every_backend
def test_large_logits(device):
    """Logits in the thousands, of both signs: neither overflow nor NaN, and the maximum alone decides."""
    tensors = inputs(17, 70, 32, device)
    with torch.no_grad():
        tensors[0] *= 300.0
        tensors[1] -= 2 * tensors[0][:, :, :1].sign()
    assert_close([x.detach().requires_grad_() for x in tensors], 5e-3)


@every_backend
def test_rows_that_one_key_dominates(device):
    """P is 1 at one key and tS there is large: tP must come out as the small difference it is."""
    tensors = inputs(40, 70, 32, device)
    with torch.no_grad():
        tensors[0].copy_(tensors[0].sign() * 4)
        tensors[1][:, :, :40].copy_(tensors[0])
        tensors[3] *= 20.0
    assert_close([x.detach().requires_grad_() for x in tensors], 1e-3)


@every_fused
def test_mean_of_score_tangents_cancels(device):
    """A constant added to every tS of a row changes nothing, in bf16 as little as in exact arithmetic."""
    tensors = inputs(32, 64, 32, device, torch.bfloat16)
    with torch.no_grad():
        tensors[1][..., 0] = 1.0
        tensors[3][..., 0] = 256.0  # adds 256 * scale to every tS
    expected = exact(tensors, output_gradients(tensors[0]), 32**-0.5)[1]
    assert errors([kernels.jvp_attention(*tensors)[1]], [expected])[0] < 2e-2


@every_backend
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_missing_tangents(device, missing):
    tensors = inputs(17, 33, 32, device)
    for index in missing:
        tensors[3 + index] = None
    assert_close(tensors, TOLERANCE)


def with_lengths(device, garbage, extra=0):
    """Attention with 1, some and all of its keys, no tangent on them; what they hold beyond is `garbage`."""
    n_k, lengths = 40, torch.tensor([1, 17, 40])
    q, k, v, tq, *_ = (x.detach() for x in inputs(17, n_k, 32, device, batch=3, heads=2))
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, extra)) for x in (k, v))
    unseen = (torch.arange(n_k + extra) >= lengths[:, None])[:, None, :, None].to(device)
    k, v = k.masked_fill(unseen, garbage), v.masked_fill(unseen, garbage)
    tensors = [x.requires_grad_() for x in (q, k, v, tq)]
    gradients = output_gradients(q)
    outputs = kernels.jvp_attention(*tensors, None, None, lengths=lengths.to(device))
    return tensors, gradients, lengths, [*outputs, *torch.autograd.grad(outputs, tensors, gradients)]


@every_backend
def test_keys_beyond_the_length_are_never_seen(device):
    tensors, gradients, lengths, found = with_lengths(device, 0.0)
    for i, length in enumerate(lengths.tolist()):
        q, k, v, tq = (x[i : i + 1] for x in tensors)
        one = [q, k[:, :, :length], v[:, :, :length], tq, None, None]
        expected = exact(one, [g[i : i + 1] for g in gradients], 32**-0.5)
        parts = [x[i : i + 1] for x in found]
        beyond = [x[:, :, length:] for x in parts[3:5]]
        assert not any(x.any() for x in beyond)
        parts[3:5] = (x[:, :, :length] for x in parts[3:5])
        assert max(errors(parts, expected)) < TOLERANCE
    for garbage, extra in ((1e4, 0), (7.0, 23)):
        again = with_lengths(device, garbage, extra)[-1]
        again[3:5] = (x[:, :, :40] for x in again[3:5])
        # more keys: torch 2.11's products sum them in another order
        if extra and kernels._backend == "reference" and not OFFICIAL:
            assert max(errors(again, [x.double() for x in found])) < 1e-6
        else:
            assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True)), (garbage, extra)


def test_lengths_of_plain_attention():
    q, k, v, *_ = inputs(5, 9, 16, "cpu", torch.float64, batch=2)
    lengths = torch.tensor([3, 9])
    o = kernels.attention(q, k, v, lengths=lengths)
    for i, length in enumerate(lengths):
        expected = plain_attention(q[i], k[i, :, :length], v[i, :, :length], 16**-0.5)
        torch.testing.assert_close(o[i], expected, rtol=1e-12, atol=1e-12)


@every_backend
def test_zero_tangents_equal_missing_ones(device):
    tensors = inputs(17, 33, 32, device)
    zeros = [*tensors[:3], *(torch.zeros_like(x) for x in tensors[3:])]
    o, to = kernels.jvp_attention(*zeros)
    assert errors([o], [plain_attention(*(x.double() for x in tensors[:3]), 32**-0.5)])[0] < 1e-6
    assert torch.equal(to, torch.zeros_like(to))


@every_backend
def test_any_strides(device):
    """Tangents laid out otherwise than values, a strided last dimension, keys shared by heads (stride 0)."""
    q, k, v, tq, tk, tv = inputs(17, 33, 32, device, batch=2, heads=3)
    tq = tq.detach().contiguous().requires_grad_()
    v = v.detach().mT.contiguous().mT.requires_grad_()
    k = k.detach()[:, :1].expand(-1, 3, -1, -1).requires_grad_()
    assert_close([q, k, v, tq, tk, tv], TOLERANCE)


@every_backend
def test_expanded_output_gradients(device):
    tensors = inputs(17, 33, 32, device)
    ones = [torch.ones_like(tensors[0]) for _ in range(2)]
    outputs = kernels.jvp_attention(*tensors)
    actual = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), tensors)
    assert max(errors(actual, exact(tensors, ones, 32**-0.5)[2:])) < TOLERANCE


def rounded_formulas(q, k, v, tq, tk, tv, do, dto, scale):
    """The kernels' formulas in PyTorch at their precision: operands in q's type, the rest in float32."""

    def product(x, y):
        return x.to(q.dtype).float() @ y.to(q.dtype).float()

    p = torch.softmax(scale * product(q, k.mT), -1)
    ts = scale * (product(tq, k.mT) + product(q, tk.mT))
    ts = ts - (p * ts).sum(-1, keepdim=True)
    o, to = product(p, v).to(q.dtype), (product(p * ts, v) + product(p, tv)).to(q.dtype)
    a = (dto.float() * o.float()).sum(-1, keepdim=True)
    delta = (do.float() * o.float() + dto.float() * to.float()).sum(-1, keepdim=True)
    g = product(dto, v.mT) - a
    dts = p * g
    ds = p * (product(do, v.mT) + product(dto, tv.mT) - delta + g * ts)
    dq, dk = product(ds, k) + product(dts, tk), product(ds.mT, q) + product(dts.mT, tq)
    dv, dtv = product(p.mT, do) + product((p * ts).mT, dto), product(p.mT, dto)
    gradients = (scale * dq, scale * dk, dv, scale * product(dts, k), scale * product(dts.mT, q), dtv)
    return [o, to, *(x.to(q.dtype) for x in gradients)]


@every_fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_q", "n_k", "head_dim"), [(63, 65, 64), (40, 33, 72)])
def test_half_precision_error(device, dtype, n_q, n_k, head_dim):
    """At most 1.5 times the error of the same formulas in PyTorch at the same precision."""
    tensors = inputs(n_q, n_k, head_dim, device, dtype)
    gradients = output_gradients(tensors[0])
    scale = head_dim**-0.5
    expected = exact(tensors, gradients, scale)
    with torch.no_grad():
        allowed = errors(rounded_formulas(*tensors, *gradients, scale), expected)
    actual = errors(measured(tensors, gradients), expected)
    ratios = {name: x / y for name, x, y in zip(NAMES, actual, allowed, strict=True)}
    assert max(ratios.values()) < 1.5, ratios


@every_fused
def test_every_element_is_written(device, monkeypatch):
    """Memory from torch.empty may hold anything: here it holds NaN."""

    def poisoned(empty):
        return lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    for head_dim in (64, 72):
        tensors = inputs(17, 33, head_dim, device)
        assert all(x.isfinite().all() for x in measured(tensors, output_gradients(tensors[0])))
        tensors, gradients = projections(17, head_dim, device)
        assert all(x.isfinite().all() for x in measured_projection(tensors, gradients))


@every_fused
def test_results_repeat_to_the_bit(device):
    tensors = inputs(33, 40, 64, device, torch.bfloat16)
    gradients = output_gradients(tensors[0])
    assert all(map(torch.equal, measured(tensors, gradients), measured(tensors, gradients)))


@pytest.mark.gpu
@gpu_here
def test_more_heads_than_a_grid_axis():
    kernels.set_backend("auto")
    assert_close(inputs(4, 4, 16, "cuda", batch=70000), TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_gpu():
    kernels.set_backend("auto")
    assert_close(inputs(33, 33, 64, "cuda:1"), TOLERANCE)


def projections(n, head_dim, device, dtype=torch.float32, batch=1, heads=2):
    """qkv, tqkv (B, N, 3, H, D), both gains, and gradients of o and to (B, N, H, D)."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(batch, n, 3, heads, head_dim)] * 2 + [(head_dim,)] * 2 + [(batch, n, heads, head_dim)] * 2
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.requires_grad_() for x in tensors[:4]], tensors[4:]


def plain_norm_attention(qkv, *gains):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if gains:
        norm = torch.nn.functional.rms_norm
        q, k = (norm(x, x.shape[-1:], gain, 1e-6) for x, gain in zip((q, k), gains, strict=True))
    return plain_attention(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2)


def exact_projection(inputs, gradients):
    """o, to and the gradients of those inputs that are not None; gradients None for what is not used."""
    qkv, tqkv, *gains = (None if x is None else x.detach().double().requires_grad_() for x in inputs)
    given = [x for x in gains if x is not None]
    outputs = [plain_norm_attention(qkv, *given)]
    if tqkv is not None:
        outputs = torch.func.jvp(lambda x: plain_norm_attention(x, *given), (qkv,), (tqkv,))
    wide = [None if g is None else g.double() for g in gradients]
    return [*outputs, *differentiate(outputs, [qkv, tqkv, *gains], wide)]


def differentiate(outputs, inputs, gradients):
    used = [(y, g) for y, g in zip(outputs, gradients, strict=False) if g is not None]
    outputs, gradients = zip(*used, strict=True)
    given = [x for x in inputs if x is not None]
    found = torch.autograd.grad(outputs, given, gradients, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(given, found, strict=True)]


def measured_projection(inputs, gradients):
    outputs = [x for x in kernels.qkv_norm_attention(*inputs) if x is not None]
    return [*outputs, *differentiate(outputs, inputs, gradients)]


@every_backend
@pytest.mark.parametrize(
    ("n", "head_dim", "missing"),
    [
        *((17, 72, missing) for missing in ((), (1,), (2, 3), (1, 2, 3))),
        *((n, head_dim, ()) for n, head_dim in ((1, 16), (33, 64), (40, 32), (20, 80), (9, 96), (5, 128))),
    ],
)
def test_projection(device, n, head_dim, missing):
    """Queries and keys normed, or not; with a tangent, or without: all gradients, those of the gains too."""
    inputs, gradients = projections(n, head_dim, device)
    inputs = [None if i in missing else x for i, x in enumerate(inputs)]
    actual = measured_projection(inputs, gradients)
    found = errors(actual, exact_projection(inputs, gradients))
    assert max(found) < TOLERANCE, found


@every_backend
@pytest.mark.parametrize("unused", [0, 1], ids=["value", "tangent"])
def test_an_output_that_is_not_used(device, unused):
    inputs, gradients = projections(17, 72, device)
    gradients[unused] = None
    found = errors(measured_projection(inputs, gradients), exact_projection(inputs, gradients))
    assert max(found) < TOLERANCE, found


@every_backend
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_detached_tangent_costs_no_backward(device, packed, compiled):
    """4 products, and the gradients of plain attention, whether it is dropped eagerly or compiled."""
    if packed:
        tensors, gradients = projections(16, 32, device)
        function, plain = kernels.qkv_norm_attention, plain_norm_attention
    else:
        tensors = inputs(16, 16, 32, device, heads=2)
        gradients = output_gradients(tensors[0])
        function, plain = kernels.jvp_attention, lambda *x: plain_attention(*x, 32**-0.5)

    def detached(*tensors):
        o, to = function(*tensors)
        return o, to.detach()

    if compiled:
        backend = "inductor" if device == "cuda" else "aot_eager_decomp_partition"
        detached = torch.compile(detached, fullgraph=True, backend=backend)
    values = [tensors[i] for i in ((0, 2, 3) if packed else (0, 1, 2))]
    o, to = detached(*tensors)
    with FlopCounterMode(display=False) as flops:
        actual = torch.autograd.grad(o, values, gradients[0])
    assert flops.get_total_flops() == 4 * 2 * 2 * 16 * 16 * 32
    wide = [x.detach().double().requires_grad_() for x in values]
    expected = torch.autograd.grad(plain(*wide), wide, gradients[0].double())
    assert max(errors(actual, expected)) < TOLERANCE
    assert not to.requires_grad


@every_fused
def test_projection_in_half_precision(device):
    """At most 1.5 times the error of PyTorch's own operations in bf16, which round the same places."""
    inputs, gradients = projections(40, 72, device, torch.bfloat16)
    expected = exact_projection(inputs, gradients)
    actual = errors(measured_projection(inputs, gradients), expected)
    kernels.set_backend("reference")
    allowed = errors(measured_projection(inputs, gradients), expected)
    assert all(x < 1.5 * y for x, y in zip(actual, allowed, strict=True)), (actual, allowed)


@every_fused
def test_projection_is_kept_and_its_gradient_is_one_buffer(device):
    """Kept: projections, outputs, two numbers per row, what was normed, gains. Gradients lie as inputs."""
    inputs, gradients = projections(9, 16, device)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
    ):
        outputs = kernels.qkv_norm_attention(*inputs)
    size = outputs[0].numel()
    assert sum(x.numel() for x in kept.values()) == (6 + 2 + 4) * size + 2 * size // 16 + 3 * 16
    actual = torch.autograd.grad(outputs, inputs[:2], gradients)
    assert [x.stride() for x in actual] == [inputs[0].stride()] * 2


@every_backend
def test_projection_of_any_strides(device):
    """Values and tangents that lie in memory in another order than their axes say."""
    inputs, gradients = projections(17, 32, device, batch=2)
    for i in (0, 1):
        inputs[i] = inputs[i].detach().transpose(i, 3).contiguous().transpose(i, 3).requires_grad_()
    found = errors(measured_projection(inputs, gradients), exact_projection(inputs, gradients))
    assert max(found) < TOLERANCE, found


@every_fused
def test_operators_pass_opcheck(device):
    from kernels import operators

    tensors = inputs(4, 5, 16, device)
    plain = [x.detach() for x in tensors]
    outputs = operators.jvp_attention(*plain, None, 0.3)
    lengths = torch.tensor([3], dtype=torch.int32, device=device)
    torch.library.opcheck(operators.jvp_attention, (*tensors, None, 0.3))
    torch.library.opcheck(operators.jvp_attention, (*tensors[:4], None, None, lengths, 0.3))
    torch.library.opcheck(operators.jvp_attention_backward, (*outputs[:2], *plain, None, *outputs, 0.3))
    none = (outputs[0], None, *plain[:3], None, None, None, None, outputs[0], None, outputs[2], None, 0.3)
    torch.library.opcheck(operators.jvp_attention_backward, none)


@every_fused
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tangent", [True, False])
def test_projection_passes_opcheck(device, tangent, norm):
    from kernels import operators

    (qkv, tqkv, gain, _), gradients = projections(4, 16, device, heads=1)
    given = [qkv, tqkv if tangent else None, gain if norm else None]
    torch.library.opcheck(operators.qkv_norm_attention, (*given, 0.3, True))
    given = [None if x is None else x.detach() for x in given]
    torch.library.opcheck(operators.qkv_norm_attention, (*given, 0.3, False))
    results = [x if x.numel() else None for x in operators.qkv_norm_attention(*given, 0.3, True)]
    if not tangent:
        gradients[1] = None
    torch.library.opcheck(operators.qkv_norm_attention_backward, (*gradients, *given, *results, 0.3))


@every_backend
def test_linear_and_gelu(device):
    """The tanh form, in one operator where nothing is differentiated; where something is, its gradient."""
    x, weight, bias = (
        inputs(3, 5, 8, device, batch=2)[0],
        torch.randn(6, 8).to(device),
        torch.randn(6).to(device),
    )
    product = x.double() @ weight.double().T + bias.double()
    expected = torch.nn.functional.gelu(product, approximate="tanh")
    y = kernels.linear_gelu(x, weight, bias)
    with torch.no_grad():
        fused = kernels.linear_gelu(x, weight, bias)
    assert max(errors([y, fused], [expected] * 2)) < 1e-6
    ones = torch.ones_like(y)
    assert errors(torch.autograd.grad(y, x, ones), torch.autograd.grad(expected, x, ones.double()))[0] < 1e-5


@every_fused
def test_linear_and_gelu_passes_opcheck(device):
    from kernels import operators

    x, weight, bias = (torch.randn(size).to(device) for size in ((2, 3, 8), (6, 8), (6,)))
    torch.library.opcheck(operators.linear_gelu, (x, weight, bias))


@every_backend
def test_compiles_without_graph_break(device):
    """On the CPU through AOTAutograd alone: there Inductor takes a minute and adds nothing to the test."""
    compiled = torch.compile(
        lambda *x: kernels.jvp_attention(*(2 * y for y in x)),
        fullgraph=True,
        backend="inductor" if device == "cuda" else "aot_eager",
    )
    tensors = inputs(17, 33, 32, device)
    gradients = output_gradients(tensors[0])
    doubled = [(2 * x).detach().requires_grad_() for x in tensors]
    expected = measured(doubled, gradients)
    outputs = compiled(*tensors)
    torch.testing.assert_close([*outputs], expected[:2])
    actual = torch.autograd.grad(outputs, tensors, gradients)
    torch.testing.assert_close([x / 2 for x in actual], expected[2:], rtol=1e-5, atol=1e-5)


@every_backend
def test_checkpointing_changes_nothing(device):
    tensors = inputs(17, 33, 32, device)
    gradients = output_gradients(tensors[0])
    outputs = checkpoint(kernels.jvp_attention, *tensors, use_reentrant=False)
    actual = [*outputs, *torch.autograd.grad(outputs, tensors, gradients)]
    assert all(map(torch.equal, actual, measured(tensors, gradients)))


@every_backend
def test_autocast_casts_as_sdpa_does(device):
    tensors = inputs(17, 33, 32, device)
    tensors[3] = tensors[3].detach().bfloat16().requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        o, to = kernels.jvp_attention(*tensors)
        expected = kernels.attention(*tensors[:3])
    assert o.dtype == to.dtype == expected.dtype == torch.bfloat16
    assert errors([o], [expected.double()])[0] < 5e-3
    gradients = torch.autograd.grad(to.float().sum(), tensors)
    assert [x.dtype for x in gradients] == [x.dtype for x in tensors]


@every_fused
def test_second_derivatives_are_refused(device):
    tensors = inputs(9, 9, 16, device)
    o, to = kernels.jvp_attention(*tensors)
    first = torch.autograd.grad((o * to).sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


@every_backend
def test_flops_are_counted(device):
    """6 products forward and 12 backward with all tangents, 5 and 10 without tk or without tv."""
    tensors = inputs(8, 16, 16, device, batch=1)
    for missing, products in ((None, 6), (4, 5), (5, 5)):
        given = [None if index == missing else x for index, x in enumerate(tensors)]
        with FlopCounterMode(display=False) as forward:
            outputs = kernels.jvp_attention(*given)
        with FlopCounterMode(display=False) as backward:
            (outputs[0].sum() + outputs[1].sum()).backward()
        assert forward.get_total_flops() == products * 2 * 8 * 16 * 16
        assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_plain_attention():
    q, k, v = inputs(17, 33, 16, "cpu", torch.float64)[:3]
    with FlopCounterMode(display=False) as flops:
        o = kernels.attention(q, k, v)
        o.sum().backward()
    torch.testing.assert_close(o, plain_attention(q, k, v, 16**-0.5))
    assert flops.get_total_flops() == 6 * q.numel() * 2 * 33


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tq": None, "tk": None, "tv": None}, "tq, tk and tv are all None"),
        ({"q": torch.zeros(2, 4, 8)}, r"q is .* \(2, 4, 8\)"),
        ({"q": torch.zeros(1, 2, 4, 8, dtype=torch.int64)}, "q is torch.int64"),
        ({"k": torch.zeros(1, 3, 5, 8)}, r"k has shape \(1, 3, 5, 8\)"),
        ({"k": torch.zeros(1, 2, 5, 8).double()}, "k is torch.float64"),
        ({"v": torch.zeros(1, 2, 4, 8)}, r"v has shape \(1, 2, 4, 8\)"),
        ({"v": torch.zeros(1, 2, 5, 8, device="meta")}, "v is on meta"),
        ({"tq": torch.zeros(1, 2, 5, 8)}, r"tq has shape \(1, 2, 5, 8\)"),
        ({"tk": torch.zeros(1, 2, 5, 8).half()}, "tk is torch.float16"),
        ({"tv": torch.zeros(1, 2, 5, 8, device="meta")}, "tv is on meta"),
        ({"lengths": torch.ones(1)}, r"lengths is torch.float32 of shape \(1,\); it must be int \(1,\)"),
        ({"lengths": torch.ones(2).long()}, r"lengths is torch.int64 of shape \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    q, k = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=message):
        kernels.jvp_attention(**{"q": q, "k": k, "v": k, "tq": q, "tk": k, "tv": k, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(1, 4, 2, 2, 8)}, r"qkv is .* \(1, 4, 2, 2, 8\)"),
        ({"tqkv": torch.zeros(1, 5, 3, 2, 8)}, r"tqkv has shape \(1, 5, 3, 2, 8\)"),
        ({"q_gain": None}, "q_gain and k_gain: give both, or None for both"),
        ({"k_gain": torch.zeros(16)}, r"k_gain has shape \(16,\); it must be \(8,\)"),
    ],
)
def test_wrong_projections_are_named(changes, message):
    qkv, gain = torch.zeros(1, 4, 3, 2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=message):
        kernels.qkv_norm_attention(**{"qkv": qkv, "tqkv": qkv, "q_gain": gain, "k_gain": gain, **changes})


@every_fused
def test_a_small_network_has_the_same_loss_and_gradients_on_both_back_ends(device):
    from recipe.dit import DiT, DiTConfig
    from recipe.objectives import TVM
    from recipe.objectives.base import draw

    torch.manual_seed(0)
    net = DiT(DiTConfig(size=6, channels=1, classes=3, patch=2, width=32, depth=2, heads=2))
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    net.to(device)
    ids = torch.arange(1, device=device)
    objective = TVM(guidance=1.5)
    batch = draw(torch.randn(1, 1, 6, 6).to(device), ids, ids, ids, 0, objective, DiTConfig(classes=3))
    results = []
    for backend in ("reference", "triton"):
        kernels.set_backend(backend)
        net.zero_grad()
        loss = objective.loss(net, net, batch).total
        loss.mean().backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
    assert max(errors(results[1], [x.double() for x in results[0]])) < 2e-5


@every_fused
def test_what_the_kernels_cannot_take_is_named(device):
    with pytest.raises(ValueError, match="q is torch.float64"):
        kernels.jvp_attention(*inputs(4, 4, 16, device, torch.float64))
    with pytest.raises(ValueError, match="q has head dimension 160"):
        kernels.jvp_attention(*inputs(4, 4, 160, device))


def test_unknown_backend():
    with pytest.raises(ValueError, match="'cuda'; it must be one of auto, reference, triton"):
        kernels.set_backend("cuda")


@pytest.mark.slow
def test_compiled_kernels_meet_the_bars():
    """Registers, spills, matrix instructions for sm_80 and sm_90, in a process that interprets nothing."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.inspect"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Every bar is met." in run.stdout
