"""Compiles the kernels for sm_80 and sm_90, without a GPU, and prints what the assembler made of them.

    python -m kernels.inspect               # the table's own configurations; exits with 1 if a bar is missed
    python -m kernels.inspect --candidates  # tiles that were considered beside them, no bars

Bars (bf16): at D = 64 no spills, at most 21 tile products backward, on sm_90 every product a wgmma and none
followed by a wait of the assembler's own (C7510 to C7519); at D = 128 at most 64 bytes of spills per thread.
"""

import argparse
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

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from kernels import configs, triton_attention
from kernels.configs import Tile

ARCHITECTURES = (80, 90)
HEAD_DIMS = (64, 128)
SPILL_LIMIT = {64: 0, 128: 64}
BACKWARD_PRODUCTS = 21
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10}
RELEASED = "304, 112, 8, 0, 0, 0 bytes over six kernels with 30 products, and a primal backward with 5"

MATRICES = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
TANGENTS = ("tq", "tk", "tv", "to", "dto", "dtq", "dtk", "dtv")
STATISTICS = ("lse", "mu", "delta", "a")
SCALARS = {"scale": "fp32", "heads": "i32", "n_q": "i32", "n_k": "i32"}

SIZES = {
    "forward": (
        (128, 128, 8),
        (128, 64, 8),
        (128, 32, 8),
        (128, 16, 8),
        (64, 64, 4),
        (64, 32, 4),
        (32, 32, 4),
    ),
    "backward_rows": ((128, 64, 8), (128, 32, 8), (128, 16, 8), (64, 64, 4), (64, 32, 4), (32, 32, 4)),
    "backward_columns": (
        (64, 128, 8),
        (32, 128, 8),
        (16, 128, 8),
        (64, 64, 4),
        (32, 64, 4),
        (16, 64, 4),
        (32, 32, 4),
    ),
}
CANDIDATES = {name: [Tile(*size, stages=2) for size in sizes] for name, sizes in SIZES.items()}
COLUMNS = ({"KEYS": True, "VALUES": True}, {"KEYS": True, "VALUES": False}, {"KEYS": False, "VALUES": True})


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel; registers and spills (bytes) are per thread, shared memory (bytes) per block."""

    arch: int
    head_dim: int
    name: str
    tile: Tile
    registers: int
    spills: int
    shared: int
    products: int
    wgmma: int
    mma: int
    serialised: bool

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that registers and shared memory (with 1 KB per block for the system) let run at once."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.tile.warps)
        return min(by_registers, SHARED_PER_SM[self.arch] // (self.shared + 1024))


def compile_kernel(name: str, tile: Tile, head_dim: int, arch: int, **flags: bool) -> Compiled:
    """Compile one kernel in bf16 with all tangents for whole tiles of 16-byte aligned matrices."""
    kernel = getattr(triton_attention, name)
    constants = {
        "D": head_dim, "BLOCK_D": head_dim, "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys,
        "MASKED": False, "PRECISION": "tf32x3", **flags,
    }  # fmt: skip
    signature, aligned = {}, []
    for position, argument in enumerate(kernel.arg_names):
        if argument in MATRICES:
            signature[argument] = ("*bf16", "i32", "i32", "i32")
            aligned += [(position, part) for part in range(4)]
        elif argument in TANGENTS + STATISTICS:
            signature[argument] = "*bf16" if argument in TANGENTS else "*fp32"
            aligned.append((position,))
        else:
            signature[argument] = SCALARS.get(argument, "constexpr")
    source = ASTSource(kernel, signature, constants, {path: [["tt.divisibility", 16]] for path in aligned})
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = assemble(compiled.asm["ptx"], arch)
    return Compiled(
        arch, head_dim, name + "".join(f" {flag.lower()}" for flag, on in flags.items() if on), tile,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spills=max(map(int, re.findall(r"(\d+) bytes spill", report))),
        shared=compiled.metadata.shared,
        products=len(re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) ", compiled.asm["ttgir"])),
        wgmma=compiled.asm["ptx"].count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", compiled.asm["ptx"])),
        serialised="(C751" in report,
    )  # fmt: skip


def assemble(ptx: str, arch: int) -> str:
    """What ptxas says about the registers and spills of a kernel."""
    ptxas = os.environ.get("TRITON_PTXAS_PATH") or Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        target = f"--gpu-name=sm_{arch}{'a' if arch == 90 else ''}"
        command = [ptxas, "-v", target, path, "-o", Path(folder, "kernel.cubin")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def table_kernels(arch: int, head_dim: int) -> list[Compiled]:
    """Every launch of the configuration table for one architecture and head dimension."""
    config = configs.TABLE[arch, head_dim]
    parts = COLUMNS[:1] if len(config.columns) == 1 else COLUMNS[1:]
    return [
        compile_kernel("forward", config.forward, head_dim, arch),
        compile_kernel("backward_rows", config.rows, head_dim, arch),
        *(
            compile_kernel("backward_columns", tile, head_dim, arch, **part)
            for tile, part in zip(config.columns, parts, strict=True)
        ),
    ]


def missed_bars(kernels: list[Compiled]) -> list[str]:
    """The bars that the kernels of one architecture and head dimension miss."""
    arch, head_dim = kernels[0].arch, kernels[0].head_dim
    missed = [
        f"{kernel.name} spills {kernel.spills} bytes, bar {SPILL_LIMIT[head_dim]}"
        for kernel in kernels
        if kernel.spills > SPILL_LIMIT[head_dim]
    ]
    backward = sum(kernel.products for kernel in kernels[1:])
    if head_dim == 64 and backward > BACKWARD_PRODUCTS:
        missed.append(f"backward has {backward} products, bar {BACKWARD_PRODUCTS}")
    if arch == 90:
        others = [kernel for kernel in kernels if kernel.mma or not kernel.wgmma]
        missed += [f"{kernel.name} has products other than wgmma" for kernel in others]
        missed += [f"{kernel.name} has its wgmma serialised" for kernel in kernels if kernel.serialised]
    return [f"sm_{arch} D {head_dim}: {bar}" for bar in missed]


def print_table(kernels: list[Compiled]) -> None:
    """One line of Markdown per kernel; `tile` is queries x keys, warps, stages."""
    print("|arch|D|kernel|tile|registers|spills|shared|blocks/SM|products|wgmma|mma|serialised|")
    print("|-" * 12 + "|")
    for x in kernels:
        tile = f"{x.tile.queries} x {x.tile.keys}, {x.tile.warps}, {x.tile.stages}"
        cells = (f"sm_{x.arch}", x.head_dim, x.name, tile, x.registers, x.spills, x.shared, x.blocks_per_sm)
        print(
            "|".join(map(str, ("", *cells, x.products, x.wgmma, x.mma, "yes" if x.serialised else "no", "")))
        )


def main() -> int:
    """Print the table or the candidates; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", action="store_true", help="compile tiles beside the table's own")
    pairs = [(arch, head_dim) for arch in ARCHITECTURES for head_dim in HEAD_DIMS]
    print(f"triton {triton.__version__}, bf16, all tangents, whole tiles")
    if parser.parse_args().candidates:
        print_table([kernel for pair in pairs for kernel in candidate_kernels(*pair)])
        return 0
    groups = [table_kernels(*pair) for pair in pairs]
    print_table([kernel for kernels in groups for kernel in kernels])
    print(f"For comparison, the released kernels' spills at D = 64 on sm_90: {RELEASED}.")
    missed = [bar for kernels in groups for bar in missed_bars(kernels)]
    print("\n".join(missed) or "Every bar is met.")
    return int(bool(missed))


def candidate_kernels(arch: int, head_dim: int) -> list[Compiled]:
    """The candidate tiles of every kernel, backward_columns in one launch and in two."""
    return [
        compile_kernel(name, tile, head_dim, arch, **flags)
        for name, tiles in CANDIDATES.items()
        for flags in (COLUMNS if name == "backward_columns" else ({},))
        for tile in tiles
    ]


if __name__ == "__main__":
    sys.exit(main())
