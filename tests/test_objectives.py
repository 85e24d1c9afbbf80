"""What holds for every objective: the Gaussian's closed form, guidance, costs, warm starts, add-your-own."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipe.config import ConfigError, TrainConfig, load_config
from recipe.dit import DiTConfig
from recipe.draws import Stream, keys, uniform
from recipe.dual import Dual
from recipe.model import GenerativeModel
from recipe.networks import CONFIGS, build
from recipe.normalizer import Normalizer
from recipe.objectives import IMF, OBJECTIVES, TVM, FlowMatching, MeanFlow, from_facts
from recipe.objectives.base import Condition, Draw, draw
from recipe.objectives.flow_matching import flow_matching_loss
from recipe.sampler import initial_noise, sample
from recipe.warm_start import check_weights, class_rows, other_data
from recipe.weights import save_weights
from storage import Folders, StorageError
from tests.conftest import begin, documented_objective, manifest_of, refusal, store
from tests.test_tvm import SIGMA, exact_network, make_batch, small_network, spread

GUIDED = [
    TVM(guidance=1.5),
    TVM(guidance=[1.0, 2.0], scaled=False),
    MeanFlow(omega=1.5),
    IMF(guidance=[1, 4]),
]
FINISH = ["objective.name=frechet", "objective.features.pixels=a"]


def exact_dual(x, t, d, label, beta=None, detach_tangent=False):
    """The exact u of Gaussian data with its derivative along (x, t, d), by torch.func.jvp."""
    primals = [z.value if isinstance(z, Dual) else z for z in (x, t, d)]
    tangents = [
        torch.zeros_like(z) if not isinstance(y, Dual) else y.tangent
        for y, z in zip((x, t, d), primals, strict=True)
    ]
    if not any(isinstance(z, Dual) for z in (x, t, d)):
        return exact_network(*primals, label)
    return Dual(*torch.func.jvp(lambda *a: exact_network(*a, label).value, tuple(primals), tuple(tangents)))


@pytest.mark.parametrize("objective", [MeanFlow(norm_p=0), IMF(norm_p=0)], ids=["meanflow", "imf"])
def test_the_exact_average_velocity_of_gaussian_data_is_where_training_rests(objective):
    """With target and tangent as the exact network gives them, no other size of its value fits better."""
    objective.label_dropout, objective.equal_share = 0.0, 0.3
    ids = torch.arange(20000)
    x0 = make_batch(20000)[0].x0
    batch = draw(x0, 0 * ids, 0 * ids, ids, 0, objective, DiTConfig(classes=1))
    error = objective.loss(exact_dual, None, batch).terms["error"].value
    for factor in (0.95, 1.05):

        def off(*args, factor=factor, **options):
            out = exact_dual(*args, **options)
            return out if out.tangent is None else out._replace(value=out.value * factor)

        assert objective.loss(off, None, batch).terms["error"].value.mean() > error.mean()
    t, r = batch.times
    same = r == t  # the error is the conditional variance of v, in closed form, of four pixels
    variance = SIGMA**2 / spread(t[same])[0] ** 2
    assert error[same].mean().item() == pytest.approx(4 * variance.mean().item(), rel=0.03)


@pytest.mark.parametrize("objective", [FlowMatching(), TVM(), MeanFlow(), IMF()], ids=lambda o: o.name)
def test_the_sampler_takes_gaussian_noise_to_gaussian_data(objective):
    noise = initial_noise(torch.arange(20000), (1, 1, 1), torch.float64)
    label = torch.zeros(20000, dtype=torch.int64)
    nfe = 400 if objective.name == "flow_matching" else 1
    spread_of = sample(exact_network, noise, Condition(label, 1.0, 1), nfe, objective).std() / noise.std()
    assert spread_of.item() == pytest.approx(SIGMA, rel=0.01)


def test_times_of_meanflow_are_ordered_and_equal_as_often_as_asked():
    ids = torch.arange(20000)
    u = uniform(keys(0, torch.zeros_like(ids), ids, Stream.TIMES), 4)
    for objective in (MeanFlow(equal_share=0.75), IMF(equal_share=0.5)):
        t, r = objective.sample_times(u)
        assert (r <= t).all()
        assert (t == r).double().mean().item() == pytest.approx(objective.equal_share, abs=0.01)
        median = torch.sigmoid(torch.tensor(-0.4)).item()  # P(both draws below it) = 1/4
        assert (t < median).double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_guidance_of_imf_follows_the_power_law_with_and_without_label():
    u = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    w = IMF(guidance=[1, 8]).sample_guidance(u, u > 2)
    assert torch.equal(w, IMF(guidance=[1, 8]).sample_guidance(u, u < 2))
    assert w.log().mean().item() == pytest.approx(torch.tensor(8.0).log().item() / 2, rel=1e-6)
    assert (w.min().item(), w.max().item()) == pytest.approx((1, 8), rel=2e-3)


@pytest.mark.parametrize("objective", GUIDED, ids=lambda o: o.name)
def test_dropped_labels_are_seen_by_no_guidance(objective):
    """A sample without label is trained on v itself, whatever the unconditional velocity says."""
    torch.manual_seed(0)
    net = small_network()
    ids = torch.arange(64)
    objective.label_dropout = 1.0
    x0 = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    batch = draw(x0, torch.zeros_like(ids), torch.zeros_like(ids), ids, 0, objective, DiTConfig(classes=1))
    assert (batch.label == 1).all()
    if isinstance(objective, TVM):
        assert (batch.w == 1).all()
    else:
        guided = objective.guided_velocity if isinstance(objective, MeanFlow) else objective.velocities
        target = guided(net, batch.at(batch.times[0]), batch)
        assert torch.equal(target if isinstance(objective, MeanFlow) else target[1], batch.velocity)


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if not objective.finishes])
def test_facts_of_weights_bring_the_objective_back(name):
    objective = OBJECTIVES[name](label_dropout=0.25)
    assert from_facts(objective.facts()) == objective
    with pytest.raises(ValueError, match="method"):
        from_facts({**objective.facts(), "unknown": 1})
    with pytest.raises(ValueError, match="method.objective: 'ddpm' is not one of tvm"):
        from_facts({"objective": "ddpm"})
    with pytest.raises(ValueError, match="method.objective: 'frechet' is not one of tvm"):
        from_facts({"objective": "frechet"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.kappa=0.5"], "objective.kappa: a setting of meanflow, not of tvm"),
        (
            ["objective.name=meanflow", "objective.scaled=true"],
            "objective.scaled: a setting of tvm, not of meanflow",
        ),
        (["objective.name=imf", "objective.times=gap"], "objective.times: a setting of tvm, not of imf"),
        (["objective.name=ddpm"], "objective.name: 'ddpm' is not one of tvm, flow_matching, meanflow, imf"),
        (
            ["objective.name=meanflow", "objective.kappa=1"],
            "objective.kappa: 1 must be a number at least 0 and less than 1",
        ),
        (["objective.name=imf", "objective.guidance=[4,1]"], r"objective.guidance: \[4, 1\] must be"),
        (["objective.name=imf", "objective.guidance=[]"], "objective.guidance"),
        (
            ["objective.name=flow_matching", "objective.flow_matching_first=2ba"],
            "objective.flow_matching_first",
        ),
        (["objective.flow_matching_first=60sec"], "objective.flow_matching_first: '60sec' must be"),
        (["objective.flow_matching_first=soon"], "objective.flow_matching_first: 'soon' must be a time"),
        (["init_from=a", "fork_from=b/ep0-ba1"], "init_from"),
        (["objective.name=frechet", "init_from=a"], "objective.features: must be given"),
        (FINISH, "init_from: frechet needs the weights that it finishes"),
        ([*FINISH, "objective.features.fid=b"], "objective.features: .* must name what to match"),
        ([*FINISH, "objective.features.classifier:0=b"], "objective.features: .* must name what to match"),
        ([*FINISH, "objective.features.pixels=s3://b/c"], "objective.features.*must"),
        ([*FINISH, "objective.nfe=0"], "objective.nfe: 0 must"),
        ([*FINISH, "objective.joint=0"], "objective.joint: 0 must"),
        (
            [*FINISH, "objective.features.pixels:2=b.npz", "objective.joint=1"],
            "objective.joint: needs dataset folders",
        ),
        ([*FINISH, "objective.flow_matching_first=2ba"], "objective.flow_matching_first: frechet"),
    ],
)
def test_settings_of_another_objective_are_one_error_that_says_whose_they_are(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        load_config(TrainConfig, "yamls/digits.yaml", [f"data.local={tmp_path}", *overrides])
    assert "\n" not in str(error.value)


def test_naming_another_objective_begins_the_section_anew(tmp_path):
    config = load_config(
        TrainConfig,
        "yamls/digits.yaml",
        [f"data.local={tmp_path}", "objective.name=meanflow", "objective.omega=2"],
    )
    assert config.objective == MeanFlow(omega=2.0)
    same = load_config(TrainConfig, "yamls/digits.yaml", [f"data.local={tmp_path}", "objective.name=tvm"])
    assert same.objective == TVM(guidance=1.25, gap_mean=0.0)


def model_of(objective, network="dit", **options):
    torch.manual_seed(1)
    options |= {"head_depth": 1, "context": [2, 1, 1, 1]} if network == "mit" else {}
    sizes = {"size": 4, "channels": 2, "classes": 3, "width": 32, "depth": 2, "heads": 2}
    config = CONFIGS[network](**{**sizes, **options})
    return GenerativeModel(build(config), objective, Normalizer([0.0, 0.0], [1.0, 1.0]), 0)


def test_a_run_can_begin_with_flow_matching_in_its_own_parameterisation():
    objective = TVM(guidance=2.0, flow_matching_first="3ba")
    model = model_of(objective).double()
    ids = torch.arange(6)
    batch = {"image": torch.randn(6, 2, 4, 4).double(), "label": ids % 3, "sample": ids, "step": 0 * ids}
    model.flow_matching = True
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        first = model(batch)
        model.flow_matching = False
        then = model(batch)
    assert first.terms.keys() == {"flow_matching"}
    assert then.terms.keys() == {"flow_matching", "terminal"}
    x0 = model.normalizer(batch, batch["step"], 0)
    drawn = draw(x0, batch["label"], batch["step"], ids, 0, objective, DiTConfig(classes=3))
    s_prime = drawn.times[2]
    asked = Condition(drawn.label, 2.0, 3)
    u = objective.average_velocity(
        lambda x, t, d, *rest: model.net(x, s_prime, d, *rest), drawn.at(s_prime), 1, 1, asked
    )
    kept = drawn.label != 3
    assert kept.any()
    expected = (u - drawn.velocity).square().mean((1, 2, 3))
    torch.testing.assert_close(first.total[kept], expected[kept], rtol=1e-10, atol=0)
    assert flow_matching_loss(objective, model.net, drawn).total.shape == (6,)


PAIRS = [
    (FlowMatching(), TVM(guidance=[1.0, 3.0], scaled=False)),
    (FlowMatching(), TVM(guidance=1.25)),
    (FlowMatching(), MeanFlow()),
    (FlowMatching(), IMF(guidance=[1, 8])),
    (TVM(guidance=2.0), MeanFlow(omega=2.0)),
    (TVM(guidance=[1.0, 2.0]), TVM(guidance=[1.0, 2.0])),
    (TVM(guidance=2.0), IMF(guidance=2.0)),
    (TVM(guidance=1.25), IMF(guidance=[1, 2])),
    (TVM(guidance=1.25), TVM(guidance=[1.0, 2.0])),
    (MeanFlow(), TVM(guidance=1.5)),
    (IMF(guidance=[1, 8]), FlowMatching()),
    (IMF(guidance=[1, 8]), TVM(guidance=[1.0, 8.0], scaled=False)),
]


MIT_PAIRS = [(*PAIRS[i], "mit") for i in (0, 3, 6, 7, 9, 10)]


@pytest.mark.parametrize(
    ("source", "target", "network"),
    [*((*pair, "dit") for pair in PAIRS), *MIT_PAIRS],
    ids=lambda o: o if isinstance(o, str) else f"{o.name}{getattr(o, 'guidance', '')}",
)
def test_init_from_keeps_the_velocities_of_the_weights(tmp_path, source, target, network):
    trained = model_of(source, network)
    with torch.no_grad():
        for p in trained.net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    data = {"column": "image", "mean": [0.0, 0.0], "std": [1.0, 1.0]}
    facts = {"method": source.facts(), "data": data, "average": "ema", "step": 5}
    save_weights(tmp_path / "weights/ba0000005-ema", trained.net.state_dict(), trained.net.config, facts)
    config = load_config(
        TrainConfig, "yamls/digits.yaml", [f"data.local={tmp_path}", f"init_from={tmp_path}/weights"]
    )
    config.model, config.objective = trained.net.config, target
    model = model_of(target, network)
    said = begin(model, config)
    assert f"({source.name}, step 5)" in said
    assert ("guidance_embedder" in said) == (target.guidance_input and not source.guidance_input)
    x, label = torch.randn(5, 2, 4, 4).double(), torch.arange(5) % 3
    trained, model = trained.double(), model.double()
    ends = target.guidance_range if target.guidance_input else (1.0,)  # of what training sees
    known = source.guidance_range
    for w in known[:1] if source.guidance_input and target.guidance_input and known[0] == known[1] else ends:
        theirs = w if source.guidance_input and target.guidance_input else source.default_w
        want = source.average_velocity(trained.net, x, 0.7, 0.7, Condition(label, theirs, 3))
        for net in (model.net, model.ema, *([model.target] if target.teacher else [])):
            got = target.average_velocity(net, x, 0.7, 0.7, Condition(label, w, 3))
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("output", ["v", "x"])
def test_complete_imf_draws_intervals_and_trains_its_auxiliary_head_from_the_first_step(output):
    objective = IMF(guidance=[1, 8], flow_matching_first="3ba", noise_scale=2.0)
    model = model_of(objective, "mit", output=output).double()
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ids = torch.arange(64)
    batch = {"image": torch.randn(64, 2, 4, 4).double(), "label": ids % 3, "sample": ids, "step": 0 * ids}
    for first in (True, False):
        model.flow_matching = first
        model.net.zero_grad()
        loss = model(batch)
        loss.total.mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.net.parameters())
        assert loss.terms.keys() == ({"flow_matching"} if first else {"error", "error_v"})
    drawn = draw(batch["image"], ids % 3, 0 * ids, ids, 0, objective, model.net.config)
    (t, r), (start, end) = drawn.times, drawn.interval
    assert drawn.noise.std().item() == pytest.approx(2, rel=0.05)
    assert ((start[t == r] == 0) & (end[t == r] == 1)).all()
    drawn_ends = start[t != r], end[t != r]
    for found, low, high in zip(drawn_ends, (0, 0.5), (0.5, 1), strict=True):
        assert low < found.min() < low + 0.1
        assert high - 0.1 < found.max() < high
    expected = (
        drawn.velocity if output == "v" else (drawn.at(t) - drawn.x0) / t.clamp(min=0.05)[:, None, None, None]
    )
    torch.testing.assert_close(drawn.velocity_at(t), expected)


@pytest.mark.parametrize(
    "objective", [TVM(), MeanFlow(equal_share=1.0), IMF(equal_share=1.0), FlowMatching()]
)
def test_a_network_that_gives_the_image_itself_is_right_at_every_time(objective):
    """This holds below `t_floor`, too, by which output x divides at least."""
    x0, ids = torch.randn(64, 2, 4, 4).double(), torch.arange(64)
    drawn = draw(x0, 0 * ids, 0 * ids, ids, 0, objective, DiTConfig(output="x", t_floor=0.5, classes=1))
    assert (objective.flow_time(drawn.times) < 0.5).any()

    def net(x, t, d, label, beta=None, detach_tangent=False):
        x, t = (getattr(z, "value", z) for z in (x, t))
        value = (x - x0) / t.clamp(min=0.5)[:, None, None, None]
        return Dual(value, torch.zeros_like(value))

    terms = objective.loss(net, net, drawn).terms
    error = terms["error" if "error" in terms else "flow_matching"].value
    torch.testing.assert_close(error, torch.zeros_like(error))


def test_guidance_is_in_force_inside_the_interval_alone():
    objective = IMF(guidance=[1, 8])
    model = model_of(objective, "mit").double()
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x0, ids, t = (
        torch.randn(4, 2, 4, 4).double(),
        torch.arange(4),
        torch.tensor([0.1, 0.3, 0.5, 0.7]).double(),
    )
    ends = torch.full_like(t, 0.3), torch.full_like(t, 0.6)
    label, w = ids % 3, torch.full_like(t, 4.0)
    drawn = Draw(x0, torch.randn_like(x0), (t, t / 2), label, w, label, 3, ends)
    v_c, v_g = objective.velocities(model.net, drawn.at(t), drawn)
    guided = (v_g - drawn.velocity).abs().amax((1, 2, 3)) > 0
    assert guided.tolist() == [False, True, True, False]
    told = torch.tensor([1.0, 0.25, 0.25, 1.0]).double()
    want = model.net(drawn.at(t), t, 0 * t, label, told, head="v").value
    torch.testing.assert_close(v_c, want)


def test_output_x_allows_no_other_parameterisation_and_noise_has_its_scale(tmp_path):
    for source, target, message in (
        (TVM(guidance=2.0), IMF(guidance=2.0), "objective.scaled: with model.output x"),
        (IMF(noise_scale=2.0), IMF(), "objective.noise_scale: 1 here, 2 there"),
    ):
        trained = model_of(source, output="x")
        data = {"column": "image", "mean": [0.0, 0.0], "std": [1.0, 1.0]}
        facts = {"method": source.facts(), "data": data, "average": "ema", "step": 5}
        save_weights(tmp_path / "w", trained.net.state_dict(), trained.net.config, facts)
        given = [f"data.local={tmp_path}", f"init_from={tmp_path}/w"]
        config = load_config(TrainConfig, "yamls/digits.yaml", given)
        config.model, config.objective = trained.net.config, target
        with pytest.raises(ConfigError, match=message):
            begin(model_of(target, output="x"), config)
    config.model = model_of(IMF(), "mit").net.config
    with pytest.raises(ConfigError, match="model.network: mit here, dit there"):
        begin(model_of(IMF(), "mit"), config)


def test_weights_that_do_not_fit_are_one_error_with_all_differences(tmp_path):
    source = model_of(TVM(guidance=[1.0, 2.0]))
    data = {"column": "image", "mean": [0.5, 0.0], "std": [1.0, 1.0]}
    facts = {"method": source.objective.facts(), "data": data, "average": "ema", "step": 5}
    save_weights(tmp_path / "w", source.net.state_dict(), source.net.config, facts)
    config = load_config(
        TrainConfig, "yamls/digits.yaml", [f"data.local={tmp_path}", f"init_from={tmp_path}/w"]
    )
    config.model = DiTConfig(**{**asdict(source.net.config), "depth": 3, "norm": "layer"})
    config.objective = IMF(guidance=[1, 2])
    normalizer = model_of(config.objective, norm="layer").normalizer
    said = refusal(ConfigError, check_weights, config, manifest_of(config), normalizer, Folders())
    for part in (
        "model.depth: 3 here, 2 there",
        "model.norm",
        "data.normalize.mean",
        "objective.scaled",
        "init_from",
    ):
        assert part in said
    config.init_from = f"{tmp_path}/none"
    with pytest.raises(StorageError, match="none.json"):
        check_weights(config, manifest_of(config), model_of(config.objective).normalizer, Folders())


def test_the_objective_of_the_documentation_trains():
    objective = documented_objective()()
    net = small_network()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    ids, errors = torch.arange(64), []
    x0 = 0.6 * torch.randn(64, 1, 2, 2, dtype=torch.float64)
    for step in range(60):
        batch = draw(x0, 0 * ids, 0 * ids + step, ids, 0, objective, DiTConfig(classes=1))
        loss = objective.loss(net, None, batch, tangent_scale=min(1.0, step / 40))
        optimizer.zero_grad()
        loss.total.mean().backward()
        optimizer.step()
        errors.append(loss.terms["error"].value.mean().item())
    assert sum(errors[-10:]) / 10 < 0.7 * errors[0]
    assert sample(net, x0, Condition(0 * ids, 1.0, 1), 2, objective).shape == x0.shape


def disturbed(objective, network="dit"):
    """A network in float64 whose output is not zero, for labels 0 to 2 and 3 for none, and noise for it."""
    model = model_of(objective, network).double()
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.net, initial_noise(torch.arange(4), (2, 4, 4), torch.float64)


@pytest.mark.parametrize(
    ("objective", "network"),
    [
        *((objective, "dit") for objective in (FlowMatching(), *GUIDED)),
        (TVM(guidance=1.5), "mit"),
        (IMF(), "mit"),
    ],
    ids=lambda o: o if isinstance(o, str) else o.name,
)
def test_each_sample_is_guided_by_its_own_label_and_weight(objective, network):
    net, noise = disturbed(objective, network)
    label, w = torch.tensor([0, 3, 2, 3]), torch.tensor([2.0, 2.0, 1.5, 1.0])
    together = sample(net, noise, Condition(label, w, 3), 2, objective)
    alone = [
        sample(net, noise[i : i + 1], Condition(label[i : i + 1], w[i].item(), 3), 2, objective)
        for i in range(len(label))
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("objective", [FlowMatching(), *GUIDED], ids=lambda o: f"{o.name}")
def test_without_label_sampling_asks_for_what_training_has_shown(objective):
    """TVM trains "none" at w = 1 alone, iMF at every w; the others are not told w, or guide by nothing."""
    net, noise = disturbed(objective)
    label = torch.tensor([0, 3, 2, 3])
    guided, plain = (sample(net, noise, Condition(label, w, 3), 2, objective) for w in (2.0, 1.0))
    kept = isinstance(objective, IMF)
    assert torch.equal(guided[1::2], plain[1::2]) != kept
    assert torch.equal(guided[::2], plain[::2]) == isinstance(objective, MeanFlow)
    ids = torch.arange(200)
    x0 = torch.zeros(200, 2, 4, 4, dtype=torch.float64)
    trained = draw(x0, ids % 3, 0 * ids, ids, 0, objective, DiTConfig(classes=3))
    unlabelled = trained.label == 3
    assert unlabelled.any()
    assert torch.equal(trained.w, objective.guide(trained.w, unlabelled))  # the rule of both is one


def test_a_network_that_knows_no_classes_is_trained_and_sampled_at_w_1():
    ids = torch.arange(64)
    objective = TVM(guidance=[2.0, 3.0])
    batch = draw(torch.zeros(64, 1, 2, 2), 0 * ids, 0 * ids, ids, 0, objective, DiTConfig(classes=0))
    assert (batch.w == 1).all()


def begun(tmp_path, source, overrides=(), **mine):
    """The run's model with weights of the network of `source` put into it, and what was said."""
    data = {"column": "image", "mean": [0.0, 0.0], "std": [1.0, 1.0], "class_names": ["cat", "dog", "owl"]}
    facts = {"method": source.objective.facts(), "data": data, "average": "ema", "step": 5}
    save_weights(tmp_path / "w", source.net.state_dict(), source.net.config, facts)
    labels = np.arange(20) % 5
    if not (tmp_path / "data").exists():
        store(tmp_path / "data", np.zeros((20, 2, 4, 4), np.uint8), labels, ["owl", "x", "y", "cat", "z"])
    words = [f"data.local={tmp_path}/data", f"init_from={tmp_path}/w", *overrides]
    config = load_config(TrainConfig, "yamls/digits.yaml", words)
    model = model_of(source.objective, **mine)
    config.model, config.objective = model.net.config, source.objective
    return model, begin(model, config)


def test_other_data_of_weights_that_fit_is_said_by_name(tmp_path, caplog):
    source = model_of(TVM(guidance=1.25))
    names = ["cat", "dog", "owl"]
    data = {"column": "image", "mean": [0.0, 0.0], "std": [1.0, 1.0], "class_names": names}
    facts = {"method": source.objective.facts(), "data": data, "average": "ema", "step": 5}
    save_weights(tmp_path / "w", source.net.state_dict(), source.net.config, facts)
    store(tmp_path / "data", np.zeros((9, 2, 4, 4), np.uint8), np.arange(9) % 3, ["cat", "owl", "dog"])
    given = [f"data.local={tmp_path}/data", f"init_from={tmp_path}/w"]
    for words, told in (([], True), (["init_classes={owl: owl, dog: dog}"], False)):
        caplog.clear()
        config = load_config(TrainConfig, "yamls/digits.yaml", [*given, *words])
        config.model, config.objective = source.net.config, source.objective
        begin(source, config)
        said = "init_from: classes: 2 of 3 have another name, such as 'owl' here, 'dog' there. Fix where"
        assert (said in caplog.text) == told
    kl = {"name": "vae", "model": "some/kl", "hash": "1" * 16}
    other = {"name": "vae", "model": "other/kl", "hash": "2" * 16}
    manifest = SimpleNamespace(column="latents", encoder=kl, class_names=names)
    latents = {**data, "column": "latents"}
    assert other_data(manifest, {**latents, "encoder": kl}, True) == []
    assert other_data(manifest, {**latents, "encoder": {**other, "hash": None}}, True) == []
    (told,) = other_data(manifest, {**latents, "encoder": other}, True)
    assert told.startswith(f"autoencoder: some/kl ({'1' * 16}) here, other/kl ({'2' * 16}) there")
    assert other_data(manifest, data, True) == ["data: latents here, image there"]


def test_a_run_on_other_classes_takes_all_that_fits(tmp_path, caplog):
    source = model_of(TVM(guidance=1.25))
    with torch.no_grad():
        for p in source.net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    table = "y_embedder.embedding_table.weight"
    theirs = source.net.state_dict()
    model, said = begun(tmp_path, source, classes=5, size=8)
    assert said.endswith("new: 5 classes")
    assert (
        "init_from: model.classes: 5 here, 3 there" in caplog.text and "model.size: 8 here, 4" in caplog.text
    )
    for net in (model.net, model.ema, model.target):
        mine = net.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine if name != table)
        assert torch.equal(mine[table][5], theirs[table][3])
        assert not any((mine[table][:5] == row).all(1).any() for row in theirs[table])
    classes = ["init_classes={cat: cat, 0: 2, y: dog}"]
    model, said = begun(tmp_path, source, classes, classes=5)
    mine = model.net.state_dict()[table]
    assert said.endswith("new: 2 classes")
    assert torch.equal(mine[[3, 0, 2, 5]], theirs[table][[0, 2, 1, 3]])
    model, said = begun(tmp_path, source, classes=0)
    assert torch.equal(model.net.state_dict()[table][0], theirs[table][3])
    model, said = begun(tmp_path, source, patch=1)
    assert "final_layer.linear, x_embedder.proj" in said
    for wrong, message in (
        ("{lynx: cat}", "init_classes: 'lynx' is no class here: 0, 1, 2, 3, 4, owl"),
        ("{cat: 3}", "init_classes: 3 is no class in the weights: 0, 1, 2, cat, dog, owl$"),
    ):
        with pytest.raises(ConfigError, match=message):
            begun(tmp_path, source, [f"init_classes={wrong}"], classes=5)
    with pytest.raises(
        ConfigError, match=r"does not fit: model.depth: 3 here, 2 there; model.classes: 5 here"
    ):
        begun(tmp_path, source, classes=5, depth=3)
    with pytest.raises(ConfigError, match="^init_classes: names classes of init_from, which is not set$"):
        load_config(TrainConfig, "yamls/digits.yaml", ["init_classes={0: 1}"])


def test_a_class_is_named_by_a_text_and_numbered_by_a_number():
    """Classes named by numbers, the other way round: a text is a name first, a number never is."""
    here, there = (2, ["1", "0"]), (2, ["a", "b"])
    for given, rows in (({0: "a"}, {0: 0}), ({"0": "a"}, {1: 0}), ({"0": 1, 0: "b"}, {1: 1, 0: 1})):
        assert class_rows(given, here, there) == rows
