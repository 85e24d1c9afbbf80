"""Every objective's whole step on a GPU that is not there: no tensor on another device or of another type."""

import json
import shutil

import pytest

from tests.conftest import OFFICIAL, run


@pytest.mark.skipif(
    not OFFICIAL,
    reason="from torch 2.8 on, autograd takes CUDA tensors only where CUDA is there (pytorch issue 161129)",
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="autograd asks for a device that C++ has to pretend")
@pytest.mark.parametrize("how", ["plain", "fsdp2"])
def test_a_whole_step_of_every_objective_runs_on_fake_tensors_of_a_gpu(tmp_path, how):
    """Sharded only under bf16: without it there is one type alone, as in a plain run."""
    run("tests/rehearsal.py", how, tmp_path / "said.json")
    said = json.loads((tmp_path / "said.json").read_text())
    assert len(said) == (16 if how == "plain" else 8)
    for case, trouble in said.items():
        if case.startswith("mixed"):
            assert "two different devices" in trouble
        else:
            assert not trouble, f"{case}: {trouble}"
