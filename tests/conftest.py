"""Shared fixtures: the real digits as a dataset, and a short training run on them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"

import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
TINY = ["model.width=16", "model.depth=1", "model.heads=2", "data.batch_size=16", "log.progress_bar=false"]


def run(*command, check=True, env=None):
    """Run a command of the project from its root; returns the completed process with its output as text."""
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check and process.returncode:
        raise AssertionError(
            f"{command} exited with {process.returncode}\n{process.stdout}\n{process.stderr}"
        )
    return process


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits converted by the project's own converter."""
    folder = tmp_path_factory.mktemp("digits")
    run("-m", "streaming_convert", "digits", "--out", folder)
    return folder / "train"


@pytest.fixture(scope="session")
def tiny_run(digits, tmp_path_factory):
    """Folder of a finished 8-step run with exports of both averages at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    run(
        *("recipe/train.py", "yamls/digits.yaml", f"folder={folder}", f"data.local={digits}", *TINY),
        *("duration=8ba", "save_interval=4ba", "export_interval=4ba", "export=[ema,net]", "log.interval=1"),
    )
    return folder
