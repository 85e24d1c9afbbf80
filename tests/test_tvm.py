"""The objective: time samplers, the exact solution for Gaussian data, options, and a mixture in the plane."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recipe.dit import DiT, DiTConfig
from recipe.draws import Stream, keys, normal, uniform
from recipe.dual import Dual
from recipe.ema import ema_update
from recipe.objectives import FlowMatching
from recipe.objectives.base import Condition, Draw, draw
from recipe.objectives.tvm import SAMPLERS, TVM
from recipe.sampler import initial_noise, sample
from recipe.settings import make

SIGMA = 0.6


def uniforms(n):
    ids = torch.arange(n)
    return uniform(keys(0, torch.zeros_like(ids), ids, Stream.TIMES), 4)


def make_batch(n, shape=(1, 2, 2), seed=0, **options):
    config = TVM(**options)
    ids = torch.arange(n)
    x0 = SIGMA * normal(keys(seed, torch.zeros_like(ids), ids, Stream.POSTERIOR), *shape)
    return draw(
        x0, torch.zeros(n, dtype=torch.int64), torch.zeros_like(ids), ids, seed, config, DiTConfig(classes=1)
    ), config


def spread(u):
    """a(u): standard deviation of x_u = (1 - u) x0 + u noise for x0 ~ N(0, SIGMA^2); and its derivative."""
    a = ((1 - u) ** 2 * SIGMA**2 + u**2).sqrt()
    return a, (u - (1 - u) * SIGMA**2) / a


def exact_network(x, t, d, label, beta=None, detach_tangent=False):
    """The exact F for Gaussian data: the flow multiplies x by a(s) / a(t). Its tangent is that along d."""
    d, td = d if isinstance(d, Dual) else Dual(d)
    s = t - d
    (a_s, slope_s), (a_t, slope_t) = spread(s), spread(t)
    curvature = (1 + SIGMA**2 - slope_t**2) / a_t
    flat = d.abs() < 1e-7
    safe = torch.where(flat, 1.0, d)
    ratio = torch.where(flat, slope_t / a_t, (a_s / a_t - 1) / -safe)
    value = ratio[:, None, None, None] * x
    if td is None:
        return Dual(value)
    # d/dd of (a(t - d) / a(t) - 1) / -d; at d = 0 it is -a''(t) / (2 a(t))
    slope = torch.where(flat, -curvature / (2 * a_t), (slope_s / a_t - ratio) / safe)
    return Dual(value, (td * slope)[:, None, None, None] * x)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_times_are_ordered_and_the_share_of_equal_ones_is_kept(sampler):
    t, s, s_prime = TVM(times=sampler, equal_share=0.25).sample_times(uniforms(20000))
    assert (s >= 0).all()
    assert (s <= t).all()
    assert (t <= 1).all()
    assert ((s_prime > 0) & (s_prime < 1)).all()
    clamped = {"clamp": 0.5}.get(sampler, 0.0)  # clamping makes half of the pairs equal by itself
    assert (t == s).double().mean().item() == pytest.approx(0.25 + 0.75 * clamped, abs=0.015)
    assert torch.equal(s, s_prime) == (sampler != "gap*")


def test_truncated_times_follow_the_truncated_law():
    from scipy import stats

    u = uniforms(4000)
    config = TVM(times="trunc")
    t, s, _ = config.sample_times(u)
    z = (torch.logit(s) - config.s_mean) / config.s_std
    limit = (torch.logit(t) - config.s_mean) / config.s_std
    levels = torch.special.ndtr(z) / torch.special.ndtr(limit)
    assert stats.kstest(levels.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_exact_map_of_gaussian_data_has_no_terminal_residual(sampler):
    batch, config = make_batch(512, times=sampler)
    loss = config.loss(exact_network, exact_network, batch)
    assert loss.terms["terminal"].value.abs().max() < 1e-16


def test_the_exact_map_of_gaussian_data_minimises_the_flow_matching_term():
    batch, config = make_batch(20000)
    loss = config.loss(exact_network, exact_network, batch).terms["flow_matching"].value
    a, _ = spread(batch.times[2])
    conditional_variance = SIGMA**2 / a**2  # of v = noise - x0 given x_s', in closed form
    assert loss.mean().item() == pytest.approx(conditional_variance.mean().item(), rel=0.02)
    for factor in (0.97, 1.03):

        def off(*args, factor=factor, **options):
            out = exact_network(*args, **options)
            return Dual(out.value * factor, None if out.tangent is None else out.tangent * factor)

        worse = config.loss(off, exact_network, batch).terms["flow_matching"].value
        assert worse.mean() > loss.mean()


def test_wrong_derivatives_are_seen_by_the_terminal_term():
    batch, config = make_batch(512)

    def off(*args, **options):
        out = exact_network(*args, **options)
        return out if out.tangent is None else out._replace(tangent=out.tangent * 1.01)

    assert config.loss(off, exact_network, batch).terms["terminal"].value.mean() > 1e-8


def test_terms_of_equal_times_vanish_and_options_are_checked():
    batch, config = make_batch(64, equal_share=1.0)
    net = exact_network
    off = config.loss(lambda *a, **k: Dual(net(*a).value * 2, a[0] * 0), net, batch)
    assert (off.terms["terminal"].value == 0).all()
    for options, message in (
        ({"guidance": 0}, "objective.guidance"),
        ({"guidance": [2, 1]}, "objective.guidance"),
        ({"times": "uniform"}, "objective.times"),
        ({"label_dropout": 1.5}, "objective.label_dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            make(TVM, options, "objective")


def test_draws_depend_on_the_sample_alone_and_follow_the_options():
    config = TVM(guidance=[1.5, 3.0], label_dropout=0.3)
    ids = torch.arange(4000)
    label, step = torch.zeros_like(ids), torch.full_like(ids, 7)
    x0 = torch.zeros(4000, 1, 2, 2)
    whole = draw(x0, label, step, ids, 5, config, DiTConfig(classes=9))
    order = torch.randperm(4000)[:100]
    part = draw(x0[order], label[order], step[order], ids[order], 5, config, DiTConfig(classes=9))
    for a, b in zip(
        (*whole[:2], *whole.times, *whole[3:6]), (*part[:2], *part.times, *part[3:6]), strict=True
    ):
        assert torch.equal(a[order], b)
    dropped = whole.label == 9
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (whole.w[dropped] == 1).all()
    kept = whole.w[~dropped]
    assert 1.5 <= kept.min() < 1.52
    assert 2.98 < kept.max() <= 3.0
    assert kept.mean().item() == pytest.approx(2.25, abs=0.05)
    later = draw(x0, label, step + 1, ids, 5, config, DiTConfig(classes=9))
    assert abs(torch.corrcoef(torch.stack([whole.noise.flatten(), later.noise.flatten()]))[0, 1]) < 0.03


def test_the_generator_is_uniform_and_normal():
    from scipy import stats

    ids = torch.arange(300)
    key = keys(3, torch.zeros_like(ids), ids, Stream.NOISE)
    u, z = uniform(key, 100), normal(key, 100)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert torch.corrcoef(z).fill_diagonal_(0).abs().max() < 0.5
    assert len(u.unique()) == u.numel()
    other = uniform(keys(3, torch.zeros_like(ids), ids, Stream.TIMES), 100)
    assert not torch.isclose(u, other).any(1).all()


def small_network(**sizes):
    torch.manual_seed(0)
    net = DiT(DiTConfig(size=2, channels=1, classes=1, patch=1, width=16, depth=1, heads=2, **sizes)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def test_without_guidance_the_unconditional_pass_is_left_out_and_nothing_else_changes():
    net = small_network()
    batch, config = make_batch(8, label_dropout=0.3)
    calls = []

    def counted(x, *rest):
        calls.append(len(x))
        return net(x, *rest)

    lean = config.loss(net, counted, batch)
    config.guidance = [1.0, 1.0 + 1e-12]
    full = config.loss(net, counted, batch)
    assert calls == [8, 16]
    torch.testing.assert_close(lean.total, full.total, rtol=1e-12, atol=0)


def test_detaching_the_jvp_keeps_the_loss_and_changes_the_gradient():
    net, teacher = small_network(), small_network()
    batch, config = make_batch(8, guidance=2.0)
    losses, gradients = [], []
    for config.detach_jvp in (False, True):
        net.zero_grad()
        loss = config.loss(net, teacher, batch).total
        loss.mean().backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*losses)
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


def test_a_detached_jvp_costs_nine_forward_passes_instead_of_eleven():
    with torch.device("meta"):
        net = DiT(DiTConfig(size=8, channels=1, classes=1, patch=2, width=256, depth=4, heads=4))
        x0, noise = torch.empty(2, 2, 1, 8, 8)
        times, label = torch.empty(4, 2), torch.empty(2, dtype=torch.int64)
    batch, counts = Draw(x0, noise, tuple(times[:3]), label, times[3], label, 1), []
    for detach_jvp in (False, True):
        config = TVM(guidance=2.0, detach_jvp=detach_jvp)
        with FlopCounterMode(display=False) as counter:
            config.loss(net, net, batch).total.mean().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] / counts[0] == pytest.approx(9 / 11, abs=0.01)


def train_on_mixture(objective, steps=400, batch=256):
    """A one-token network on four Gaussians in the plane; returns the network's average."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(size=1, channels=2, classes=0, patch=1, width=64, depth=2, heads=2))
    objective.label_dropout = 0.0
    target, average = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, (0.9, 0.95))
    for step in range(steps):
        x0 = mixture(batch, step)
        ids = torch.arange(batch)
        drawn = draw(
            x0, torch.zeros_like(ids), torch.full_like(ids, step), ids, 0, objective, DiTConfig(classes=1)
        )
        loss = objective.loss(net, target, drawn)
        optimizer.zero_grad()
        loss.total.mean().backward()
        optimizer.step()
        ema_update(net, [(target, 0.99), (average, min(0.99, (1 + step) / (10 + step)))])
    return average


def mixture(n, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    centre = corners[torch.randint(4, (n,), generator=generator)]
    return (centre + 0.1 * torch.randn(n, 2, generator=generator))[:, :, None, None]


def sliced_wasserstein(a, b, directions=64):
    angles = torch.arange(directions) * torch.pi / directions
    lines = torch.stack([angles.cos(), angles.sin()]).double()
    a, b = ((x.flatten(1).double() @ lines).sort(0).values for x in (a, b))
    return (a - b).square().mean().sqrt().item()


@pytest.mark.slow
def test_one_step_samples_of_a_mixture_are_closer_than_those_of_flow_matching():
    real, noise = mixture(2000, 10_000), initial_noise(torch.arange(2000), (2, 1, 1))
    distance = {}
    for objective in (TVM(), FlowMatching()):
        net = train_on_mixture(objective)
        asked = Condition(torch.zeros(2000, dtype=torch.int64), 1.0, 1)
        distance[objective.name] = sliced_wasserstein(sample(net, noise, asked, 1, objective), real)
    assert distance["tvm"] < 0.5 * distance["flow_matching"], distance
