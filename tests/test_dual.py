"""The dual forward against torch.func: values, tangents, and parameter gradients through both."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipe import dual
from recipe.dit import DiT, DiTConfig
from recipe.dual import Dual
from recipe.mit import MiT, MiTConfig
from recipe.networks import AnyNetwork, build
from recipe.settings import make

SIZES = {"size": 6, "channels": 3, "patch": 3, "width": 24, "depth": 2, "heads": 2}
KINDS = {
    "dit": {"network": "dit"},
    "dit, x": {"network": "dit", "output": "x"},
    "mit": {"network": "mit", "head_depth": 1},
    "mit, x": {"network": "mit", "head_depth": 1, "output": "x", "rotary": "grid", "learned_positions": True}
    | {"bottleneck": 5, "embedding_scale": 3.0},
}


def network(classes=5, kind="dit"):
    torch.manual_seed(0)
    net = build(make(AnyNetwork, {**SIZES, "classes": classes, **KINDS[kind]})).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def query(net, batch=4):
    torch.manual_seed(1)
    shape = (batch, net.config.channels, net.config.size, net.config.size)
    x, tx = torch.randn(2, *shape, dtype=torch.float64)
    t, d, tt, td = torch.rand(4, batch, dtype=torch.float64)
    t[0] = 0.02  # below the floor of output x
    label = torch.randint(0, net.config.classes + 1, (batch,))
    return x, tx, t, tt, d, td, label, torch.rand(batch, dtype=torch.float64) + 0.5


def by_torch_func(net, params, x, tx, t, tt, d, td, label, beta):
    def plain(x, t, d):
        return functional_call(net, params, (x, t, d, label, beta)).value

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        return jvp(plain, (x, t, d), (tx, tt, td))


@pytest.mark.parametrize(("kind", "classes"), [("dit", 0), *((kind, 5) for kind in KINDS)])
@pytest.mark.parametrize("inputs", ["s", "x", "t", "xts"])
def test_dual_forward_and_its_gradients_equal_torch_func(inputs, kind, classes):
    net = network(classes, kind)
    x, tx, t, tt, d, td, label, beta = query(net)
    tx, tt, td = (
        tangent if name in inputs else torch.zeros_like(tangent)
        for tangent, name in ((tx, "x"), (tt, "t"), (td, "s"))
    )
    pairs = [
        Dual(value, tangent) if name in inputs else value
        for value, tangent, name in ((x, tx, "x"), (t, tt, "t"), (d, td, "s"))
    ]
    value, tangent = net(*pairs, label, beta)
    want_value, want_tangent = by_torch_func(
        net, dict(net.named_parameters()), x, tx, t, tt, d, td, label, beta
    )
    torch.testing.assert_close(value, want_value, rtol=1e-10, atol=1e-12)
    tangent = torch.zeros_like(value) if tangent is None else tangent  # t is no input of mit
    torch.testing.assert_close(tangent, want_tangent, rtol=1e-10, atol=1e-12)
    weights = torch.randn(2, *x.shape, dtype=torch.float64)
    params = list(net.parameters())
    got = torch.autograd.grad((weights[0] * value + weights[1] * tangent).sum(), params, allow_unused=True)
    want = torch.autograd.grad(
        (weights[0] * want_value + weights[1] * want_tangent).sum(), params, allow_unused=True
    )
    for (name, _), a, b in zip(net.named_parameters(), got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b.norm() > 0:
            error = (a - b).norm() / b.norm().clamp(min=1e-8)
            assert error < 1e-10, name


def test_plain_evaluation_is_the_value_of_the_dual_one_and_has_no_tangent():
    net = network()
    x, _, t, _, d, td, label, beta = query(net)
    plain = net(x, t, d, label, beta)
    assert plain.tangent is None
    torch.testing.assert_close(plain.value, net(x, t, Dual(d, td), label, beta).value, rtol=1e-12, atol=1e-14)


def test_gelu_slopes_up_to_the_second():
    x, tx = (torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: tuple(dual.gelu(Dual(a, b))), (x, tx))


def test_low_precision_norms_are_taken_in_float32():
    x = (torch.randn(4, 8, 64) * 300).bfloat16()
    y = dual.rms_norm(Dual(x)).value
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5, "width": 384}, "model.heads: 5 does not divide model.width 384"),
        ({"patch": 3, "size": 32}, "model.patch: 3 does not divide model.size 32"),
        ({"preset": "XXL"}, "model.preset: 'XXL' must be 'S/2'"),
        ({"classes": -1}, "model.classes: -1 must be a whole number from 0 to 10000000"),
        ({"time_init": "zero"}, "model.time_init: 'zero' must be 'normal' or 'spectral'"),
    ],
)
def test_impossible_architectures_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        make(DiTConfig, settings, "model")


@pytest.mark.parametrize(
    ("preset", "millions"), [("S/2", 33), ("B/2", 131), ("L/2", 459), ("XL/2", 677), ("XL/2-18", 677)]
)
def test_preset_sizes(preset, millions):
    with torch.device("meta"):
        net = DiT(DiTConfig(preset=preset))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(("preset", "millions"), [("B", 89), ("M", 174), ("L", 409), ("XL", 610)])
def test_preset_sizes_of_mit(preset, millions):
    """Published without the auxiliary head, which sampling does not need."""
    with torch.device("meta"):
        net = MiT(MiTConfig(preset=preset, v_head=False))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_heads_of_mit_share_their_tokens_and_v_has_no_tangent():
    net = network(kind="mit")
    x, tx, t, tt, d, td, label, beta = query(net)
    told, within = (Dual(x, tx), Dual(t, tt), Dual(d, td), label, beta), {"interval": (0.2, 0.7)}
    u, v = net(*told, **within, head="both")
    assert v.tangent is None
    torch.testing.assert_close(tuple(u), tuple(net(*told, **within, head="u")))
    torch.testing.assert_close(v.value, net(x, t, d, label, beta, **within, head="v").value)
    assert not torch.allclose(u.value, v.value)
    assert not torch.allclose(u.value, net(x, t, d, label, beta).value)  # at another interval
    alone = MiT(replace(net.config, v_head=False)).double()
    alone.load_state_dict({k: p for k, p in net.state_dict().items() if not k.startswith("v_")})
    found = alone(*told, **within, head="both")
    assert found[1] is None
    torch.testing.assert_close(found[0].value, u.value)
    torch.testing.assert_close(alone(*told, **within, head="v").value, u.value)


def test_embedding_scale_multiplies_what_the_tokens_of_mit_are_told():
    net = network(kind="mit")
    x, _, t, _, d, _, label, beta = query(net)
    scaled = MiT(replace(net.config, embedding_scale=2.0)).double()
    scaled.load_state_dict(net.state_dict())
    half = scaled(x, t, d / 2, label, 1 - (1 - beta) / 2, interval=(0.1, 0.35)).value
    torch.testing.assert_close(half, net(x, t, d, label, beta, interval=(0.2, 0.7)).value)
    assert not torch.allclose(half, scaled(x, t, d, label, beta, interval=(0.2, 0.7)).value)


def test_mit_begins_as_published():
    torch.manual_seed(0)
    config = MiTConfig(size=8, width=96, depth=2, heads=4, head_depth=1, classes=400, learned_positions=True)
    for name, p in MiT(config).named_parameters():
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
            assert (p == 1).all()
        elif "scale" in name or name.endswith("bias") or "final_layer" in name:
            assert not p.any()
        elif name.startswith(("tokens", "y_embedder", "positions")):
            assert p.std().item() == pytest.approx(96**-0.5, rel=0.15)
        elif name == "x_embedder.proj.weight":
            bound = (6 / (96 + 16)) ** 0.5
            assert p.abs().max().item() == pytest.approx(bound, rel=0.02)
        else:
            scale = 0.32 if "blocks" in name else 1
            assert p.std().item() == pytest.approx(scale * p.shape[1] ** -0.5, rel=0.05), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "mit", "depth": 4}, "model.head_depth: 8 is more than model.depth, 4"),
        ({"network": "mit", "width": 27, "heads": 3}, "model.heads: 3 leaves each head 9 of model.width 27"),
        ({"network": "mit", "rotary": "grid", "width": 36}, "model.heads: 6 leaves each head 6 .* of 4"),
        ({"network": "mit", "norm": "rms"}, "model.norm: a setting of dit, not of mit"),
        ({"v_head": True}, "model.v_head: a setting of mit, not of dit"),
        ({"network": "unet"}, "model.network: 'unet' is not one of dit, mit"),
        ({"output": "eps"}, "model.output: 'eps' must be 'v' or 'x'"),
    ],
)
def test_settings_of_another_network_are_one_error_that_says_whose_they_are(settings, message):
    with pytest.raises(ValueError, match=message):
        make(AnyNetwork, settings, "model")
