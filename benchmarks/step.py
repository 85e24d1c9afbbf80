"""The cost of a TVM step: `python -m benchmarks.step` prints FLOPs and times, and exits 1 if a bar is missed.

FLOPs are torch's own count on meta tensors. Times are medians of pairs of runs (`benchmarks.paired`).

`python -m benchmarks.step CONFIG.yaml [key=value ...]` times whole steps of that configuration on the device
at hand: seconds, memory, share of the peak and where the time goes.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Figure, environment, paired, seconds
from eval import command_line
from recipe import plan
from recipe.config import ConfigError, TrainConfig, load_config, yaml_of
from recipe.dit import DiT, DiTConfig
from recipe.dual import Dual
from recipe.ema import average_names, ema_update
from recipe.objectives import TVM, FlowMatching, Objective
from recipe.objectives.base import Draw, draw
from recipe.objectives.frechet import Match
from recipe.optimizer import build_optimizer
from recipe.parallel import ParallelConfig, prepare_blocks

Work = Callable[[], object]
GUIDED, PLAIN = TVM(guidance=2.0), FlowMatching()
VARIANTS = {
    "tvm": [],
    "tvm, checkpointed": ["parallel.checkpoint_every=1"],
    "tvm, eager": ["parallel.compile=false"],
    "flow matching": ["objective.name=flow_matching"],
}
LARGEST = 12  # kernels that a profile lists by name
KINDS = {
    "attention": ("jvp_attention", "flash", "attention", "softmax"),
    "matrix products": ("gemm", "cutlass", "nvjet", "::mm", "addmm", "bmm", "sm90_xmma", "ampere_"),
    "optimizer and averages": ("adam", "foreach", "multi_tensor", "lerp"),
    "copies": ("memcpy", "memset", "copy"),
}


def random_draw(config: DiTConfig, objective: Objective, size: int, device: str) -> Draw:
    """Make `size` random images and a step's draws for them."""
    ids = torch.arange(size, device=device)
    x0 = torch.randn(size, config.channels, config.size, config.size, device=device)
    return draw(x0, ids % max(config.classes, 1), 0 * ids, ids, 0, objective, config)


def flops(work: Work) -> int:
    """Count the floating-point operations of the matrix products in `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def flop_ratio(size: int) -> float:
    """Return FLOPs of a TVM step over a flow-matching step, XL/2 with latents of `size` x `size`."""
    with torch.device("meta"):
        config = DiTConfig(preset="XL/2-18", size=size)
        net = DiT(config)
        target = copy.deepcopy(net).requires_grad_(False)
        drawn = random_draw(config, GUIDED, 2, "meta")

    def pass_of(objective: Objective) -> int:
        return flops(lambda: objective.loss(net, target, drawn).total.mean().backward())

    return pass_of(GUIDED) / pass_of(PLAIN)


def paired_seconds(first: Work, second: Work, pairs: int = 7) -> tuple[float, float, float]:
    """Return the median seconds of both and the median of their ratio."""
    return paired(partial(seconds, first), partial(seconds, second), pairs)


def build() -> tuple[DiT, Draw]:
    """Build a network of width 256, depth 6 and 256 tokens, with no weights at zero, and a batch of 4."""
    torch.manual_seed(0)
    config = DiTConfig(size=32, channels=4, width=256, depth=6, heads=4)
    net = DiT(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return net, random_draw(config, GUIDED, 4, "cpu")


def explicit_jvp(net: DiT, drawn: Draw) -> None:
    """Run a forward pass with explicit tangents and a backward pass through value and tangent."""
    t, s, _ = drawn.times
    value, tangent = net(drawn.x0, t, Dual(t - s, -torch.ones_like(t)), drawn.label, 1 / drawn.w)
    (value.square().mean() + tangent.square().mean()).backward()


def functional_jvp(net: DiT, drawn: Draw) -> None:
    """Compute the same as `explicit_jvp` by torch.func.jvp of the plain network."""
    params, (t, s, _) = dict(net.named_parameters()), drawn.times

    def plain(d: Tensor) -> Tensor:
        return functional_call(net, params, (drawn.x0, t, d, drawn.label, 1 / drawn.w)).value

    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = jvp(plain, (t - s,), (-torch.ones_like(t),))
        (value.square().mean() + tangent.square().mean()).backward()


def training_step(
    objective: Objective, net: DiT, target: DiT, drawn: Draw, optimizer: torch.optim.Optimizer
) -> None:
    """Run one optimizer step, in bf16 on a GPU."""
    device = drawn.x0.device.type
    optimizer.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        total = objective.loss(net, target, drawn).total
    total.mean().backward()
    optimizer.step()


def step_times(net: DiT, target: DiT, drawn: Draw) -> tuple[float, float, float]:
    """Time a whole TVM step against a whole flow-matching step (see `paired_seconds`)."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-6)
    tvm, plain = (partial(training_step, which, net, target, drawn, optimizer) for which in (GUIDED, PLAIN))
    return paired_seconds(tvm, plain)


def blended_distance(
    features: Tensor, mean: Tensor, second: Tensor, real_mean: Tensor, real_root: Tensor, decay: float
) -> Tensor:
    """Return the Frechet distance of running raw moments into which a batch (B, F) is blended, by an
    eigendecomposition that autograd differentiates. mean (F,), second (F, F): raw moments before; real_root:
    R with R R' the covariance of real images.
    """
    mean = decay * mean + (1 - decay) * features.mean(0)
    second = decay * second + (1 - decay) * features.T @ features / len(features)
    covariance = second - mean.outer(mean)
    spectrum = torch.linalg.eigvalsh(real_root.T @ covariance @ real_root)
    spectrum = spectrum[spectrum > 1e-12 * spectrum[-1]]
    traces = covariance.trace() + real_root.square().sum()
    return (mean - real_mean).square().sum() + traces - 2 * spectrum.sqrt().sum()


def cpu_seconds(work: Work) -> float:
    """Return the CPU seconds that one call takes, whatever else the machine does meanwhile."""
    began = time.process_time()
    work()
    return time.process_time() - began


def finish_times() -> tuple[float, float, float]:
    """Time the loss of `frechet` alone against autograd through the Frechet distance, both in float64.

    Ours is cost, backward and moments of a step of 256 images in 2048 features, and its share of the map,
    which 10 steps use. Returns median CPU seconds of both and the median of their ratio.
    """
    torch.manual_seed(0)
    real, before = (torch.randn(4096, 2048, dtype=torch.float64) for _ in range(2))
    mean, second = before.mean(0), before.T @ before / len(before)
    match = Match(None, real.mean(0) + 1, real.T.cov())
    match.add(before)
    match.fold(0)
    features = torch.randn(256, 2048, dtype=torch.float64, requires_grad=True)

    def regression() -> None:
        match.cost(features).mean().backward()
        match.add(features)
        match.fold(0.999)

    def autograd() -> None:
        blended_distance(features, mean, second, match.mean, match.root, 0.999).backward()

    ours = lambda: cpu_seconds(regression) + cpu_seconds(match.refresh) / 10  # noqa: E731
    return paired(ours, partial(cpu_seconds, autograd), 3)


def variant(net: DiT, trained: bool = True, **options: object) -> DiT:
    """Copy the network with ParallelConfig's options (compile, checkpoint_every); frozen unless `trained`."""
    copied = copy.deepcopy(net).requires_grad_(trained)
    prepare_blocks(copied, ParallelConfig(**options), trained)
    return copied


def peak_memory(net: DiT, drawn: Draw) -> int:
    """Return the peak bytes of an explicit dual pass, without the weights."""
    net.zero_grad()
    with MemTracker() as tracker:
        explicit_jvp(net, drawn)
    return tracker.get_tracker_snapshot("peak")[drawn.x0.device]["Total"]


def upkeep_share() -> float:
    """Return the share of optimizer and both averages in a step of B/2 with two blocks, at batch 4."""
    config = DiTConfig(preset="B/2", size=32)
    config.depth = 2
    net, drawn = DiT(config), random_draw(config, GUIDED, 4, "cpu")
    target, average = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-6)

    def then_average(work: Work) -> None:
        work()
        ema_update(net, [(target, 0.99), (average, 0.9999)])

    upkeep = partial(then_average, optimizer.step)
    step = partial(then_average, partial(training_step, GUIDED, net, target, drawn, optimizer))
    step()
    return paired_seconds(upkeep, step, 3)[2]


def bars() -> Iterator[Figure]:
    """Measure all bars on the CPU, those that need a C++ compiler last."""
    yield Figure("FLOPs, TVM / flow matching, XL/2, 256 tokens", flop_ratio(32), 3.72)
    yield Figure("FLOPs, TVM / flow matching, XL/2, 1024 tokens", flop_ratio(64), 3.82)
    net, drawn = build()
    target = variant(net, trained=False)
    memory = peak_memory(variant(net, checkpoint_every=1), drawn) / peak_memory(variant(net), drawn)
    yield Figure("memory of the dual pass, checkpointed / not", memory, 0.35)
    yield Figure("optimizer and both averages / whole step, B/2 width", upkeep_share(), 0.10)

    def timed(name: str, result: tuple[float, float, float], bar: float) -> Figure:
        first, second, ratio = result
        return Figure(f"{name} ({first:.2f} s / {second:.2f} s)", ratio, bar)

    yield timed("CPU time, frechet / autograd, 2048 features", finish_times(), 0.20)
    reference = partial(functional_jvp, variant(net), drawn)
    dual = partial(explicit_jvp, net, drawn)
    yield timed("time, explicit / torch.func.jvp", paired_seconds(dual, reference), 0.82)
    yield timed("time, TVM step / flow-matching step", step_times(net, target, drawn), 4.3)
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    net, target = variant(net, compile=True), variant(net, trained=False, compile=True)
    dual = partial(explicit_jvp, net, drawn)
    yield timed("time, explicit, compiled / torch.func.jvp", paired_seconds(dual, reference), 0.66)
    yield timed("time, TVM step / flow-matching step, compiled", step_times(net, target, drawn), 3.8)


def make_step(config: TrainConfig, device: str) -> Work:
    """Return a function that does a whole step of a microbatch: loss, backward pass, optimizer, averages."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = DiT(config.model, initialize=False).to(device)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    names = average_names(config.ema, config.objective)
    averages = [copy.deepcopy(net).requires_grad_(False) for _ in names]
    prepare_blocks(net, config.parallel, trained=True)
    prepare_blocks(averages[-1], config.parallel, trained=False)
    optimizer = build_optimizer(net, config.optimizer)
    drawn = random_draw(config.model, config.objective, plan.layout(config, 1)[0], device)

    def step() -> None:
        training_step(config.objective, net, averages[-1], drawn, optimizer)
        for average in averages:
            ema_update(net, [(average, 0.99)])

    return step


def measure(step: Work, device: str) -> dict[str, Any]:
    """Return the median seconds of ten steps, after three to warm up, and peak GiB (None on a CPU)."""
    cuda = device == "cuda"
    finish = torch.cuda.synchronize if cuda else lambda: None

    def synchronized() -> None:
        step()
        finish()

    for _ in range(3):
        synchronized()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds(synchronized) for _ in range(10))
    return {"seconds": median, "peak_gib": torch.cuda.max_memory_allocated() / plan.GIB if cuda else None}


def time_by_kind(step: Work, device: str) -> dict[str, Any]:
    """Profile one step; return the share of device time by kind of kernel, and of the largest kernels."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if microseconds:
            spent[event.key] += microseconds
    shares: Counter[str] = Counter()
    for name, microseconds in spent.items():
        kind = next((k for k, words in KINDS.items() if any(w in name.lower() for w in words)), "elementwise")
        shares[kind] += microseconds / spent.total()
    largest = [{"kernel": name[:90], "share": us / spent.total()} for name, us in spent.most_common(LARGEST)]
    return {"shares": dict(shares), "largest": largest}


def known_gpu(device: str) -> str | None:
    """Return the planner's name for a device named `device` ("NVIDIA H100 80GB HBM3"), or None."""
    return next((name for name in plan.GPUS if name in device.lower()), None)


def predicted(config: TrainConfig, device: str) -> dict[str, float]:
    """Predict seconds and peak GiB of a step on one such GPU by `recipe.plan`; {} for an unknown GPU."""
    gpu = known_gpu(device)
    if gpu is None:
        return {}
    step = plan.times(config, 1, plan.Cluster(gpus=[1], gpu=gpu)).step
    return {"seconds": step, "peak_gib": sum(plan.memory(config, 1).values()) / plan.GIB}


def measure_variants(yaml: str, overrides: list[str]) -> dict[str, Any]:
    """Measure all VARIANTS of a configuration; one may run out of memory. Raises ConfigError."""
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", {}
    overrides = ["parallel.fsdp2=false", *overrides]
    for variant, options in VARIANTS.items():
        config = load_config(TrainConfig, yaml, [*overrides, *options])
        row = rows[variant] = {"predicted": predicted(config, environment()["device"])}
        try:
            step = make_step(config, device)
            row |= measure(step, device)
            row["profile"] = time_by_kind(step, device)
        except torch.cuda.OutOfMemoryError:
            row["error"] = "out of memory"
            continue
        finally:
            step = None
        if gpu := known_gpu(environment()["device"]):
            flops_per_step = plan.step_flops(config.model, config.objective) * config.data.batch_size
            row["share_of_peak"] = flops_per_step / row["seconds"] / plan.GPUS[gpu].flops
    what = {"config": yaml, "overrides": overrides}
    what |= {"batch": config.data.batch_size, "tokens": config.model.tokens}
    return {**what, "precision": "bf16 autocast" if device == "cuda" else "fp32", "variants": rows}


def table(result: dict[str, Any]) -> str:
    """Return the results as text, with one line per variant."""
    lines = [f"{result['config']}, {result['tokens']} tokens, batch {result['batch']}, {result['precision']}"]
    for name, row in result["variants"].items():
        if "error" in row:
            lines.append(f"{name:20} {row['error']}")
            continue
        cells = [f"{row['seconds']:7.3f} s"]
        cells += [f"{row['peak_gib']:6.1f} GiB"] if row["peak_gib"] else []
        cells += [f"{row['share_of_peak']:6.1%} of peak"] if "share_of_peak" in row else []
        cells += [f"{kind} {share:.0%}" for kind, share in row["profile"]["shares"].items()]
        lines.append(f"{name:20} " + ", ".join(cells))
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Run the command line; exits with 1 if a bar is missed."""
    parser = command_line("benchmarks.step", __doc__)
    parser.add_argument("config", nargs="?", help="time whole steps of this YAML on the device at hand")
    keys = "keys of the YAML as key=value; python -m recipe.train --help lists them"
    parser.add_argument("overrides", nargs="*", help=keys)
    options = parser.parse_args(arguments)
    if options.config:
        try:
            sys.stdout.write(table(measure_variants(yaml_of(options.config), options.overrides)))
        except ConfigError as error:
            raise SystemExit(f"config error: {error}") from error
        return
    missed = False
    for row in bars():
        sys.stdout.write(f"{row}\n")
        missed |= row.missed
    sys.exit(missed)


if __name__ == "__main__":
    main(sys.argv[1:])
