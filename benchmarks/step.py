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

import torch
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recipe.dit import DiT, DiTConfig
from recipe.dual import Dual
from recipe.tvm import Batch, TVMConfig, flow_matching_loss, tvm_loss

Work = Callable[[], object]
GUIDED = TVMConfig(guidance=2.0)


def make_batch(config: DiTConfig, size: int, device: str) -> Batch:
    """Random draws of the right shapes."""
    x0, noise = torch.randn(2, size, config.channels, config.size, config.size, device=device)
    t, s, s_prime = torch.rand(3, size, device=device)
    label = torch.zeros(size, dtype=torch.int64, device=device)
    return Batch(x0, noise, torch.maximum(t, s), torch.minimum(t, s), s_prime, label, torch.full_like(t, 2.0))


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
        batch = make_batch(config, 2, "meta")
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
    return net, make_batch(config, size, "cpu")


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


def step_times(net: DiT, batch: Batch, pairs: int) -> tuple[float, float, float]:
    """Whole TVM step against whole flow-matching step."""
    target = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-6)
    null = net.config.classes

    def tvm() -> None:
        training_step(net, lambda: tvm_loss(net, target, batch, GUIDED, null).total, optimizer)

    def plain() -> None:
        training_step(net, lambda: flow_matching_loss(net, batch).total, optimizer)

    return paired(tvm, plain, pairs)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7, help="paired runs; the median is reported")
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    rows = [
        ("FLOPs, TVM / flow matching, XL/2, 256 tokens", flop_ratio(32), 3.72),
        ("FLOPs, TVM / flow matching, XL/2, 1024 tokens", flop_ratio(64), 3.82),
    ]
    net, batch = build(arguments.batch)
    pairs = (lambda: explicit_jvp(net, batch)), (lambda: functional_jvp(net, batch))
    first, second, ratio = paired(*pairs, arguments.pairs)
    label = f"time, explicit tangents / torch.func.jvp, eager ({first:.2f} s / {second:.2f} s)"
    rows.append((label, ratio, 0.82))
    first, second, ratio = step_times(net, batch, arguments.pairs)
    rows.append((f"time, TVM step / flow-matching step, eager ({first:.2f} s / {second:.2f} s)", ratio, 4.3))
    for name, value, bar in rows:
        sys.stdout.write(f"{name:78} {value:6.3f}  at most {bar:.2f}  {'ok' if value <= bar else 'MISSED'}\n")
    sys.exit(any(value > bar for _, value, bar in rows))


if __name__ == "__main__":
    main()
