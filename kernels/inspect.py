"""Compiles the kernels for sm_80 and sm_90, without a GPU, and prints what the assembler made of them.

    python -m kernels.inspect               # the table's own configurations; exits with 1 where a bar is missed
    python -m kernels.inspect --candidates  # tiles that were considered beside them, no bars

Bars (bf16): at D = 64 no spills, at most 21 tile products backward, on sm_90 every product a wgmma and none
followed by a wait of the assembler's own (ptxas C7510 to C7519); at D = 128 spills of 64 bytes per thread at most.
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

from kernels import configs, triton_attention
from kernels.configs import Tile

ARCHITECTURES = (80, 90)
HEAD_DIMS = (64, 128)
SPILL_LIMIT = {64: 0, 128: 64}
BACKWARD_PRODUCTS = 21
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10}
RELEASED = "released kernels, D 64, sm_90: spills 304, 112, 8, 0, 0, 0 bytes over 6 kernels with 30 products, and 5"

MATRICES = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
TANGENTS = ("tq", "tk", "tv", "to", "dto", "dtq", "dtk", "dtv")
STATISTICS = ("lse", "mu", "delta", "a")
SCALARS = {"scale": "fp32", "heads": "i32", "n_q": "i32", "n_k": "i32"}

CANDIDATES = {
    "forward": (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    "backward_rows": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 16, 8, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)),
    "backward_columns": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(16, 128, 8, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(16, 64, 4, 2)),
}  # fmt: skip


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
        """Blocks that registers and shared memory (1 KB of which is the system's, per block) let run at once."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.tile.warps)
        return min(by_registers, SHARED_PER_SM[self.arch] // (self.shared + 1024))


def compile_kernel(name: str, tile: Tile, head_dim: int, arch: int, **flags: bool) -> Compiled:
    """Compile one kernel in bf16 with all tangents for whole tiles of 16-byte aligned matrices."""
    kernel = getattr(triton_attention, name)
    constants = {
        "D": head_dim, "BLOCK_D": head_dim, "BLOCK_Q": tile.queries, "BLOCK_K": tile.keys,
        "MASKED": False, "PRECISION": "ieee", **flags,
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
        spills=max(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups())),
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
    together = len(config.columns) == 1
    return [
        compile_kernel("forward", config.forward, head_dim, arch),
        compile_kernel("backward_rows", config.rows, head_dim, arch),
        *(
            compile_kernel(
                "backward_columns", tile, head_dim, arch, KEYS=together or part == 0, VALUES=together or part == 1
            )
            for part, tile in enumerate(config.columns)
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
        missed += [f"{kernel.name} has products that are no wgmma" for kernel in kernels if kernel.mma or not kernel.wgmma]
        missed += [f"{kernel.name} has its wgmma serialised" for kernel in kernels if kernel.serialised]
    return [f"sm_{arch} D {head_dim}: {bar}" for bar in missed]


def print_table(kernels: list[Compiled]) -> None:
    """One line of Markdown per kernel."""
    print("| arch | D | kernel | queries x keys, warps, stages | registers | spills | shared | blocks/SM | products | wgmma | mma | serialised |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for k in kernels:
        tile = f"{k.tile.queries} x {k.tile.keys}, {k.tile.warps}, {k.tile.stages}"
        print(f"| sm_{k.arch} | {k.head_dim} | {k.name} | {tile} | {k.registers} | {k.spills} | {k.shared} | {k.blocks_per_sm} | {k.products} | {k.wgmma} | {k.mma} | {'yes' if k.serialised else 'no'} |")


def main() -> int:
    """Print the table or the candidates; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", action="store_true", help="compile tiles beside the table's own")
    pairs = [(arch, head_dim) for arch in ARCHITECTURES for head_dim in HEAD_DIMS]
    print(f"triton {triton.__version__}, bf16, all tangents, whole tiles")
    if parser.parse_args().candidates:
        print_table([kernel for pair in pairs for kernel in candidate_kernels(*pair)])
        return 0
    groups = [table_kernels(*pair) for pair in pairs]
    print_table([kernel for kernels in groups for kernel in kernels])
    print(f"For comparison: {RELEASED} in a separate primal backward.")
    missed = [bar for kernels in groups for bar in missed_bars(kernels)]
    print("\n".join(missed) or "Every bar is met.")
    return int(bool(missed))


def candidate_kernels(arch: int, head_dim: int) -> list[Compiled]:
    """The candidate tiles of every kernel, backward_columns in one launch and in two."""
    splits = {"backward_columns": ({"KEYS": True, "VALUES": True}, {"KEYS": True, "VALUES": False}, {"KEYS": False, "VALUES": True})}
    return [
        compile_kernel(name, tile, head_dim, arch, **flags)
        for name, tiles in CANDIDATES.items()
        for flags in splits.get(name, ({},))
        for tile in tiles
    ]


if __name__ == "__main__":
    sys.exit(main())
