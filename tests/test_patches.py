"""What recipe/patches.py knows of the libraries' insides: fails when an upgrade changes it."""

import fcntl
import importlib
import inspect

import pytest
import torch
import xxhash
from composer.devices import DeviceGPU
from composer.utils import get_device
from filelock import FileLock

from recipe import patches
from storage.manifest import DatasetError
from tests.conftest import OFFICIAL, run

FACTORS = "torch.distributed.fsdp._fully_shard._fsdp_collectives:_get_gradient_divide_factors"

# Of the source of a module or function: more than one where versions differ and all have been read.
READ = {
    "composer.callbacks.checkpoint_saver": ["eed0f1956e6527f2"],
    "composer.devices.device_gpu": ["0a2c085f512253ba"],
    "composer.distributed.fsdp2": ["62b9a7627da0a1bc"],
    "streaming.base.dataset": ["2d69d0a056421c9b"],
    "streaming.base.stream": ["0ca6d322efe4b138"],
    "streaming.base.shared.prefix": ["fd91d67a9e6486d9"],
    "streaming.base.shared.memory": ["94beff959fa40164"],
    FACTORS: ["9eef1d177dfc92cb", "55e35e84df1de539"],
}
ORIGINAL = {FACTORS: patches._divide_factors}  # which other tests of this process may have replaced


@pytest.mark.parametrize("name", READ)
def test_the_code_around_a_patch_is_the_one_that_it_was_written_against(name):
    module, _, function = name.partition(":")
    found = importlib.import_module(module)
    source = inspect.getsource(ORIGINAL.get(name) or (getattr(found, function) if function else found))
    digest = xxhash.xxh64(source.encode()).hexdigest()
    assert digest in READ[name], f"{name} has changed: see recipe/patches.py, then add {digest} here"


GRADIENT = """
import torch
from composer.utils import dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from recipe import patches

def gradient():
    net = torch.nn.Linear(2, 2, bias=False)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    net(torch.full((1, 2), 1.0 + dist.get_global_rank())).sum().backward()
    return net.weight.grad.full_tensor()

dist.initialize_dist("cpu")
unpatched = gradient()
patches.divide_gradients_explicitly()
print(*unpatched.unique().tolist(), *gradient().unique().tolist())
"""


def test_gloo_still_sums_where_it_should_average_and_the_patch_averages(tmp_path):
    """Gradients 1 and 2 of two ranks. By torch 2.11 gloo averages, and the patch changes nothing."""
    script = tmp_path / "gradient.py"
    script.write_text(GRADIENT)
    process = run(script, ranks=2)
    unpatched = "3.0" if OFFICIAL else "1.5"
    assert process.stdout.split()[:2] == [unpatched, "1.5"]


def test_who_locks_a_file_that_was_removed_after_he_opened_it_looks_again(tmp_path, monkeypatch):
    """So `patches.remove_lock_files` does no harm to a job that is about to take the lock."""
    path, flock = tmp_path / "000000_cache_filelock", fcntl.flock

    def remove_first(*arguments):
        monkeypatch.undo()
        path.unlink()
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with FileLock(path):
        assert path.exists()
        assert patches.seize(path) is None


SWITCHES = torch.backends.cuda.matmul, torch.backends.cudnn


@pytest.fixture
def tf32_allowed(monkeypatch):
    """As after Composer has made a GPU; the switches are properties, which monkeypatch cannot restore."""
    before = [switch.allow_tf32 for switch in SWITCHES]
    monkeypatch.setitem(DeviceGPU.__init__.__kwdefaults__, "allow_tf32", True)
    for switch in SWITCHES:
        switch.allow_tf32 = True
    yield
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.allow_tf32 = value


def test_float32_is_float32_however_often_composer_makes_a_gpu(monkeypatch, tf32_allowed):
    """It makes another while it loads a checkpoint, and each would allow TF32."""
    for name in ("is_available", "set_device", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: name == "is_available")
    get_device("gpu")
    assert [switch.allow_tf32 for switch in SWITCHES] == [True, True]
    patches.exact_float32()
    assert [switch.allow_tf32 for switch in SWITCHES] == [False, False]
    get_device(None)
    assert [switch.allow_tf32 for switch in SWITCHES] == [False, False]


ENTRIES = {
    "training": "from recipe.train import start; start(None, None)",
    "samples": "from eval.sample import Generator; Generator('none')",
    "features": "from recipe.features import load_extractor; load_extractor('classifier', 'none')",
    "classifier": "from recipe.features import SmallImageClassifier; SmallImageClassifier.train(None, None)",
    "latents": "import diffusers; from recipe.pretrained import load_vae; load_vae('/none/here')",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_whoever_computes_switches_tf32_off_first(tf32_allowed, entry):
    with pytest.raises((AttributeError, OSError, ValueError, DatasetError)):  # of what is not there
        exec(ENTRIES[entry])
    assert [switch.allow_tf32 for switch in SWITCHES] == [False, False]


def test_streaming_asks_the_patch_for_its_names():
    from streaming.base import dataset

    patches.choose_names_once()
    assert dataset.get_shm_prefix is patches.claim_names
    calls = inspect.getsource(dataset).count("get_shm_prefix(")
    assert calls == 1
