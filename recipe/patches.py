"""What this project replaces inside Composer, Streaming and FSDP2, and what else it knows of their insides.

To be read before an upgrade; tests/test_patches.py fails when any of it changes.

Replaced, by the functions below:

    composer.distributed.fsdp2.MixedPrecisionPolicy (mosaicml 0.32.1)
        breaks where Composer gets its policy elsewhere
    torch.distributed.fsdp._fully_shard._fsdp_collectives._get_gradient_divide_factors (torch 2.7 to 2.11)
        breaks where another argument than the third is the dtype; to be removed when pytorch 162338 is mended
    streaming.base.dataset.get_shm_prefix (streaming 0.13.0)
        breaks where names are not NNNNNN_* in /dev/shm and NNNNNN_*_filelock in the temporary folder, or who
        waits for a lock file does not notice that it has been unlinked (filelock 4.2)
    the default of allow_tf32 in composer.devices.DeviceGPU (mosaicml 0.32.1)
        breaks where TF32 is allowed elsewhere than in its __init__

Overridden in subclasses, where the reasons stand:

    Stream._download_file, StreamingDataset.prepare_shard, _prepare_thread, _ready_thread, _event and
        _shard_states (streaming 0.13.0), in recipe/data.py
    CheckpointSaver._save_checkpoint (mosaicml 0.32.1), in recipe/checkpoints.py
"""

import fcntl
import itertools
import os
from contextlib import nullcontext
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from tempfile import gettempdir
from typing import IO

import streaming.base.dataset
import torch
from composer.devices import DeviceGPU
from composer.distributed import fsdp2
from composer.utils import dist
from streaming.base.constant import LOCALS
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _get_path, _pack_locals
from streaming.base.world import World
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

SHARED = Path("/dev/shm")
ANY = "[0-9]" * 6
CLAIMED = b"terminal-velocity"  # ends the content of NNNNNN_locals, after what Streaming reads of it

_divide_factors = _fsdp_collectives._get_gradient_divide_factors


def exact_float32() -> None:
    """Make float32 mean float32 in this process: what `precision: fp32` says in training and in sampling.

    On a GPU, products and convolutions may round their operands to TF32, 10 bits of mantissa instead of 23.
    That is switched off for both; the attention kernels ask the same switch. Composer would switch it on
    again with each DeviceGPU that it makes, one of them while it loads a checkpoint.
    """
    DeviceGPU.__init__.__kwdefaults__["allow_tf32"] = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def gather_weights_alone() -> None:
    """Let FSDP2 cast weights, but neither the times that enter the network nor its residual stream."""
    fsdp2.MixedPrecisionPolicy = partial(MixedPrecisionPolicy, cast_forward_inputs=False)


def divide_gradients_explicitly() -> None:
    """Let FSDP2 sum and divide, as for fp16: gloo's reduce_scatter takes AVG for SUM (pytorch 162338)."""

    def explicit(scatter_group: object, reduce_group: object, _dtype: torch.dtype, *rest: object) -> object:
        return _divide_factors(scatter_group, reduce_group, torch.float16, *rest)

    _fsdp_collectives._get_gradient_divide_factors = explicit


def choose_names_once() -> None:
    """Let one rank choose Streaming's names: each would take the first free number, which jobs change."""
    streaming.base.dataset.get_shm_prefix = claim_names


def claim_names(local: list[str], _remote: list[str | None], world: World) -> tuple[int, SharedMemory]:
    """Return the number NNNNNN of all of this job's names on this node, and its claim, NNNNNN_locals.

    Local rank 0 chooses and tells the ranks of its node; all ranks call this. The number is the job's that
    creates NNNNNN_locals, so jobs that start together do not wait for each other.
    """
    number = memory = None
    if world.is_local_leader:
        remove_dead_names()
        number, memory = create_locals(local)
    number = dist.all_gather_object(number)[world.node * world.ranks_per_node]
    # After the loader's workers have ended, which would make the files again
    Finalize(None, remove_lock_files, (f"{number:06}",), exitpriority=-1)
    return number, memory or SharedMemory(_get_path(number, LOCALS), False)


def create_locals(local: list[str]) -> tuple[int, SharedMemory]:
    """Create NNNNNN_locals of the first number without names and lock files, locked until the job ends."""
    taken = {path.name[:6] for path in (*names(ANY), *lock_files(ANY))}
    for number in itertools.filterfalse(lambda n: f"{n:06}" in taken, itertools.count()):
        content = _pack_locals(local, number) + CLAIMED
        try:
            memory = SharedMemory(_get_path(number, LOCALS), True, len(content))
            break
        except FileExistsError:  # another job was faster
            continue
    memory.lock = seize(SHARED / _get_path(number, LOCALS), wait=True)
    memory.buf[: len(content)] = content  # after the lock: claimed and not locked means dead
    return number, memory


def names(number: str) -> list[Path]:
    """Return the paths of Streaming's shared memory of one number, or of ANY."""
    return list(SHARED.glob(f"{number}_*"))


def lock_files(number: str) -> list[Path]:
    """Return Streaming's lock files of one number, or of ANY."""
    return list(Path(gettempdir()).glob(f"{number}_*_filelock"))


def seize(path: Path, wait: bool = False) -> IO[bytes] | None:
    """Lock a file of this user until it is closed here and in forked children; None if it is taken."""
    try:
        file = path.open("rb")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return None
    status = os.fstat(file.fileno())
    return file if status.st_nlink and status.st_uid == os.getuid() else None


def remove_dead_names() -> None:
    """Delete names that `claim_names` claimed and no job locks, and lock files of numbers without names."""
    for path in SHARED.glob(f"{ANY}_{LOCALS}"):
        with seize(path) or nullcontext() as file:
            if file and file.read().endswith(CLAIMED):
                remove_lock_files(path.name[:6])  # first: without its names the number is anybody's
                for left in sorted(names(path.name[:6]), key=lambda left: left == path):
                    left.unlink(missing_ok=True)
    alive = {path.name[:6] for path in names(ANY)}
    for number in {path.name[:6] for path in lock_files(ANY)} - alive:
        remove_lock_files(number)


def remove_lock_files(number: str) -> None:
    """Delete this user's lock files that no process holds. A process waiting for one creates another."""
    for path in lock_files(number):
        with seize(path) or nullcontext() as file:
            if file:
                path.unlink(missing_ok=True)
