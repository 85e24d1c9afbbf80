"""Sample grids, throughput and losses by time, in one short run on the digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import Callback
from PIL import Image

from recipe.callbacks import SampleGrid, quarter_sums
from recipe.config import ConfigError, GridConfig, TrainConfig, load_config
from recipe.generator import Generator
from recipe.normalizer import Normalizer
from recipe.pictures import grid, to_pixels
from recipe.plan import step_flops
from recipe.preemption import Preemption
from recipe.train import build_trainer
from tests.conftest import TINY, findings

LABELS, COLUMNS = [3, 1, 10], 4
OPTIONS = ["duration=4ba", "log.interval=2", "log.peak_tflops=2", "microbatch=4", "grid.interval=2ba"]
OPTIONS += [f"grid.labels={LABELS}", f"grid.columns={COLUMNS}", "grid.nfe=[1,2]"]


class Terms(Callback):
    """Times and losses of the last two batches, as the training step drew them."""

    def __init__(self):
        self.rows = []

    def after_loss(self, state, logger):
        if int(state.timestamp.batch) >= 2:
            terms = state.outputs.terms
            columns = [x for name in ("flow_matching", "terminal") for x in terms[name][::-1]]
            self.rows.append(torch.stack(columns, 1))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A finished run of four batches of 16: its configuration, folder, last line of the log, and terms."""
    folder = tmp_path_factory.mktemp("callbacks")
    overrides = [f"data.local={digits}", f"folder={folder}", *TINY, *OPTIONS]
    config = load_config(TrainConfig, "yamls/digits.yaml", overrides)
    trainer, terms = build_trainer(config, findings(config), None, Preemption(None)), Terms()
    trainer.state.callbacks.append(terms)
    trainer.fit()
    trainer.close()
    row = json.loads((folder / "train.jsonl").read_text().splitlines()[-1])
    return config, folder, row, torch.cat(terms.rows).numpy()


def test_grids_show_what_the_exported_average_draws(trained):
    _, folder, _, _ = trained
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == [f"ba000000{step}-nfe{n}.png" for step in (2, 4) for n in (1, 2)]
    label = torch.tensor(LABELS).repeat_interleave(COLUMNS)
    for nfe in (1, 2):
        images = Generator(folder / "weights/ba0000004-ema")(label, torch.arange(len(label)), nfe, 1.25)
        drawn = np.asarray(Image.open(folder / f"samples/ba0000004-nfe{nfe}.png"))
        assert np.array_equal(drawn, grid(images, COLUMNS))


def test_throughput_and_mfu_go_by_the_planned_flops(trained):
    config, _, row, _ = trained
    rate = row["throughput/samples_per_sec"]
    assert rate > 0
    flops = step_flops(config.model, config.objective) * rate
    assert row["throughput/flops_per_sec"] == pytest.approx(flops, rel=1e-5)
    assert row["throughput/device/mfu"] == pytest.approx(flops / 2e12, rel=1e-5)


def test_losses_by_time_are_the_means_of_the_samples_in_each_quarter(trained):
    _, _, row, terms = trained
    assert len(terms) == 2 * 16
    for name, time, loss in (("flow_matching", *terms[:, :2].T), ("terminal", *terms[:, 2:].T)):
        for low in (0, 0.25, 0.5, 0.75):
            inside = (time >= low) & (time < low + 0.25)
            logged = row.get(f"loss/{name}/{low:g}-{low + 0.25:g}")
            if inside.any():
                assert logged == pytest.approx(loss[inside].mean(), rel=1e-5)
            else:
                assert logged is None


def test_a_loss_that_is_not_finite_spoils_its_own_quarter_alone():
    total, count = quarter_sums(torch.tensor([0.1, 0.3, 0.9, 1.0]), torch.tensor([1.0, torch.nan, 2.0, 3.0]))
    assert count.tolist() == [1, 1, 0, 2]
    assert total.isnan().tolist() == [False, True, False, False]
    assert total[3] == 5


class HalvingVAE(torch.nn.Module):
    """Decodes latents of one channel to three, at twice the side; in [-1, 1] like a diffusers model."""

    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, z):
        class Output:
            sample = (z / 2).expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3)

        return Output


def test_latents_are_decoded_or_shown_in_false_colours():
    x0 = torch.tensor([0.0, 1.0, -3.0, 1.0]).reshape(1, 4, 1, 1)
    plain = to_pixels(x0, Normalizer([5.0] * 4, [2.0] * 4), "latents", None)
    assert plain.flatten().tolist() == [128, 191, 0]
    decoded = to_pixels(torch.full((2, 1, 1, 1), 0.5), Normalizer([0.0], [2.0]), "latents", HalvingVAE())
    assert decoded.shape == (2, 3, 2, 2)
    assert decoded.unique().tolist() == [191]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid.nfe=[0]", r"grid.nfe\[0\]: 0 must be"),
        ("grid.labels=[11]", r"grid.labels: \[11\] must be in 0..10"),
        ("grid.columns=0", "grid.columns: 0"),
        ("log.interval=0", "log.interval: 0"),
    ],
)
def test_a_bad_grid_is_an_error_that_names_its_key(digits, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, "yamls/digits.yaml", [f"data.local={digits}", override])


def test_an_autoencoder_that_cannot_be_loaded_is_an_error_before_training():
    with pytest.raises(ConfigError, match="grid.vae: "):
        SampleGrid("nowhere", GridConfig(vae=str(Path("no") / "such" / "folder")), "latents", owner=None)
