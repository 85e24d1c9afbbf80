"""What a TVM step costs: `python -m benchmarks.step` prints FLOPs and times, and exits 1 if a bar is missed.

FLOPs are torch's own count on meta tensors. Times are medians of paired runs in one process: each pair runs
both sides back to back, and the ratio is taken pair by pair, so a machine whose speed drifts does not matter.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import device
from benchmarks.device import GUIDED, random_batch
from recipe.algorithms import ema_update
from recipe.dit import DiT, DiTConfig
from recipe.dual import Dual
from recipe.parallel import ParallelConfig, prepare_blocks
from recipe.tvm import Batch, flow_matching_loss, tvm_loss

Work = Callable[[], object]


def flops(work: Work) -> int:
    """Floating-point operations of the matrix products in `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def flop_ratio(size: int) -> float:
    """TVM step over flow-matching step, forward and backward, XL/2 with latents of `size` x `size`."""
    with torch.device("meta"):
        config = DiTConfig(preset="XL/2-18", size=size)
        net = DiT(config)
        target = copy.deepcopy(net).requires_grad_(False)
        batch = random_batch(config, 2, "meta")
    tvm = flops(lambda: tvm_loss(net, target, batch, GUIDED, config.classes).total.mean().backward())
    plain = flops(lambda: flow_matching_loss(net, batch).total.mean().backward())
    return tvm / plain


def paired(first: Work, second: Work, pairs: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the pairwise ratio first / second, after one warm-up each."""
    first(), second()
    times = [(_seconds(first), _seconds(second)) for _ in range(pairs)]
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in times)


def _seconds(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def build(size: int) -> tuple[DiT, Batch]:
    """Width 256, depth 6, 256 tokens, with weights away from the zero initialisation."""
    torch.manual_seed(0)
    config = DiTConfig(size=32, channels=4, width=256, depth=6, heads=4)
    net = DiT(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return net, random_batch(config, size, "cpu")


def explicit_jvp(net: DiT, batch: Batch) -> None:
    """Forward with explicit tangents, then backward through value and tangent."""
    ones = torch.ones_like(batch.t)
    value, tangent = net(batch.x0, batch.t, Dual(batch.t - batch.s, -ones), batch.label, 1 / batch.w)
    (value.square().mean() + tangent.square().mean()).backward()


def functional_jvp(net: DiT, batch: Batch) -> None:
    """The same numbers by torch.func.jvp of the plain network."""
    params = dict(net.named_parameters())

    def plain(d: Tensor) -> Tensor:
        return functional_call(net, params, (batch.x0, batch.t, d, batch.label, 1 / batch.w)).value

    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = jvp(plain, (batch.t - batch.s,), (-torch.ones_like(batch.t),))
        (value.square().mean() + tangent.square().mean()).backward()


def training_step(net: DiT, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step."""
    optimizer.zero_grad()
    loss().mean().backward()
    optimizer.step()


def step_times(net: DiT, target: DiT, batch: Batch, pairs: int) -> tuple[float, float, float]:
    """Whole TVM step against whole flow-matching step."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-6)
    null = net.config.classes

    def tvm() -> None:
        training_step(net, lambda: tvm_loss(net, target, batch, GUIDED, null).total, optimizer)

    def plain() -> None:
        training_step(net, lambda: flow_matching_loss(net, batch).total, optimizer)

    return paired(tvm, plain, pairs)


def variant(net: DiT, trained: bool = True, **options: object) -> DiT:
    """A copy whose blocks are compiled or checkpointed; a frozen one for the teacher."""
    copied = copy.deepcopy(net).requires_grad_(trained)
    prepare_blocks(copied, ParallelConfig(**options), trained)
    return copied


def peak_memory(net: DiT, batch: Batch) -> int:
    """Bytes held at the worst moment of an explicit dual pass, beyond the weights."""
    net.zero_grad()
    with MemTracker() as tracker:
        explicit_jvp(net, batch)
    return tracker.get_tracker_snapshot("peak")[batch.x0.device]["Total"]


def upkeep_share() -> float:
    """Share of optimizer and both averages in a whole step: width of B/2, two blocks, batch 4, 256 tokens."""
    config = DiTConfig(preset="B/2", size=32)
    config.depth = 2
    net, batch = DiT(config), random_batch(config, 4, "cpu")
    target, average = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-6)

    def upkeep() -> None:
        optimizer.step()
        ema_update(target, net, 0.99)
        ema_update(average, net, 0.9999)

    def step() -> None:
        loss = tvm_loss(net, target, batch, GUIDED, config.classes).total
        training_step(net, lambda: loss, optimizer)
        ema_update(target, net, 0.99)
        ema_update(average, net, 0.9999)

    step()
    return paired(upkeep, step, 3)[2]


def bars(pairs: int, batch_size: int, compiled: bool) -> list[tuple[str, float, float]]:
    """(what, measured, at most) on this machine's CPU."""
    rows = [
        ("FLOPs, TVM / flow matching, XL/2, 256 tokens", flop_ratio(32), 3.72),
        ("FLOPs, TVM / flow matching, XL/2, 1024 tokens", flop_ratio(64), 3.82),
    ]
    net, batch = build(batch_size)
    target = variant(net, trained=False)
    memory = peak_memory(variant(net, checkpoint_every=1), batch) / peak_memory(variant(net), batch)
    rows.append(("memory of the dual pass, checkpointed / not", memory, 0.35))
    rows.append(("optimizer and both averages / whole step, B/2 width", upkeep_share(), 0.10))

    def timed(name: str, result: tuple[float, float, float], bar: float) -> None:
        first, second, ratio = result
        rows.append((f"time, {name} ({first:.2f} s / {second:.2f} s)", ratio, bar))

    reference = partial(functional_jvp, variant(net), batch)
    timed("explicit / torch.func.jvp", paired(partial(explicit_jvp, net, batch), reference, pairs), 0.82)
    timed("TVM step / flow-matching step", step_times(net, target, batch, pairs), 4.3)
    if compiled:
        torch._inductor.config.cpp.threads = torch.get_num_threads()
        net, target = variant(net, compile=True), variant(net, trained=False, compile=True)
        dual = partial(explicit_jvp, net, batch)
        timed("explicit, compiled / torch.func.jvp", paired(dual, reference, pairs), 0.66)
        timed("TVM step / flow-matching step, compiled", step_times(net, target, batch, pairs), 3.8)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7, help="paired runs; the median is reported")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs a C++ compiler")
    parser.add_argument("--preset", help="instead: a whole step of this preset on the device at hand")
    parser.add_argument("--size", type=int, default=32, help="with --preset: latent side (64 for 512 px)")
    parser.add_argument("--steps", type=int, default=10, help="with --preset: timed steps")
    parser.add_argument("--out", help="with --preset: folder for the JSON")
    options = parser.parse_args()
    if options.preset:
        result = device.report(options.preset, options.size, options.batch, options.steps)
        sys.stdout.write(device.table(result))
        if options.out:
            device.save(result, options.out)
        return
    rows = bars(options.pairs, options.batch, not options.no_compile)
    for name, value, bar in rows:
        sys.stdout.write(f"{name:70} {value:6.3f}  at most {bar:.2f}  {'ok' if value <= bar else 'MISSED'}\n")
    sys.exit(any(value > bar for _, value, bar in rows))


if __name__ == "__main__":
    main()
