"""Metrics against closed forms, scipy and direct implementations; extractors; reference statistics."""

import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from eval.reference import doubts, open_images, shuffled
from eval.reference import main as reference_main
from recipe import reference
from recipe.features import Pixels, SmallImageClassifier, load_extractor
from recipe.metrics import (
    FeatureMoments,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
    resampled_distance,
)
from streaming_convert.__main__ import main as convert
from tests.conftest import store
from tests.test_convert import DISPLAY_P3, icc_profile


def samples(n, f, seed=0, rank=None):
    """Correlated features (n, f) around a mean that is not zero; of the given rank."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or f, f, generator=g, dtype=torch.float64)
    return torch.randn(n, rank or f, generator=g, dtype=torch.float64) @ mixing + seed + 0.5


def moments(features, batch=None):
    metric = FeatureMoments(features.shape[1])
    for part in features.split(batch or len(features)):
        metric.update(part)
    return metric.compute()


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize("batch", [1, 50, 64])
def test_moments_do_not_depend_on_the_batches(batch):
    x = samples(500, 32)
    for found, expected in zip(moments(x, batch), (x.mean(0), torch.cov(x.T)), strict=True):
        close(found, expected, 1e-9)
    y = samples(400, 32, seed=1)
    distances = [frechet_distance(*moments(x, b), *moments(y, b)) for b in (batch, None)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-9)


def test_merged_and_reset_moments():
    x = samples(100, 4)
    first, second = FeatureMoments(4), FeatureMoments(4)
    first.update(x[:30])
    second.update(x[30:])
    first.merge_state(second)
    close(first.compute()[1], torch.cov(x.T), 1e-12)
    first.reset()
    first.update(x[:10])
    close(first.compute()[0], x[:10].mean(0), 1e-12)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"expected \(N, 4\)"):
        FeatureMoments(4).update(torch.zeros(2, 5))
    for features, message in (
        (torch.zeros(1, 4), "at least 2 samples, got 1"),
        (torch.full((2, 4), torch.nan), "not finite"),
    ):
        metric = FeatureMoments(4)
        metric.update(features)
        with pytest.raises(ValueError, match=message):
            metric.compute()


RANK = """
import sys, torch
from recipe.metrics import FeatureMoments
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
metric = FeatureMoments(32)
for part in torch.load(f"{folder}/in{rank}.pt").split(7 + rank):
    metric.update(part)
torch.save(metric.compute(), f"{folder}/out{rank}.pt")
"""


def test_two_ranks_give_the_moments_of_one(tmp_path):
    x, other = samples(301, 32), moments(samples(300, 32, seed=1))
    ranks = []
    for rank, share in enumerate((x[:101], x[101:])):
        torch.save(share.clone(), tmp_path / f"in{rank}.pt")
        command = [sys.executable, "-c", RANK, str(rank), str(tmp_path)]
        ranks.append(subprocess.Popen(command, cwd=Path(__file__).parents[1]))
    assert [process.wait(120) for process in ranks] == [0, 0]
    expected = moments(x)
    for rank in range(2):
        found = torch.load(tmp_path / f"out{rank}.pt")
        close(found[0], expected[0], 1e-9)
        close(found[1], expected[1], 1e-9)
        distance = frechet_distance(*found, *other)
        assert distance == pytest.approx(frechet_distance(*expected, *other), rel=1e-9)


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_accumulation_costs_little_more_than_its_matrix_product():
    # A sweep's batch; of fewer rows the matrix's way through memory takes longest.
    n, f, batch = 6144, 2048, 256
    x = torch.rand(n, f, dtype=torch.float64)

    def seconds(work):
        start = time.process_time()  # other jobs on the machine do not count
        work()
        return time.process_time() - start

    pairs = [(seconds(lambda: moments(x, batch)), seconds(lambda: x.T @ x)) for _ in range(3)]
    ours, product = (min(times) for times in zip(*pairs, strict=True))
    print(f"\n{n} x {f} features in batches of {batch}: {ours:.3f} s, one matrix product {product:.3f} s")
    assert ours < 2 * product


# ---------------------------------------------------------------- Frechet distance


def test_frechet_distance_of_gaussians_in_closed_form():
    zero, eye = torch.zeros(5), torch.eye(5)
    assert frechet_distance(zero, eye, zero + 2, eye) == pytest.approx(20)
    a, b = torch.tensor([1.0, 2, 3, 4, 0]), torch.tensor([9.0, 1, 0, 4, 2])
    expected = float((a.sqrt() - b.sqrt()).square().double().sum())
    assert frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(expected, rel=1e-6)
    # Covariances that do not commute: for 2 x 2 matrices tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    p, q = (torch.cov(samples(20, 2, seed).T) for seed in (1, 2))
    root = float(torch.sqrt((p @ q).trace() + 2 * torch.sqrt(p.det() * q.det())))
    expected = float(p.trace() + q.trace()) - 2 * root
    assert frechet_distance(zero[:2], p, zero[:2], q) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "f", "rank"), [(400, 64, None), (1000, 256, None), (300, 64, 40)])
def test_frechet_distance_equals_scipys(n, f, rank):
    (m1, c1), (m2, c2) = (moments(samples(n, f, seed, rank)) for seed in (0, 1))
    ours = frechet_distance(m1, c1, m2, c2)
    product = c1.numpy() @ c2.numpy()
    if rank is not None:
        # sqrtm loses half the digits on singular input, so it gets the nonzero part: the spectrum of AB' B A'
        # is that of (B A')(A B').
        left, right = (np.linalg.svd(c.numpy())[0][:, :rank] for c in (c1, c2))
        a, b = left.T @ c1.numpy() @ left, right.T @ c2.numpy() @ right
        product = a @ (left.T @ right) @ b @ (right.T @ left)
    root = scipy.linalg.sqrtm(product)
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root).real
    assert ours == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_singular_covariances_is_accurate():
    # Fewer samples than features, twice the same: the distance is exactly 0.
    mean, covariance = moments(samples(50, 256))
    assert abs(frechet_distance(mean, covariance, mean, covariance)) < 1e-12 * float(covariance.trace())
    zero = torch.zeros(3, 3)
    assert frechet_distance(torch.zeros(3), zero, torch.ones(3), zero) == 3


def test_frechet_distance_refuses_what_it_cannot_mean():
    mean, cov = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"\(F,\), \(F, F\)"):
        frechet_distance(mean, cov, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(mean, cov, mean, cov * torch.nan)


# ---------------------------------------------------------------- other metrics


def test_kernel_distance_against_its_definition():
    x, y = samples(40, 6) / 4, samples(40, 6, seed=1) / 4

    def k(a, b):
        return (float(a @ b) / 6 + 1) ** 3

    n = len(x)
    same = sum(k(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    expected = same - 2 * sum(k(a, b) for a in x for b in y) / n**2
    # On subsets of all samples it is the estimator itself.
    assert kernel_distance(x, y, subset_size=n)[0] == pytest.approx(expected, rel=1e-9)
    spread = kernel_distance(x, y, subset_size=10)
    assert spread == kernel_distance(x, y, subset_size=10)
    assert spread != kernel_distance(x, y, subset_size=10, seed=1)
    with pytest.raises(ValueError, match="subset_size 41 exceeds the number of samples, 40"):
        kernel_distance(x, y, subset_size=41)


def test_inception_score_against_its_definition():
    logits = samples(60, 5)

    def score(part):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        return np.exp((p * np.log(p / p.mean(0))).sum(1).mean())

    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    scores = [score(part.numpy()) for part in logits[order].chunk(10)]
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
    certain = 100 * torch.eye(10).repeat(6, 1)
    assert 1 < inception_score(certain)[0] <= 10
    with pytest.raises(ValueError, match="at least 10 samples, got 9"):
        inception_score(logits[:9])


@pytest.mark.parametrize("rows", [7, 1000])
def test_precision_recall_against_a_direct_implementation(monkeypatch, rows):
    monkeypatch.setattr("recipe.metrics.ROWS", rows)
    x, y = samples(60, 3), 0.5 * samples(80, 3, seed=1)

    def inside(points, support, k):
        def reaches(s):
            return sorted(float((s - o).norm()) for o in support)[k]

        radii = [reaches(s) for s in support]
        hits = [any(float((p - s).norm()) <= r for s, r in zip(support, radii, strict=True)) for p in points]
        return sum(hits) / len(hits)

    expected = inside(x, y, 3), inside(y, x, 3)
    assert min(expected) > 0 and max(expected) < 1
    assert precision_recall(x, y) == expected
    assert precision_recall(x, x) == (1, 1)
    with pytest.raises(ValueError, match="more than 3 samples, got 3 and 80"):
        precision_recall(x[:3], y)


@pytest.mark.parametrize("rows", [7, 80])
def test_the_nearest_is_found_in_any_blocks(monkeypatch, rows):
    monkeypatch.setattr("recipe.metrics.ROWS", rows)
    x, y = samples(60, 3), samples(80, 3, seed=1)
    distances, index = nearest(x, y)
    every = [[float((a - b).norm()) for b in y] for a in x]
    assert index.tolist() == [row.index(min(row)) for row in every]
    assert len(set((index // 7).tolist())) > 3  # they lie in many of the blocks
    close(distances, torch.tensor([min(row) for row in every], dtype=torch.float64), 1e-9)


def test_distances_at_equal_numbers_equal_an_independent_resampling():
    x, y = samples(60, 4), samples(90, 4, seed=1)

    def scipys(a, b):
        root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        traces = np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + traces

    # Of all rows nothing is left to chance.
    whole = scipys(x.numpy(), y[:60].numpy())
    assert resampled_distance(x, y[:60], 60, 2, seed=0)[0] == pytest.approx(whole, rel=1e-6)
    rng, draws, z = np.random.default_rng(0), 400, x.numpy()
    apart = [scipys(*(rng.permutation(rows)[:20] for rows in (z, y.numpy()))) for _ in range(draws)]
    within = [scipys(*np.split(rng.permutation(z)[:40], 2)) for _ in range(draws)]
    for other, drawn in ((y, apart), (None, within)):
        mean, std = resampled_distance(x, other, 20, draws, seed=1)
        assert mean == pytest.approx(np.mean(drawn), abs=5 * np.std(drawn) * (2 / draws) ** 0.5)
        assert std == pytest.approx(np.std(drawn), rel=0.2)
    assert np.mean(apart) > whole  # fewer samples, larger distances


def test_global_random_state_is_left_alone():
    x = samples(40, 4)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    kernel_distance(x, x, subset_size=10)
    inception_score(x)
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------- extractors


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor(data.images * 255 / 16).round().to(torch.uint8)[:, None]
    return images, torch.tensor(data.target)


@pytest.fixture
def brief(monkeypatch):
    """Classifiers of few features, trained for a moment."""
    monkeypatch.setattr("recipe.features.EPOCHS", 4)
    monkeypatch.setattr("recipe.features.NUM_FEATURES", 16)


@pytest.fixture(scope="module")
def classifier(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "digits"
    return SmallImageClassifier.train(*digits, seed=0, path=path), path


def test_digits_classifier_is_accurate_and_deterministic(digits, classifier):
    images, labels = digits
    trained, _ = classifier
    assert trained.accuracy >= 0.99
    assert float((trained.logits(images).argmax(1) == labels).double().mean()) >= trained.accuracy
    features = trained(images)
    assert features.shape == (1797, 64) and features.dtype == torch.float64
    torch.testing.assert_close(trained(images[5:6]), features[5:6], rtol=0, atol=1e-12)
    small = [SmallImageClassifier.train(images[:200], labels[:200], seed=3) for _ in range(2)]
    assert torch.equal(small[0](images), small[1](images))


def test_digits_classifier_separates_kinds_of_data(digits, classifier):
    images, _ = digits
    trained, _ = classifier
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, second = images[order[:898]], images[order[898:]]
    noise = torch.randint(0, 40, second.shape, generator=torch.Generator().manual_seed(0))
    noisy = (second.int() + noise).clamp(0, 255).to(torch.uint8)
    real, halves, worse = (moments(trained(x)) for x in (first, second, noisy))
    assert frechet_distance(*worse, *real) > 1.5 * frechet_distance(*halves, *real)


@pytest.mark.usefixtures("brief")
def test_classifier_is_cached_until_something_changes(digits, monkeypatch, tmp_path):
    images, labels = digits[0][:100], digits[1][:100]
    path = tmp_path / "folder" / "c"
    first = SmallImageClassifier.train(images, labels, path=path)
    with mock.patch("recipe.features._fit", side_effect=AssertionError("trained again")):
        again = SmallImageClassifier.train(images, labels, path=path)
        assert torch.equal(again(images), first(images)) and again.accuracy == first.accuracy
        for other in ({"seed": 1}, {"labels": labels.flip(0)}):
            with pytest.raises(AssertionError, match="trained again"):
                SmallImageClassifier.train(**{"images": images, "labels": labels, "path": path} | other)
        monkeypatch.setattr("recipe.features.EPOCHS", 5)
        with pytest.raises(AssertionError, match="trained again"):
            SmallImageClassifier.train(images, labels, path=path)
    loaded = load_extractor("classifier", str(path))
    assert torch.equal(loaded(images), first(images))


@pytest.mark.usefixtures("brief")
def test_classifier_takes_small_colour_images():
    images = torch.randint(
        0, 256, (40, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(40) % 4
    images[labels == 0] //= 4
    trained = SmallImageClassifier.train(images, labels)
    assert trained(images).shape == (40, 16) and trained.logits(images).shape == (40, 4)
    gives_gradients(trained, images)
    with pytest.raises(ValueError, match=r"uint8 images \(N, C, H, W\)"):
        trained(images.float())
    with pytest.raises(ValueError, match="20x20"):
        trained(images[:, :, :8, :8])
    with pytest.raises(ValueError, match="square"):
        SmallImageClassifier.train(images[:, :, :8], labels)


def test_dinov2_reads_a_folder_of_weights(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    extractor = load_extractor("dinov2-vitl14", str(tmp_path))
    images = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        expected = model((images / 255 - mean) / std).last_hidden_state[:, 0]
    features = extractor(images)
    assert features.dtype == torch.float64 and features.shape == (3, extractor.num_features)
    close(features.float(), expected, 1e-4)
    assert extractor(images[:, :1, :40, :40]).shape == (3, 32)


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
MODELS = {
    "Clip": ("CLIPVisionConfig", "CLIPVisionModel", VISION),
    "SigLIP": ("SiglipVisionConfig", "SiglipVisionModel", VISION),
    "MAE": ("ViTMAEConfig", "ViTMAEModel", VISION),
    "ConvNeXt": ("ConvNextConfig", "ConvNextModel", {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_image_models_of_a_folder_give_features_and_their_gradients(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    config, model, options = MODELS[name]
    getattr(transformers, model)(getattr(transformers, config)(**options)).save_pretrained(tmp_path)
    extractor = load_extractor("image-model", str(tmp_path))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features = extractor(images)
    assert features.dtype == torch.float64 and features.shape == (3, extractor.num_features)
    assert torch.equal(extractor(images), features)
    gives_gradients(extractor, images)


def gives_gradients(extractor, images):
    """Pixels as floats have the features of uint8 ones, and a gradient that finite differences confirm."""
    pixels = images.double().requires_grad_()
    features, _ = extractor.forward(pixels)
    close(features.detach(), extractor(images).clone(), 1e-5)
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((features * direction).sum(), pixels)
    step = 0.5 * gradient / gradient.abs().max()
    with torch.no_grad():
        up, down = ((extractor.forward(pixels + sign * step)[0] * direction).sum() for sign in (1, -1))
    assert ((up - down) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=0.05)


def test_pixels_are_averaged_over_squares():
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    extractor = Pixels((3, 8, 8), 4)
    assert extractor.num_features == 12
    expected = images.double().reshape(5, 3, 2, 4, 2, 4).mean((3, 5)).flatten(1) / 32
    close(extractor(images), expected, 1e-12)
    gives_gradients(extractor, images)
    for shape, pool in (((3, 8, 8), 3), ((3, 64, 64), 1)):
        with pytest.raises(ValueError, match="pixels: squares of"):
            Pixels(shape, pool)


def test_inception_reads_weights_by_path(tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    graph = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch.object(graph, "load_state_dict", lambda *_: None),
    ):
        untrained = graph("untrained", ["2048"])
    torch.save(untrained.state_dict(), tmp_path / "inception.pth")
    extractor = load_extractor("inception-2015", str(tmp_path / "inception.pth"))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features, logits = extractor.features_and_logits(images)
    assert features.shape == (2, 2048) and features.dtype == torch.float64 and logits.shape == (2, 1008)
    close(features, untrained(images)[0].double(), 1e-6)
    gives_gradients(extractor, images)

    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ValueError, match="hostile.pth: not a file of tensors"):
        load_extractor("inception-2015", str(tmp_path / "hostile.pth"))
    assert not Trap.sprung


class Trap:
    """Notices being unpickled by anything but a restricted reader."""

    sprung = False

    def __reduce__(self):
        return Trap.spring, ()

    @staticmethod
    def spring():
        Trap.sprung = True


def test_absent_extractors_and_weights_are_named():
    with pytest.raises(
        ValueError, match="'fid' is not one of inception-2015, dinov2-vitl14, image-model, classifier"
    ):
        load_extractor("fid")
    for name in ("dinov2-vitl14", "classifier"):
        with pytest.raises(FileNotFoundError, match="/absent"):
            load_extractor(name, "/absent")


def coloured(n, structured):
    """n images (3, 8, 8) whose class, one of two, is their colour: with a bright square in them, or noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    images = rng.integers(60, 100, (n, 3, 8, 8))
    images[np.arange(n), 2 * labels] += 100
    if structured:
        for image, (top, left) in zip(images, rng.integers(0, 5, (n, 2)), strict=True):
            image[:, top : top + 3, left : left + 3] += 50
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


def striped(n):
    """n images (3, 8, 8) of any colour whose class is whether their stripes lie or stand."""
    rng = np.random.default_rng(0)
    labels, stripes = np.arange(n) % 2, np.arange(8) // 2 % 2 * 100
    images = np.array([np.tile(stripes, (8, 1)) if label else np.tile(stripes, (8, 1)).T for label in labels])
    images = images[:, None] + rng.integers(0, 100, (n, 3, 1, 1)) + rng.integers(0, 50, (n, 3, 8, 8))
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


@pytest.mark.usefixtures("brief")
def test_a_classifier_that_noise_of_the_right_colours_would_fool_is_not_trusted():
    images, labels = coloured(400, structured=True)
    classifier = SmallImageClassifier.train(images, labels)
    noise, asked = coloured(200, structured=False)
    agreement = float((classifier.logits(noise).argmax(1) == asked).double().mean())
    assert classifier.accuracy > 0.95 and agreement > 0.95
    (said,) = doubts(classifier, images, labels, 400)
    assert "of the real images from their colours alone" in said and "noise of the right colours" in said
    images, labels = striped(400)
    classifier = SmallImageClassifier.train(images, labels)
    assert classifier.accuracy > 0.95
    assert doubts(classifier, images, labels, 400) == []


@pytest.mark.usefixtures("brief")
def test_a_classifier_of_too_little_is_not_trusted():
    images, labels = striped(400)
    blind = SmallImageClassifier.train(
        images, torch.randint(2, (400,), generator=torch.Generator().manual_seed(0))
    )
    said = doubts(blind, images, labels, 400)
    assert any("to name the largest class always is right about 0.500" in doubt for doubt in said)
    classifier = SmallImageClassifier.train(images, labels)
    said = doubts(classifier, images[:18], labels[:18], 18)
    assert said == [
        "18 real images are few for 16 features: distances are mostly chance.",
        "The smallest class has about 9 real images, too few to learn from.",
    ]
    assert doubts(classifier, images, 0 * labels, 400) == [
        "The reference has one class only, so the classifier has learned nothing."
    ]
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    said = doubts(classifier, images, shuffled, 400)
    assert any(doubt.endswith("is of another class; by chance it would be 0.500.") for doubt in said)


def test_shuffled_images_keep_their_colours_and_nothing_else():
    images = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    found = shuffled(images)
    assert not torch.equal(found, images)
    for before, after in zip(images.flatten(2), found.flatten(2), strict=True):
        assert sorted(before.T.tolist()) == sorted(after.T.tolist())


def test_the_digits_classifier_is_trusted(digits, classifier):
    assert doubts(classifier[0], *digits, 1797) == []


# ---------------------------------------------------------------- reference statistics


@pytest.mark.usefixtures("brief")
def test_command_prints_the_distance_of_two_sets(tmp_path, capsys):
    """Folders, datasets and files of statistics, on either side."""
    images, labels = striped(120)
    network = SmallImageClassifier.train(images, labels, path=tmp_path / "classifier")
    for name, part in (("a", images[:70]), ("b", images[70:])):
        (tmp_path / name).mkdir()
        for i, image in enumerate(part):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03}.png")
    sides = [network(part).numpy() for part in (images[:70], images[70:])]
    mean, covariance = zip(*((x.mean(0), np.cov(x, rowvar=False)) for x in sides), strict=True)
    roots = np.linalg.eigvals(covariance[0] @ covariance[1]).real.clip(0) ** 0.5
    expected = ((mean[0] - mean[1]) ** 2).sum() + np.trace(covariance[0] + covariance[1]) - 2 * roots.sum()
    a, b, file = (str(tmp_path / name) for name in ("a", "b", "b.npz"))
    options = ["--extractor", "classifier", "--weights", str(tmp_path / "classifier"), "--device", "cpu"]
    assert reference_main([b, *options, "--out", file]) == 0
    for pair in ((a, b), (a, file), (file, a)):
        capsys.readouterr()
        assert reference_main([pair[0], "--against", pair[1], *options]) == 0
        said = capsys.readouterr().out
        assert float(said.split()[2].rstrip(",")) == pytest.approx(expected, rel=1e-4, abs=2e-6)
        assert f"{a} (70 images)" in said
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert reference_main([a, "--against", str(tmp_path / "other.npz"), *options]) == 1
    assert "other.npz is of 3 features, extractor classifier has 16" in capsys.readouterr().err
    (tmp_path / "few").mkdir()
    for i in range(3):
        shutil.copy(tmp_path / f"a/{i:03}.png", tmp_path / "few")
    assert reference_main([str(tmp_path / "few"), "--against", file, *options]) == 0
    assert "few holds 3 images, too few for the covariance of 16 features" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reference_main([a, *options])
    assert "give --out FILE.npz, --against OTHER or both" in capsys.readouterr().err


def test_command_measures_a_dataset_folder(digits, classifier, tmp_path, capsys):
    images, labels = digits
    store(tmp_path / "mds", images[:333].numpy(), labels[:333].numpy(), "0123456789", shard_samples=200)
    out = tmp_path / "stats.npz"
    trained, path = classifier
    arguments = ["--extractor", "classifier", "--weights", str(path), "--out", str(out), "--batch-size", "50"]
    assert reference_main([str(tmp_path / "mds"), *arguments]) == 0
    for found, expected in zip(reference.read_statistics(out), moments(trained(images[:333])), strict=True):
        close(found, expected, 1e-9)
    assert int(np.load(out)["num_samples"]) == 333

    assert reference_main([str(tmp_path / "absent"), *arguments]) == 1
    assert "absent: no such folder" in capsys.readouterr().err


def test_image_folders_are_read_whole(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "b").mkdir()
    for name, array in zip(("a.png", "b/1.png", "b/2.png"), pixels, strict=True):
        Image.fromarray(array).save(tmp_path / name)
    images = open_images(tmp_path)
    assert torch.equal(torch.stack(list(images)), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    Image.fromarray(pixels[0, :4]).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png: is 8x4 pixels, the first image is 8x8"):
        list(open_images(tmp_path))
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"c\.png: not a readable image"):
        list(open_images(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .jpg, .jpeg, .png, .webp files"):
        open_images(tmp_path / "empty")


def test_a_plain_folder_has_the_pixels_of_its_conversion(tmp_path, capsys):
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    image, exif = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    deep = Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16))
    seen = image.copy()
    seen.putalpha(Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)))
    folder.mkdir()
    deep.save(folder / "deep.png")
    seen.save(folder / "transparent.png")
    image.save(folder / "rotated.jpg", exif=exif, quality=95)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.quantize(16).save(folder / "palette.png", transparency=3)
    image.save(folder / "wide.png", icc_profile=icc_profile(DISPLAY_P3, 2.2))
    image.save(folder / "damaged.png", icc_profile=b"no profile")
    moving = {"save_all": True, "append_images": [image.rotate(90)], "duration": 100}
    image.save(folder / "moving.webp", lossless=True, **moving)
    image.save(folder / "moving.png", **moving)
    assert (
        convert(["images", str(folder), "--size", "16", "--unlabelled", "--out", str(tmp_path / "out")]) == 0
    )
    printed = capsys.readouterr().out
    assert "2 pictures: animated, the first frame was taken" in printed
    assert "1 pictures: its ICC profile is damaged: the colours were taken for sRGB" in printed
    files, stored = open_images(folder), open_images(tmp_path / "out/train")
    assert len(files) == len(stored) == 9
    for name, here, there in zip(files.names, files, stored, strict=True):
        assert torch.equal(here, there), name
    written = dict(zip(files.names, files, strict=True))
    levels = np.rint(np.asarray(deep) / 257)
    assert np.array_equal(written["deep.png"], np.broadcast_to(levels, (3, 16, 16)))
    plain = np.asarray(image).transpose(2, 0, 1)
    for name in ("damaged.png", "moving.webp", "moving.png"):
        assert np.array_equal(written[name], plain), name
    unturned = np.asarray(Image.open(folder / "rotated.jpg")).transpose(2, 0, 1)
    assert np.array_equal(written["rotated.jpg"], np.rot90(unturned, -1, (1, 2)))
    said = capsys.readouterr().out
    assert f"{folder}/moving.png: animated, the first frame was taken" in said


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_dataset_folders_are_read_without_shared_memory(tmp_path, compression):
    def shared_memory():
        return Path("/proc/self/maps").read_text().count("/dev/shm/")

    pixels = np.random.default_rng(0).integers(0, 256, (7, 1, 4, 4), dtype=np.uint8)
    store(tmp_path, pixels, compression=compression, shard_samples=3)
    before = shared_memory()
    for _ in range(2):
        images = open_images(tmp_path)
        assert np.array_equal([images[i] for i in range(len(images))], pixels)
    assert shared_memory() == before
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(index.replace("shard.00001", "../shard.00001"))
    with pytest.raises(ValueError, match="names a file that is not a shard of its folder"):
        open_images(tmp_path)


def published(mean, covariance):
    """The layouts in which others publish a mean and covariance of 100 samples."""
    pair = {"mu": mean, "sigma": covariance}
    second = covariance + np.outer(mean, mean)
    sums = {"capture_all": False, "num_items": 100, "raw_mean": 100 * mean, "raw_cov": 100 * second}
    return pair, {"fid": pair, "fd_dinov2": {}}, sums


@pytest.mark.parametrize("layout", range(3))
def test_published_statistics_are_read_without_unpickling(tmp_path, layout):
    mean, covariance = (x.numpy() for x in moments(samples(100, 5)))
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps(published(mean, covariance)[layout], protocol=4))
    with (
        mock.patch("pickle.loads", side_effect=AssertionError),
        mock.patch("pickle.load", side_effect=AssertionError),
    ):
        found = reference.read_statistics(path)
    close(found[0], torch.from_numpy(mean), 1e-12)
    close(found[1], torch.from_numpy(covariance), 1e-12)


def test_npz_statistics(tmp_path):
    path = tmp_path / "stats.npz"
    mean, covariance = np.arange(3.0, dtype=np.float32), np.asfortranarray(np.arange(9.0).reshape(3, 3))
    np.savez(path, mu=mean, sigma=covariance, arr_0=np.zeros((2, 2)))
    found = reference.read_statistics(path)
    assert found[0].dtype == torch.float64
    assert np.array_equal(found[1], covariance)


def test_damaged_statistics_are_refused(tmp_path):
    eye = np.eye(3)
    objects = np.array([Trap()], dtype=object)
    for arrays, message in [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(4), "sigma": eye}, r"expected \(F,\) and \(F, F\)"),
        ({"mu": np.full(3, np.nan), "sigma": eye}, "not finite"),
        ({"mu": objects, "sigma": eye}, "allow_pickle"),
        ({"mu": np.zeros(3, np.int8), "sigma": eye}, "not float32 or float64"),
    ]:
        np.savez(tmp_path / "s.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            reference.read_statistics(tmp_path / "s.npz")
    for content, message in [
        ({"mu": np.zeros(3, int), "sigma": eye}, "little-endian float"),
        ({"mu": [0, 0], "sigma": eye}, "not a numpy array"),
        ({"mean": np.zeros(3)}, "neither"),
        ({"mu": Trap(), "sigma": eye}, "refused global"),
        ({"raw_mean": np.zeros(4), "raw_cov": eye, "num_items": 3}, "belong together"),
        ({"raw_mean": np.zeros(3), "raw_cov": eye, "num_items": 2**2000}, "neither"),
    ]:
        (tmp_path / "s.pkl").write_bytes(pickle.dumps(content, protocol=4))
        with pytest.raises(ValueError, match=message) as error:
            reference.read_statistics(tmp_path / "s.pkl")
        assert "s.pkl" in str(error.value)
    assert not Trap.sprung
    with pytest.raises(ValueError, match=r"\.npz or \.pkl"):
        reference.read_statistics(tmp_path / "s.json")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    suffix=st.sampled_from(["npz", "pkl"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    share=st.floats(0, 1),
)
def test_mutated_statistics_give_moments_or_one_error(tmp_path_factory, suffix, edits, share):
    folder = Path(tmp_path_factory.getbasetemp())
    path = folder / f"mutated.{suffix}"
    pair = {"mu": np.zeros(3), "sigma": np.eye(3)}
    if suffix == "npz":
        np.savez(path, **pair)
    else:
        path.write_bytes(pickle.dumps(pair, protocol=4))
    data = bytearray(path.read_bytes())
    for at, value in edits:
        data[int(at * (len(data) - 1))] = value
    path.write_bytes(data[: int(share * len(data))] if share < 0.5 else data)
    try:
        mean, covariance = reference.read_statistics(path)
    except ValueError as error:
        assert path.name in str(error)
    else:
        assert covariance.shape == (len(mean), len(mean))
