"""Compile the kernels for GPUs that need not be present, and print the assembler's report.

    python -m kernels.inspect  # exits with 1 if a bar is missed

Architectures: sm_80, sm_90 and, from Triton 3.6 on, Blackwell's sm_100 and sm_120. Bars (bf16): no more
shared and tensor memory than a block can have; every product by the architecture's best instruction, on sm_90
none followed by a wait of the assembler's own (C7510 to C7519); at D = 64 no spills and at most 21 tile
products backward, 7 where no gradient comes through the tangent; at other D at most 64 bytes of spills per
thread; at D = 72, on sm_80 and sm_90, shared memory and products at most 1.3 times those of D = 64.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import configs, triton_attention
from kernels.configs import Tile

BLACKWELL = configs.TRITON >= (3, 6)
ARCHITECTURES = (80, 90, 100, 120) if BLACKWELL else (80, 90)
HEAD_DIMS = (64, 72, 96, 128)
SPILL_LIMIT = 64  # bytes; none at D = 64
SHARED_PER_BLOCK = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
TENSOR_COLUMNS = 512  # of sm_100's tensor memory, for all blocks of a multiprocessor
INSTRUCTIONS = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
BACKWARD_PRODUCTS = {"dual": 21, "plain": 7, "cross": 14}
RELEASED = "304, 112, 8, 0, 0, 0 bytes over six kernels with 30 products, and a primal backward with 5"

MATRICES = ("q", "k", "v", "o", "do", "dq", "dk", "dv", "nq", "nk", "x")
TANGENTS = ("tq", "tk", "tv", "to", "dto", "dtq", "dtk", "dtv")
POINTERS = {
    **dict.fromkeys((*TANGENTS, "ntq", "ntk", "tx"), "*bf16"),
    **dict.fromkeys(("lse", "mu", "delta", "a", "gain", "dgain"), "*fp32"),
    "lengths": "*i32",
}
NORM = ("nq", "ntq", "nk", "ntk", "x", "tx", "gain", "dgain")
# The arguments that a launch does not have: in "plain" and "normed plain" all tangents, in "cross" those
# of keys and values; except in the "normed" ones also those of the norm of queries and keys.
ABSENT = {
    "dual": ("lengths", *NORM),
    "plain": ("lengths", *NORM, *TANGENTS, "mu", "a"),
    "cross": (*NORM, "tk", "tv", "dtk", "dtv"),
    "normed": ("lengths",),
    "normed plain": ("lengths", *TANGENTS, "ntq", "ntk", "tx", "mu", "a"),
}
SCALARS = {"scale": "fp32", "heads": "i32", "n_q": "i32", "n_k": "i32"}

# What the launches of backward_columns store: one all, or two a part each.
TOGETHER = ({"KEYS": True, "VALUES": True},)
APART = ({"KEYS": True, "VALUES": False}, {"KEYS": False, "VALUES": True})


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel; registers and spills (bytes) are per thread, shared memory (bytes) per block.

    Products are in units of queries x keys x head dimension, padding included.
    """

    arch: int
    head_dim: int
    name: str
    use: str
    tile: Tile
    registers: int
    spills: int
    shared: int
    tensor_columns: int
    products: float
    instructions: dict[str, int]
    serialised: bool

    @property
    def blocks_per_sm(self) -> int:
        """The number of blocks that registers, tensor and shared memory (1 KB reserved) let run at once."""
        per_thread = 8 * math.ceil(self.registers / 8)
        by_registers = 65536 // (per_thread * 32 * self.tile.warps)
        by_tensors = TENSOR_COLUMNS // self.tensor_columns if self.tensor_columns else by_registers
        return min(by_registers, by_tensors, SHARED_PER_SM[self.arch] // (self.shared + 1024))


def compile_kernel(
    name: str, tile: Tile, head_dim: int, arch: int, use: str = "dual", **flags: bool
) -> Compiled:
    """Compile one kernel in bf16 for 16-byte aligned matrices and, except for "cross", whole tiles."""
    kernel = getattr(triton_attention, name)
    block_d, tail = configs.widths(head_dim)
    constants = {
        "D": head_dim, "BLOCK_D": block_d, "TAIL": tail, "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys,
        "ALIGNED": True, "PRECISION": "tf32x3", **flags,
    }  # fmt: skip
    constants |= dict.fromkeys(ABSENT[use])
    constants["MASKED"] = use == "cross"
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    signature, aligned = {}, []
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in MATRICES:
            signature[argument] = ("*bf16", "i32", "i32", "i32")
            aligned += [(position, part) for part in range(4) if part != 2 or head_dim % 16 == 0]
        else:
            signature[argument] = (POINTERS | SCALARS)[argument]
            aligned += [(position,)] if argument in POINTERS else []
    source = ASTSource(kernel, signature, constants, {path: [["tt.divisibility", 16]] for path in aligned})
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    report = assemble(ptx, arch)
    words = [name, *(flag.lower() for flag, on in flags.items() if on), *([] if use == "dual" else [use])]
    return Compiled(
        arch, head_dim, " ".join(words), use, tile,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spills=max(map(int, re.findall(r"(\d+) bytes spill", report))),
        shared=metadata.shared,
        tensor_columns=getattr(metadata, "tmem_size", None) or 0,
        products=multiplications(compiled.asm["ttir"]) / (tile.queries * tile.keys * head_dim),
        instructions={
            "mma": len(re.findall(r"\bmma\.sync", ptx)),
            "wgmma": ptx.count("wgmma.mma_async"),
            "tcgen05": ptx.count("tcgen05.mma"),
        },
        serialised="(C751" in report,
    )  # fmt: skip


def multiplications(ttir: str) -> int:
    """Count the multiplications of matrix products in a kernel's intermediate code, each loop run once."""
    shapes = re.findall(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", ttir)
    return sum(int(m) * int(k) * int(n) for m, k, n in shapes)


def assemble(ptx: str, arch: int) -> str:
    """Return the report of ptxas on the registers and spills of a kernel."""
    name = "ptxas-blackwell" if arch >= 100 else "ptxas"
    ptxas = os.environ.get("TRITON_PTXAS_PATH") or Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        command = [ptxas, "-v", target, path, "-o", Path(folder, "kernel.cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def table_kernels(arch: int, head_dim: int) -> list[Compiled]:
    """Compile all launches for an architecture and a head dimension; at D = 64 for every use."""
    config = configs.choose((arch // 10, 0), head_dim, element_size=2)
    parts = TOGETHER if len(config.columns) == 1 else APART
    kernels = []
    for use in ABSENT if head_dim == 64 else ("dual", "normed"):
        forward = config.normed or config.forward if "normed" in use else config.forward
        kernels.append(compile_kernel("forward", forward, head_dim, arch, use))
        kernels.append(compile_kernel("backward_rows", config.rows, head_dim, arch, use))
        for tile, part in zip(config.columns, parts, strict=True):
            kernels.append(compile_kernel("backward_columns", tile, head_dim, arch, use, **part))
    return kernels


def missed_bars(groups: list[list[Compiled]]) -> list[str]:
    """Return the bars that the kernels miss, with their architecture and head dimension."""
    missed, at_64 = [], {group[0].arch: group for group in groups if group[0].head_dim == 64}
    for group in groups:
        arch, head_dim = group[0].arch, group[0].head_dim
        bars = [f"{x.name} {bar}" for x in group for bar in _kernel_bars(x)]
        if head_dim == 64:
            bars += _product_bars(group)
        if head_dim == 72 and arch < 100:
            bars += _ratio_bars(group, at_64[arch])
        missed += [f"sm_{arch} D {head_dim}: {bar}" for bar in bars]
    return missed


def _product_bars(group: list[Compiled]) -> list[str]:
    missed = []
    for use, bar in BACKWARD_PRODUCTS.items():
        count = sum(x.products for x in group if "backward" in x.name and x.use == use)
        if count > bar:
            missed.append(f"{use} backward has {count:g} products, bar {bar}")
    return missed


def _kernel_bars(x: Compiled) -> list[str]:
    limit = 0 if x.head_dim == 64 else SPILL_LIMIT
    others = [kind for kind, count in x.instructions.items() if count and kind != INSTRUCTIONS[x.arch]]
    bars = {
        f"spills {x.spills} bytes, bar {limit}": x.spills > limit,
        f"takes {x.shared} bytes of shared memory": x.shared > SHARED_PER_BLOCK[x.arch],
        f"takes {x.tensor_columns} columns of tensor memory": x.tensor_columns > TENSOR_COLUMNS,
        f"has products other than {INSTRUCTIONS[x.arch]}": bool(others),
        f"has no {INSTRUCTIONS[x.arch]}": x.products > 0 and not x.instructions[INSTRUCTIONS[x.arch]],
        "has its wgmma serialised": x.serialised and x.arch == 90,
    }
    return [bar for bar, is_missed in bars.items() if is_missed]


def _ratio_bars(group: list[Compiled], like: list[Compiled]) -> list[str]:
    """Return the bars that each kernel's shared memory and the sum of products miss, relative to D = 64."""
    ours, theirs = ([x for x in kernels if x.products and x.use == "dual"] for kernels in (group, like))
    ratios = {f"shared memory of {x.name}": x.shared / y.shared for x, y in zip(ours, theirs, strict=False)}
    ratios["products"] = sum(x.products * 72 for x in ours) / sum(x.products * 64 for x in theirs)
    return [f"{what} {x:.2f} times that of D 64, bar 1.3" for what, x in ratios.items() if x > 1.3]


def print_table(kernels: list[Compiled]) -> None:
    """Print one line of Markdown per kernel; `tile` is queries x keys, warps, stages."""
    print("|arch|D|kernel|tile|registers|spills|shared|blocks/SM|products|matrix instructions|serialised|")
    print("|-" * 11 + "|")
    for x in kernels:
        tile = f"{x.tile.queries} x {x.tile.keys}, {x.tile.warps}, {x.tile.stages}"
        cells = (f"sm_{x.arch}", x.head_dim, x.name, tile, x.registers, x.spills, x.shared, x.blocks_per_sm)
        matrix = ", ".join(f"{count} {kind}" for kind, count in x.instructions.items() if count)
        cells = (*cells, f"{x.products:.3g}", matrix, "yes" if x.serialised else "no")
        print("|".join(map(str, ("", *cells, ""))))


def main(arguments: list[str]) -> int:
    """Print the table. Returns 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all")
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}, bf16, whole tiles")
    if not BLACKWELL:
        print("sm_100 and sm_120 are left out: they need Triton 3.6 or later.")
    groups = [table_kernels(arch, head_dim) for arch in options.arch for head_dim in HEAD_DIMS]
    print_table([kernel for kernels in groups for kernel in kernels])
    print(f"For comparison, the released kernels' spills at D = 64 on sm_90: {RELEASED}.")
    missed = missed_bars(groups)
    print("\n".join(missed) or "Every bar is met.")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
