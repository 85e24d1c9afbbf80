"""Time attention with a tangent against its peers on one GPU. A size with wrong results gets no times.

    python -m benchmarks.attention --out attention.json   # prints a table and writes it as JSON
    python -m benchmarks.attention --tune                 # times every candidate tile of each kernel
    python -m benchmarks.attention --interpret            # debugs the script; its times mean nothing

Peers, where installed: torch's flash SDPA (the yardstick: plain attention, no tangent) and cuDNN's, plain
attention under torch.func.jvp, eager and compiled, and jvp-flash-attention 0.14 (forward only). Times are
medians in milliseconds; memory is the peak of forward and backward over inputs, outputs and their gradients.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from benchmarks import environment, seconds
from eval import command_line

SIZES = [(32, 18, 256, 64), (8, 18, 1024, 64), (1, 24, 1024, 128), (1, 24, 4096, 128), (1, 24, 8192, 128)]
TINY = [(1, 2, 33, 16)]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
FORWARD_BAR, BOTH_BAR = 3.2, 4.2  # in units of flash SDPA
MEMORY_BAR = 1.05  # in units of inputs, outputs and gradients
BACKWARD_BARS_MS = {(1, 24, 1024, 128): 0.8, (1, 24, 4096, 128): 8.0, (1, 24, 8192, 128): 30.0}

Function = Callable[[list[Tensor]], tuple[Tensor, ...]]


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k' / sqrt(D)) v as it is written."""
    return torch.softmax(q.shape[-1] ** -0.5 * (q @ k.mT), dim=-1) @ v


def func_jvp(x: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute plain attention and its tangent by torch's forward-mode differentiation."""
    return torch.func.jvp(plain_attention, tuple(x[:3]), tuple(x[3:]))


def ours(x: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute attention and its tangent by the fused kernels."""
    return kernels.jvp_attention(*x)


def sdpa(backend: SDPBackend, x: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute attention, without a tangent, by one back end of torch's fused attention."""
    with sdpa_kernel(backend):
        return (kernels.attention(*x[:3]),)


def jvp_flash_attention(x: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute attention and its tangent by the PyPI package of this name. Raises ImportError without it."""
    from jvp_flash_attention.jvp_attention import JVPAttn

    return torch.func.jvp(JVPAttn.fwd_dual, tuple(x[:3]), tuple(x[3:]))


def peers(cuda: bool) -> dict[str, tuple[Function, bool]]:
    """Return {name: (function of q, k, v, tq, tk, tv, whether its backward pass is timed)}."""
    eager = {"ours": (ours, True), "math jvp": (func_jvp, True)}
    if not cuda:
        return {**eager, "math SDPA": (partial(sdpa, SDPBackend.MATH), True)}
    return {
        **eager,
        "flash SDPA": (partial(sdpa, SDPBackend.FLASH_ATTENTION), True),
        "cuDNN SDPA": (partial(sdpa, SDPBackend.CUDNN_ATTENTION), True),
        "math jvp compiled": (torch.compile(func_jvp), True),
        "jvp-flash-attention": (jvp_flash_attention, False),
    }


def make_inputs(size: tuple[int, ...], cuda: bool = True) -> list[Tensor]:
    """Make random q, k, v, tq, tk, tv: views (B, H, N, D) of tensors with tokens before heads."""
    batch, heads, n, head_dim = size
    kind = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {"dtype": torch.float32}
    drawn = [torch.randn(batch, n, heads, head_dim, **kind) for _ in range(6)]
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


def largest_error(inputs: list[Tensor]) -> float:
    """Return the largest relative L2 error, against float64, of outputs and gradients in two heads."""
    outputs = ours(inputs)
    gradients = [torch.randn_like(x) for x in outputs]
    actual = [*outputs, *torch.autograd.grad(outputs, inputs, gradients)]
    errors = []
    for at in (0, -1):
        exact_inputs = [x[at, at].detach().double().requires_grad_() for x in inputs]
        exact_outputs = func_jvp(exact_inputs)
        exact_gradients = [x[at, at].double() for x in gradients]
        expected = [*exact_outputs, *torch.autograd.grad(exact_outputs, exact_inputs, exact_gradients)]
        errors += [(x[at, at] - y).norm() / y.norm() for x, y in zip(actual, expected, strict=True)]
    return torch.stack(errors).max().item()  # NaN if any error is


def median_ms(run: Callable[[], object], cuda: bool) -> float:
    """Return the median time of a call in ms; on a GPU the L2 cache is cleared between calls."""
    if cuda:
        from triton.testing import do_bench

        return do_bench(run, warmup=100, rep=400, return_mode="median")
    return statistics.median(1e3 * seconds(run) for _ in range(3))


def time_peer(function: Function, differentiable: bool, inputs: list[Tensor]) -> dict[str, float | str]:
    """Return forward_ms, backward_ms and both_ms, or a note on why there are none."""
    cuda = inputs[0].is_cuda
    try:
        with torch.no_grad():
            times = {"forward_ms": median_ms(lambda: function(inputs), cuda)}
        if differentiable:
            outputs = function(inputs)
            used = inputs[: 3 * len(outputs)]
            gradients = [torch.randn_like(x) for x in outputs]
            backward = partial(torch.autograd.grad, outputs, used, gradients, retain_graph=True)
            times["backward_ms"] = median_ms(backward, cuda)
            times["both_ms"] = median_ms(lambda: torch.autograd.grad(function(inputs), used, gradients), cuda)
        return times
    except ImportError:
        return {"note": "not installed"}
    except torch.cuda.OutOfMemoryError:
        return {"note": "out of memory"}
    except RuntimeError as error:
        return {"note": str(error).splitlines()[0][:100]}


def memory_ratio(size: tuple[int, ...]) -> float:
    """Return peak memory of forward and backward over the bytes of inputs, outputs and all gradients."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    inputs = make_inputs(size)
    gradients = [torch.randn_like(inputs[0]) for _ in range(2)]
    torch.cuda.reset_peak_memory_stats()
    outputs = ours(inputs)
    results = torch.autograd.grad(outputs, inputs, gradients)
    needed = sum(x.nbytes for x in (*inputs, *gradients, *outputs, *results))
    return (torch.cuda.max_memory_allocated() - before) / needed


def measure(size: tuple[int, ...], cuda: bool) -> dict:
    """Return one row of the results: the error, the times of each peer, and the bars that are missed."""
    inputs = make_inputs(size, cuda)
    row = {"size": size, "error": largest_error(inputs), "tolerance": TOLERANCE[inputs[0].dtype]}
    if not row["error"] < row["tolerance"]:
        return {**row, "missed": ["correctness"]}
    row["times"] = {name: time_peer(*peer, inputs) for name, peer in peers(cuda).items()}
    if cuda:
        row["memory_ratio"] = memory_ratio(size)
        row["missed"] = missed_bars(row)
    return row


def missed_bars(row: dict) -> list[str]:
    """Return the bars that a row of results misses, in words."""
    compared = {peer: row["times"][peer] for peer in ("ours", "flash SDPA")}
    missed = [f"{peer}: {times['note']}" for peer, times in compared.items() if "note" in times]
    own, flash = compared.values()
    if not missed:
        for part, bar in (("forward_ms", FORWARD_BAR), ("both_ms", BOTH_BAR)):
            if own[part] > bar * flash[part]:
                missed.append(f"{part} is {own[part] / flash[part]:.2f} of flash SDPA, bar {bar}")
        limit = BACKWARD_BARS_MS.get(row["size"], float("inf"))
        if own["backward_ms"] > limit:
            missed.append(f"backward takes {own['backward_ms']:.2f} ms, bar {limit}")
    if row["memory_ratio"] > MEMORY_BAR:
        missed.append(f"memory is {row['memory_ratio']:.3f} of what is needed, bar {MEMORY_BAR}")
    return missed


def print_row(row: dict) -> None:
    """Print a row of results, with one line per peer."""
    print(f"\nB, H, N, D = {row['size']}: error {row['error']:.1e} (at most {row['tolerance']:.0e})")
    for name, times in row.get("times", {}).items():
        cells = [f"{part} {time:9.3f}" for part, time in times.items() if part != "note"]
        print(f"  {name:20s}", *cells, times.get("note", ""))
    if "memory_ratio" in row:
        print(f"  memory over what inputs, outputs and gradients need: {row['memory_ratio']:.3f}")
    for bar in row.get("missed", []):
        print(f"  MISSED: {bar}")


def tune(size: tuple[int, ...]) -> None:
    """Time the candidate tiles of each kernel at this size, with the table's tiles for the other kernels."""
    from kernels import configs
    from kernels.configs import CANDIDATES

    key = configs.table_key(torch.cuda.get_device_capability(), size[-1])
    table, inputs = configs.TABLE[key], make_inputs(size)
    fields = {"forward": "forward", "backward_rows": "rows", "backward_columns": "columns"}
    print(f"\nB, H, N, D = {size}, table: {table}")
    for kernel, field in fields.items():
        tiles = [configs.Tile(*candidate, stages) for candidate in CANDIDATES[kernel] for stages in (2, 3)]
        choices = tiles if field != "columns" else [(x,) for x in tiles] + [(x, x) for x in tiles]
        for choice in choices:
            configs.TABLE[key] = dataclasses.replace(table, **{field: choice})
            try:
                error = largest_error(inputs)
                times = time_peer(ours, True, inputs)
            except Exception as failure:  # noqa: BLE001  (a tile may need too much shared memory, for example)
                times = {"note": type(failure).__name__}
            part = "forward_ms" if field == "forward" else "backward_ms"
            right = "note" not in times and error < TOLERANCE[torch.bfloat16]
            result = f"{times[part]:.3f} ms" if right else times.get("note", "wrong")
            print(f"  {kernel} {choice}: {result}")
    configs.TABLE[key] = table


def main(arguments: list[str]) -> int:
    """Print the results and write them as JSON. Returns 1 if a bar is missed, 2 without a device."""
    parser = command_line("benchmarks.attention", __doc__)
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--tune", action="store_true", help="time the candidate tiles instead")
    parser.add_argument("--interpret", action="store_true", help="dry run on the CPU at a tiny size")
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available() and not args.interpret
    if not cuda and not args.interpret:
        sys.stderr.write("No CUDA device: nothing measured. --interpret debugs this script without one.\n")
        return 2
    if args.interpret and "TRITON_INTERPRET" not in os.environ:  # which triton reads when it is imported
        command, told = [sys.executable, "-m", "benchmarks.attention", *arguments], {"TRITON_INTERPRET": "1"}
        return subprocess.run(command, env=os.environ | told).returncode
    if args.interpret:
        print("Dry run in Triton's interpreter: the times mean nothing, and no bar is checked.")
    kernels.set_backend("triton")
    torch.manual_seed(0)
    sizes, rows = SIZES if cuda else TINY, []
    if args.tune:
        for size in sizes:
            tune(size)
        return 0
    for size in sizes:
        rows.append(measure(size, cuda))
        print_row(rows[-1])
    results = {**environment(), "dtype": "torch.bfloat16" if cuda else "torch.float32", "rows": rows}
    if not cuda:
        results["device"] = "cpu interpreter"
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwrote {args.out}")
    return int(any(row.get("missed") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
