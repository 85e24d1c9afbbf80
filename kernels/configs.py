"""Tile sizes of the Triton kernels by (architecture, padded head dimension), and how they were chosen.

Timing: not measured yet. The entries are judgements from compiled code, to be replaced by what
`python -m benchmarks.attention --tune` measures of them and of CANDIDATES. Every entry keeps to the
inspector's bars on spills. On sm_90, of the tiles that do, the widest score product up to 64 (a narrower
wgmma waits for its left operand in shared memory), then the larger resident side (queries by rows, keys by
columns), which re-reads the other side less; at D = 64 by columns two blocks of 64 keys share a
multiprocessor. On sm_80 the resident side comes first, and entries stay under the 99 KB of shared memory that
a block has on consumer GPUs. On sm_100 accumulators lie in tensor memory, whose 512 columns limit tiles.
Sequence length has no entry until a measurement asks for one.
"""

from dataclasses import dataclass

import triton

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


@dataclass(frozen=True)
class Tile:
    """The tile of a launch: `queries` x `keys` scores at a time, `warps` warps, loads `stages` deep."""

    queries: int
    keys: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Config:
    """The tiles of the three kernels; two in `columns` are a launch for dk, dtk and another for dv, dtv.

    normed: the tile of the forward kernel that norms queries and keys, if `forward` takes too many registers.
    """

    forward: Tile
    rows: Tile
    columns: tuple[Tile, ...]
    normed: Tile | None = None


# From D = 96 on four accumulators of (keys, D) would fill the register file, hence two launches by columns,
# of 9 and 6 products where one would do with 12.
TABLE = {
    (80, 64): Config(Tile(128, 64, 8), Tile(64, 32, 4), (Tile(16, 64, 4),), Tile(128, 32, 8)),
    (80, 80): Config(Tile(128, 32, 8), Tile(64, 32, 4), (Tile(16, 64, 4),), Tile(128, 16, 8)),
    (80, 96): Config(Tile(128, 32, 8), Tile(64, 16, 4), (Tile(16, 64, 4), Tile(16, 64, 4)), Tile(128, 16, 8)),
    (80, 128): Config(Tile(128, 16, 8), Tile(32, 32, 4), (Tile(32, 32, 4), Tile(32, 32, 4)), Tile(32, 16, 4)),
    (90, 64): Config(Tile(128, 64, 8), Tile(128, 64, 8), (Tile(32, 64, 4),), Tile(128, 32, 8)),
    (90, 80): Config(Tile(128, 64, 8), Tile(128, 64, 8), (Tile(16, 64, 4),), Tile(128, 32, 8)),
    (90, 96): Config(Tile(128, 64, 8), Tile(128, 32, 8), (Tile(32, 64, 4), Tile(32, 64, 4)), Tile(64, 16, 4)),
    (90, 128): Config(Tile(128, 64, 8), Tile(128, 32, 8), (Tile(32, 128, 8), Tile(64, 128, 8))),
    (100, 64): Config(Tile(128, 64, 8), Tile(64, 64, 4), (Tile(64, 64, 8),)),
    (100, 80): Config(Tile(64, 32, 4), Tile(64, 32, 4), (Tile(16, 64, 4), Tile(32, 64, 4)), Tile(128, 32, 8)),
    (100, 96): Config(Tile(64, 32, 4), Tile(64, 32, 4), (Tile(32, 64, 4), Tile(32, 64, 4)), Tile(128, 16, 8)),
    (100, 128): Config(Tile(64, 32, 4), Tile(64, 32, 4), (Tile(32, 64, 4), Tile(32, 64, 4)), Tile(64, 16, 4)),
}
if TRITON < (3, 4):  # which keeps a descriptor per k-step of each resident tile in registers
    TABLE[90, 64] = Config(Tile(128, 64, 8), Tile(128, 64, 8), (Tile(32, 64, 4),))
    TABLE[90, 80] = Config(Tile(128, 64, 8), Tile(128, 32, 8), (Tile(16, 64, 4),))
    TABLE[90, 96] = Config(
        Tile(128, 64, 8), Tile(128, 32, 8), (Tile(32, 64, 4), Tile(32, 64, 4)), Tile(128, 32, 8)
    )
    TABLE[90, 128] = Config(Tile(128, 32, 8), Tile(128, 16, 8), (Tile(16, 128, 8), Tile(32, 128, 8)))
# Consumer Blackwell (sm_120) has the instructions and the shared memory of consumer Ampere.
TABLE |= {(120, width): config for (arch, width), config in TABLE.items() if arch == 80}
TABLE[120, 80] = Config(
    Tile(128, 32, 8), Tile(64, 32, 4), (Tile(16, 64, 4), Tile(16, 64, 4)), Tile(128, 16, 8)
)

# Tiles to try, by kernel: queries, keys, warps
ROWS = [(128, 64, 8), (128, 32, 8), (128, 16, 8), (64, 64, 4), (64, 32, 4), (32, 32, 4)]
CANDIDATES = {
    "forward": [(128, 128, 8), *ROWS],
    "backward_rows": ROWS,
    "backward_columns": [*((queries, keys, warps) for keys, queries, warps in ROWS), (16, 64, 4)],
}

# float32 operands pass through registers, as three tf32 parts each: tiny tiles on every architecture.
FLOAT32 = Config(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)))


def widths(head_dim: int) -> tuple[int, int]:
    """Return the width that D is padded to, as (power of two from 16 on, tail of 0, 16 or 32)."""
    if 64 < head_dim <= 96:
        return 64, 16 if head_dim <= 80 else 32
    return max(16, triton.next_power_of_2(head_dim)), 0


def table_key(capability: tuple[int, int], head_dim: int) -> tuple[int, int]:
    """Return the key in TABLE of a CUDA compute capability and a head dimension up to 128."""
    arch = {9: 90, 10: 100, 12: 120}.get(capability[0], 80)
    return arch, max(64, sum(widths(head_dim)))


def choose(capability: tuple[int, int], head_dim: int, element_size: int) -> Config:
    """Return the configuration for a compute capability, a head dimension up to 128 and bytes per element."""
    return FLOAT32 if element_size == 4 else TABLE[table_key(capability, head_dim)]
