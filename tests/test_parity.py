"""The published method's golden numbers (tests/data: a case, the time map, the initialisation)."""

import json
from pathlib import Path

import pytest
import torch

from recipe.dit import DiT, DiTConfig
from tests.parity import Table, check_folder, dit_config

DATA = Path(__file__).parent / "data"


def test_network_loss_gradients_training_and_sampler_agree_with_the_golden_data():
    table = check_folder(DATA)
    assert not table.failed, str(table)
    assert len(table.rows) > 100


def test_meanflow_imf_and_imported_sit_agree_with_the_golden_data():
    table = check_folder(DATA / "objectives")
    assert not table.failed, str(table)
    assert len(table.rows) == 13 + 13 + 13 + 2


def test_imported_imf_and_pmf_agree_with_the_golden_data():
    table = check_folder(DATA / "mit")
    assert not table.failed, str(table)
    assert len(table.rows) == 2 * (2 + 9 + 2 + 3) + 163  # of them gradients


def test_the_table_reports_what_is_wrong():
    table = Table()
    table.check("off by 1e-8", torch.tensor([1.0, 2.0 + 2e-8], dtype=torch.float64), torch.tensor([1.0, 2.0]))
    table.check("not finite", torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]))
    assert [row[0] for row in table.failed] == ["off by 1e-8", "not finite"]


@pytest.mark.parametrize("time_init", ["normal", "spectral"])
def test_initialisation_has_the_golden_statistics(time_init):
    golden = json.loads((DATA / "init_stats.json").read_text())
    sizes = golden["config"]
    stats = golden["stats"][f"time_specinit={time_init == 'spectral'}"]
    torch.manual_seed(0)
    state = DiT(dit_config(sizes, time_init=time_init, patch_init="xavier")).state_dict()
    for name, want in stats.items():
        weight = state[name.removeprefix("model.")]
        assert list(weight.shape) == want["shape"], name
        if want["const"] is not None:
            assert (weight == want["const"]).all(), name
            continue
        assert weight.std().item() == pytest.approx(want["std"], rel=0.06), name
        top = torch.linalg.matrix_norm(weight.flatten(1), ord=2).item()
        low, high = want["top"]
        assert 0.93 * low <= top <= 1.07 * high, name


def test_patch_embedding_has_spectral_norm_one_by_default():
    torch.manual_seed(0)
    weight = DiT(DiTConfig(size=8, width=64, depth=1, heads=2, classes=3)).x_embedder.proj.weight
    assert torch.linalg.matrix_norm(weight.flatten(1), ord=2).item() == pytest.approx(1, abs=1e-5)
