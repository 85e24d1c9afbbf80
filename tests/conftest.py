"""Shared fixtures: the real digits as a dataset, and a short training run on them."""

import math
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from recipe.checkpoints import Resumable
from recipe.config import TrainConfig, load_config
from recipe.dit import DiT
from recipe.features import Pixels
from recipe.objectives.frechet import Frechet, Match
from recipe.preflight import Findings, check_data
from recipe.warm_start import check_weights, warm_start
from recipe.weights import save_weights
from storage import Folders
from storage.manifest import Manifest, read_manifest
from streaming_convert import writer
from streaming_convert.encoders import Stored
from streaming_convert.sources import Source
from tests import program

torch.set_num_threads(1)
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1.0  # how long a collected loader waits for each worker
ROOT = Path(__file__).parent.parent
OFFICIAL = torch.__version__.startswith("2.7.")  # the stack of constraints.txt, not of constraints-next.txt
DIGITS = load_digits()
NAMES = ["", "one", "due", "trois", "vier", "five", "šest", "sieben (seven)", "八", "nine"]
TINY = ["model.width=16", "model.depth=1", "model.heads=2", "data.batch_size=16", "log.progress_bar=false"]

EACH = {
    "tvm": [],
    "flow_matching": ["objective.name=flow_matching"],
    "meanflow": ["objective.name=meanflow", "objective.omega=1.5", "objective.kappa=0.25"],
    "imf": ["objective.name=imf", "objective.guidance=2"],
    "mit": ["model.network=mit", "model.head_depth=1", "objective.name=imf", "objective.guidance=[1,8]"],
    "mit_tvm": ["model.network=mit", "model.head_depth=1", "model.output=x", "objective.scaled=false"],
    "flow_matching_first": ["objective.flow_matching_first=4ba"],
    "prompts": [
        "data.local={digits}/../named/train",
        "model.channels=3",
        "model.text.encoder=bytes",
        "model.text.tokens=8",
        "model.text.width=32",
    ],
    "frechet": [
        "objective.name=frechet",
        "objective.features.pixels={digits}",
        "objective.features.pixels:2={digits}",
        "objective.population=40",
        "objective.refresh=2",
        "objective.decay=0.5",
        "init_from={digits}/../begin",
    ],
    "adapter": [
        "adapter.rank=4",
        "adapter.modules_to_save=[final_layer,adaLN_modulation]",
        "init_from={digits}/../begin",
    ],
}  # overrides of the digits run; {digits} is the folder of the fixture, beside which `begin` are weights
JOINT = [*EACH["frechet"], "objective.joint=0.5", "objective.label_dropout=0.25"]
JOINT += ["objective.population=200", "objective.decay=0.9"]  # more samples than features and classes


MOUNT = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /dev/shm"]
NAMESPACES = shutil.which("unshare") and not subprocess.run(MOUNT, capture_output=True).returncode


def documented_objective():
    """The class that docs/objectives.md shows as an example of an own objective."""
    page = (ROOT / "docs/objectives.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(source.splitlines()) <= 60
    module = sys.modules["recipe.objectives.alpha_flow"] = types.ModuleType("recipe.objectives.alpha_flow")
    exec(compile(source, "docs/objectives.md", "exec"), module.__dict__)
    return module.AlphaFlow


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="skip tests that are slow or start programs")


# Files of few and long tests: they begin, so that all processes end together.
FIRST = ["test_parallel", "test_kernels", "test_train", "test_cloud", "test_sweep", "test_plan"]
FIRST += ["test_dataset", "test_eval_export", "test_gpu", "test_config", "test_compiled", "test_metrics"]
FIRST += ["test_rehearsal"]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    if config.getoption("quick"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow"))


@pytest.fixture(autouse=True, scope="session")
def _quick(request):
    """Skip a test, if --quick is given, where it would start a program."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("quick"):
            start = subprocess.Popen.__init__

            def only_others(process, command, *arguments, **options):
                if sys.executable in map(str, command):
                    pytest.skip("starts a program")
                start(process, command, *arguments, **options)

            patch.setattr(subprocess.Popen, "__init__", only_others)
            patch.setattr(program, "run", lambda *_: pytest.skip("starts a program"))
        yield


PATIENCE = 600  # seconds for a process that takes half a minute on a quiet machine


def outputs(process):
    """What a process with a session of its own writes until its end, which must come in time."""
    try:
        return process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # every process of the command says where it hangs
        stdout, stderr = process.communicate()
        raise AssertionError(f"{process.args} still ran after {PATIENCE} s\n{stdout}\n{stderr}") from None


def run(*command, check=True, env=None, cwd=ROOT, ranks=None):
    """Run a command of the project from its root, or its ranks; a completed process with output as text."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    process = program.run([*map(str, command)], cwd, env, ranks, PATIENCE)
    if check and process.returncode:
        said = f"{process.stdout}\n{process.stderr}"
        raise AssertionError(f"{command} exited with {process.returncode}\n{said}")
    return process


def store(folder, pixels, labels=None, names=(), **changes):
    """Store pictures uint8 (N, C, H, W) as a dataset without the command line; changes: to its plan."""
    labels = np.zeros(len(pixels), np.int64) if labels is None else labels
    keys = [str(i) for i in range(len(pixels))]
    shape = pixels.shape[1:]
    source = Source("test", keys, labels, list(names), shape, lambda key, note: pixels[int(key)])
    went_in = {"split": "train", "splits": ["train"], "samples": len(keys), "flips": False, "xxh64": "0" * 16}
    encoder = Stored(source)
    about = (source.class_names, encoder.info, "none", False, None, 1000)
    plan = replace(Manifest("test", went_in, "", "image", list(shape), *about), **changes)
    writer.convert(writer.Job(str(folder), source, encoder, np.arange(len(keys)), plan), 1)
    writer.finish([str(folder)])
    return folder


def edit(file, change):
    """Change the content of a JSON file by a function."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


class Evil:
    """What a pickle makes of it when it is loaded: a command that is run."""

    def __reduce__(self):
        return os.system, ("touch /tmp/terminal-velocity-was-here",)


def damaged(file, folder, times):
    """Yield copies of a file of torch.save with other bytes where the pickle and the ZIP's directory are."""
    whole, chance = file.read_bytes(), random.Random(0)
    ends = [*range(5000), *range(len(whole) - 5000, len(whole))]
    for _ in range(times):
        copy = bytearray(whole)
        for place in chance.sample(ends, chance.choice((1, 10, 300))):
            copy[place] = chance.randrange(256)
        (folder / "x.pth").write_bytes(copy)
        yield folder / "x.pth"


def refusal(error, call, *arguments):
    """Return the message with which a call raises this error."""
    with pytest.raises(error) as raised:
        call(*arguments)
    return str(raised.value)


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """The folder of a random AutoencoderKL, whose latents have half the side of its images."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return str(folder)


def finishing(base, shape, pool=1, **settings):
    """The objective frechet on weights of `base`, its pixels (C, H, W) matched to white noise."""
    size = math.prod(shape) // pool**2
    match = Match(Pixels(shape, pool), torch.zeros(size), torch.eye(size))
    match.moments.copy_(torch.eye(size + 1))
    match.refresh()
    objective = Frechet(features={"pixels": "real"}, **settings)
    return objective.begin(base, {"pixels": match}, lambda x0: 127.5 + 127.5 * x0)


def findings(config):
    """What the checks before a new run find, without a look at the places that it writes to."""
    folders = Folders()
    manifest, normalizer = check_data(config.data, config.model, folders)
    weights = check_weights(config, manifest, normalizer, folders) if config.init_from else None
    return Findings(manifest, normalizer, [], Resumable(config.save_folder, []), weights, folders)


def manifest_of(config):
    """The run's manifest, or where a test has no dataset what is asked of one: pictures without classes."""
    there = Path(config.data.source, "manifest.json").is_file()
    nothing = SimpleNamespace(column="image", class_names=[], encoder={})
    return read_manifest(config.data.source) if there else nothing


def begin(model, config):
    """Put the weights of `init_from` into a model, as a new run does; returns what it says."""
    folders, manifest = Folders(), manifest_of(config)
    return warm_start(model, check_weights(config, manifest, model.normalizer, folders), folders)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits converted by the project's own converter; beside them 400 with their names as captions."""
    folder = tmp_path_factory.mktemp("digits")
    run("-m", "streaming_convert", "digits", "--out", folder)
    lines = ["file,caption"]
    for i in range(400):
        picture = Path(f"{DIGITS.target[i]}/{i}.png")
        (folder / "pictures" / picture).parent.mkdir(parents=True, exist_ok=True)
        pixels = (DIGITS.images[i] * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / picture)
        lines.append(f"{picture},{NAMES[DIGITS.target[i]]}")
    (folder / "names.csv").write_text("\n".join(lines))
    options = ("--captions", folder / "names.csv", "--size", 8, "--out", folder / "named")
    run("-m", "streaming_convert", "images", folder / "pictures", *options)
    config = load_config(TrainConfig, "yamls/digits.yaml", TINY)
    facts = {"method": config.objective.facts(), "average": "ema", "step": 0}
    facts["data"] = {"column": "image", "mean": [127.5], "std": [127.5]}
    save_weights(folder / "begin", DiT(config.model).state_dict(), config.model, facts)
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
