"""Rehearses training steps on a GPU that is not there: python tests/rehearsal.py plain|fsdp2 OUT [NAME ...]

Every tensor is a fake one (torch's FakeTensorMode): it has a shape, a type and a device, and an operation
that mixes devices or types as no GPU could raises. No number is computed.
"""

import copy
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed
import torch.nn.functional as F
from composer.core import Event, Precision, get_precision_context
from composer.devices import DeviceGPU
from composer.distributed.prepare_distributed import parallelize_composer_model
from diffusers import AutoencoderKL
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import kernels
from recipe import ema
from recipe.callbacks import LossByTime, SampleGrid
from recipe.config import GridConfig
from recipe.dit import DiT, DiTConfig
from recipe.ema import EMA, EMAConfig
from recipe.finish import Population
from recipe.guard import ScaleParameter, StepConfig, check_finite
from recipe.model import GenerativeModel
from recipe.normalizer import Normalizer
from recipe.objectives import IMF, TVM, FlowMatching, MeanFlow
from recipe.optimizer import OptimizerConfig, build_optimizer
from recipe.parallel import ParallelConfig, parallelism, prepare_blocks
from recipe.pictures import to_pixels
from recipe.text import Prompts, TextConfig
from tests.conftest import documented_objective, finishing

ROOT = Path(__file__).resolve().parents[1]


class Anything:
    """A stream or an event: whatever is asked of it does nothing."""

    def __getattr__(self, name):
        return lambda *_, **__: self


def pretend(devices):
    """From here on torch finds so many H100s, on whose fake tensors autograd runs."""
    torch_home, source = Path(torch.__file__).parent, ROOT / "tests/fakes/cuda_guard.cpp"
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/guard.so"
        options = [
            "-shared",
            "-fPIC",
            f"-I{torch_home}/include",
            f"-L{torch_home}/lib",
            "-lc10",
            "-o",
            library,
        ]
        subprocess.run(["g++", "-std=c++17", source, *options], check=True)
        ctypes.CDLL(library)
    torch.utils.rename_privateuse1_backend("pretended")  # torch's accelerator, so that none looks for streams
    torch.autograd.set_multithreading_enabled(False)  # there is no thread for the GPU
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    fake_tensor.init_gpu_context = lambda device: None
    answers = {
        "is_available": True,
        "device_count": devices,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "set_device": None,
        "is_current_stream_capturing": False,
        "synchronize": None,
        "current_stream": Anything(),
        "Stream": Anything(),
        "Event": Anything(),
        "stream": nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
        setattr(torch.distributed, name, collective)
    make = torch.tensor  # with a device it makes a real one first
    torch.tensor = lambda *data, device=None, **options: make(*data, **options).to(device or "cpu")
    F.scaled_dot_product_attention = plain_attention
    kernels.set_backend("auto")


class Mixed(FlowMatching):
    """Has a tensor on the CPU, which the rehearsal must find."""

    def flow_time(self, times):
        return times[0] * torch.ones(1)


BYTES = TextConfig("bytes", tokens=8, width=32)
CASES = {
    "tvm": (TVM(guidance=[1.0, 2.0]), None, "latents"),
    "flow_matching": (FlowMatching(), None, "image"),
    "meanflow": (MeanFlow(omega=1.5, kappa=0.25), None, "latents"),
    "imf": (IMF(guidance=[1, 2]), None, "latents"),
    "alpha_flow": (documented_objective()(kappa=0.25), None, "image"),
    "prompts": (TVM(guidance=2.0), BYTES, "latents"),
    "frechet": (finishing(IMF(guidance=[1, 2]), (3, 8, 8), recompute=True), None, "image"),
    "mixed": (Mixed(), None, "image"),
}
BATCH = 4


class Answers(TorchDispatchMode):
    """Asked for its number, a fake tensor says 1; none is computed on the CPU behind its back."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, fake_tensor.FakeTensor):
                x.constant = None
        if function == torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return function(*args, **(kwargs or {}))


def plain_attention(q, k, v, attn_mask=None, **options):
    """torch's own, which would ask the driver for the GPU's kind."""
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, attn_mask, **options)[0]


def collective(*args, **kwargs):
    """In place of NCCL's, which take CUDA tensors alone."""
    assert all(x.is_cuda for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
    return Anything()


def make_fake(module, mode):
    """Every parameter and buffer of the module, in place, as a fake tensor on the CPU."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = mode.from_tensor(b)


def batch_on_the_gpu(model, column):
    """What the loader gives, after Composer has moved it."""
    config = model.net.config
    sizes = (config.channels * (1 + (column == "latents")), config.size, config.size)
    dtype = torch.uint8 if column == "image" else torch.float16
    batch = {column: torch.empty(BATCH, *sizes, dtype=dtype)}
    batch |= {name: torch.empty(BATCH, dtype=torch.int64) for name in ("label", "sample", "step")}
    if config.text is not None:
        text = config.text
        batch |= {"text": torch.empty(BATCH, text.tokens, dtype=torch.int64)}
        batch |= {"text_length": torch.empty(BATCH, dtype=torch.int64)}
    return {name: x.to("cuda") for name, x in batch.items()}


def rehearse(name, sharded, precision):
    """One step of everything."""
    objective, text, column = copy.deepcopy(CASES[name])
    channels = 4 if column == "latents" else 3
    config = DiTConfig(size=8, channels=channels, classes=10, width=64, depth=2, heads=2, text=text)
    prompts = None if text is None else Prompts(text, None, config.null)
    model = GenerativeModel(
        DiT(config), objective, Normalizer([0.5] * channels, [2.0] * channels), 0, prompts
    )
    parallel = ParallelConfig(fsdp2=sharded, checkpoint_every=2)
    for net, trained in ((model.net, True), (model.target, False), (model.ema, False)):
        if net is not None:
            prepare_blocks(net, parallel, trained)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4) if column == "latents" else None
    if sharded:
        sharding = parallelism(parallel, "cuda").fsdp2
        sharding.device_mesh = init_device_mesh("cuda", (2,))  # the default asks torch for its accelerator
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    averages, by_time = EMA(EMAConfig(posthoc=[0.05])), LossByTime(1)
    averages.apply(Event.INIT, SimpleNamespace(model=model), None)
    for module in filter(None, (model, vae)):
        make_fake(module, mode)
    with mode, Answers():
        model = DeviceGPU(0).module_to_device(model)
        for match in objective.matches.values() if objective.finishes else ():
            match.extractor.device = torch.device("cuda")
        optimizer = build_optimizer(model.net, OptimizerConfig(name="muon" if name == "imf" else "adamw"))
        guard = ScaleParameter(StepConfig(tangent_warmup=2, clip=1.0))
        timestamp = SimpleNamespace(batch=1, sample=BATCH, epoch=0, batch_in_epoch=1)
        batch = batch_on_the_gpu(model, column)
        state = SimpleNamespace(model=model, timestamp=timestamp, batch=batch, outputs=None)
        logger = SimpleNamespace(log_metrics=lambda metrics: None)
        if sharded:
            parallelize_composer_model(model, optimizer, sharding, precision)
        guard.apply(Event.BATCH_START, state, logger)
        with get_precision_context(precision):
            state.outputs = model(batch)
            loss = model.loss(state.outputs, batch)["total"]
        guard.apply(Event.AFTER_LOSS, state, logger)
        if objective.finishes:
            population = Population(objective, BATCH)
            population.apply(Event.AFTER_LOSS, state, logger)
        by_time.after_loss(state, logger)
        loss.backward()
        without = [n for n, p in model.net.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, without
        guard.apply(Event.AFTER_TRAIN_BATCH, state, logger)
        optimizer.step()
        averages.apply(Event.BATCH_END, state, logger)
        if objective.finishes:
            population.apply(Event.BATCH_END, state, logger)
        by_time.batch_end(state, logger)
        check_finite(model.net, 1)
        draw_grid(model, column, precision, vae, batch)


def draw_grid(model, column, precision, vae, batch):
    """Samples of the average, through the decoder of latents where there are any."""
    grid = SampleGrid("nowhere", GridConfig(columns=2, nfe=[2]), "image", owner=None)
    rows = {name: x.cpu() for name, x in batch.items()}
    dataset = type("Rows", (list,), {"size": BATCH})([None] * BATCH)
    loader = SimpleNamespace(dataset=dataset, collate_fn=lambda samples: rows)
    vae = None if vae is None else vae.to("cuda")
    with get_precision_context(precision):
        x0 = grid.sample(model, 2, loader)
    assert to_pixels(x0, model.normalizer, column, vae).is_cuda


def main():
    how, out, *names = sys.argv[1:]
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "NODE_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    pretend(2)
    ema.compiled_lerps = ema.lerps  # dynamo would run what it compiles
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    said = {}
    for name in names or CASES:
        for precision in (Precision.AMP_BF16, Precision.FP32)[: 1 if how == "fsdp2" else 2]:
            try:
                rehearse(name, how == "fsdp2", precision)
                said[f"{name}, {precision.value}"] = ""
            except Exception:
                said[f"{name}, {precision.value}"] = traceback.format_exc()
    Path(out).write_text(json.dumps(said))


if __name__ == "__main__":
    main()
