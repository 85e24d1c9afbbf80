"""A whole training step on the device at hand: time, memory, share of peak, and where the time goes.

`python -m benchmarks.step --preset XL/2-18 --batch 32 --out benchmarks/results` prints a table, writes JSON.
On a machine without a GPU the same command runs on the CPU in float32, which is how it is debugged.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from recipe.algorithms import ema_update
from recipe.dit import DiT, DiTConfig
from recipe.objectives import TVM, FlowMatching, Objective
from recipe.objectives.base import Batch, draw
from recipe.parallel import ParallelConfig, prepare_blocks
from recipe.weights import commit

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from the data sheets
GUIDED = TVM(guidance=2.0)
VARIANTS = {
    "tvm": (GUIDED, {"compile": True}),
    "tvm, checkpointed": (GUIDED, {"compile": True, "checkpoint_every": 1}),
    "tvm, eager": (GUIDED, {}),
    "flow matching": (FlowMatching(), {"compile": True}),
}
KINDS = {
    "attention": ("jvp_attention", "flash", "attention", "softmax"),
    "matrix products": ("gemm", "cutlass", "nvjet", "::mm", "addmm", "bmm", "sm90_xmma", "ampere_"),
    "optimizer and averages": ("adam", "foreach", "multi_tensor", "lerp"),
    "copies": ("memcpy", "memset", "copy"),
}


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """bf16 on a GPU, nothing on a CPU."""
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        yield


def random_batch(config: DiTConfig, objective: Objective, size: int, device: str) -> Batch:
    """Random draws of the right shapes."""
    ids = torch.arange(size, device=device)
    x0 = torch.randn(size, config.channels, config.size, config.size, device=device)
    label = ids % max(config.classes, 1)
    return draw(x0, label, torch.zeros_like(ids), ids, 0, objective, config.classes)


def make_step(net: DiT, objective: Objective, options: dict, batch: Batch) -> Callable[[], None]:
    """Loss, backward, AdamW and the averages, as training does them."""
    null = net.config.classes
    target, average = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
    prepare_blocks(net, ParallelConfig(**options), trained=True)
    prepare_blocks(target, ParallelConfig(compile=options.get("compile", False)), trained=False)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, (0.9, 0.95), fused=True)
    device = batch.x0.device.type

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device):
            loss = objective.loss(net, target, batch, null)
        loss.total.mean().backward()
        optimizer.step()
        ema_update(average, net, 0.9999)
        if objective.teacher:
            ema_update(target, net, 0.99)

    return step


def measure(step: Callable[[], None], device: str, steps: int) -> dict[str, float]:
    """Median seconds of a step after three to warm up, and peak memory in GiB."""
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(3):
        step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return {"seconds": statistics.median(times), "peak_gib": memory}


def time_by_kind(step: Callable[[], None], device: str, top: int = 12) -> dict[str, Any]:
    """Share of device time by kind of kernel, and the largest kernels, from one profiled step."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if microseconds:
            spent[event.key] += microseconds
    total, shares = sum(spent.values()), defaultdict(float)
    for name, microseconds in spent.items():
        kind = next((k for k, words in KINDS.items() if any(w in name.lower() for w in words)), "elementwise")
        shares[kind] += microseconds / total
    largest = sorted(spent.items(), key=lambda item: -item[1])[:top]
    return {
        "shares": dict(shares),
        "largest": [{"kernel": name[:90], "share": spent_us / total} for name, spent_us in largest],
    }


def flops_per_sample(config: DiTConfig, objective: Objective) -> float:
    """Counted on meta tensors."""
    with torch.device("meta"):
        net, batch = DiT(config), random_batch(config, objective, 2, "meta")
        target = copy.deepcopy(net).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        loss = objective.loss(net, target, batch, config.classes)
        loss.total.mean().backward()
    return counter.get_total_flops() / 2


def environment() -> dict[str, str]:
    """What the numbers are measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }


def report(preset: str, size: int, batch_size: int, steps: int) -> dict[str, Any]:
    """All variants at one size; a variant that runs out of memory is reported as such."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured_on = environment()
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in measured_on["device"]), float("nan"))
    config = DiTConfig(preset=preset, size=size)
    rows: dict[str, dict[str, Any]] = {}
    for variant, (objective, options) in VARIANTS.items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            net = DiT(config, initialize=False).to(device)
            for p in net.parameters():
                torch.nn.init.normal_(p, std=0.02)
            step = make_step(net, objective, options, random_batch(config, objective, batch_size, device))
            row = measure(step, device, steps)
        except torch.cuda.OutOfMemoryError:
            rows[variant] = {"seconds": None, "peak_gib": None, "error": "out of memory"}
            continue
        finally:
            net = None
        row["share_of_peak"] = flops_per_sample(config, objective) * batch_size / row["seconds"] / peak
        row["profile"] = time_by_kind(step, device)
        rows[variant], step = row, None
    return {
        **measured_on,
        "preset": preset,
        "tokens": config.tokens,
        "batch": batch_size,
        "precision": "bf16 autocast" if device == "cuda" else "fp32",
        "variants": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The report as text."""
    head = f"{result['preset']}, {result['tokens']} tokens, batch {result['batch']}, {result['precision']}"
    versions = f"torch {result['torch']}, triton {result['triton']}, commit {result['commit']}"
    lines = [f"{head}; {result['device']}, {result['date']}, {versions}"]
    for name, row in result["variants"].items():
        if row["seconds"] is None:
            lines.append(f"{name:20} {row['error']}")
            continue
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in row["profile"]["shares"].items())
        cost = f"{row['seconds']:7.3f} s {row['peak_gib']:6.1f} GiB {row['share_of_peak']:6.1%}"
        lines.append(f"{name:20} {cost}  {shares}")
    return "\n".join(lines) + "\n"


def save(result: dict[str, Any], folder: str) -> Path:
    """FOLDER/step_{device}_{preset}_{tokens}.json."""
    stem = f"step_{result['device']}_{result['preset']}_{result['tokens']}".replace(" ", "-").replace("/", "")
    path = Path(folder) / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
