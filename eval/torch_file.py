"""Reads a file that `torch.save` wrote as data: nothing that it names is imported, called or executed.

Such a file is a ZIP archive: FOLDER/data.pkl is a pickle (recipe/restricted.py), and FOLDER/data/KEY are
the bytes of a storage. torch never compresses, so what is compressed, or declares more than the file has, is
refused before anything of that size is made; what is read is never larger than the file.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from recipe.restricted import (
    PARAMETER,
    TENSOR,
    Global,
    Node,
    RefusedPickle,
    arguments,
    check_layout,
    read_stream,
)

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
}
# What else a training checkpoint may hold: counters and settings of its run, which nobody asks for here.
OTHERS = {"torch.LongStorage", "torch.IntStorage", "torch.ByteStorage", "torch.BoolStorage", "torch.Size"}
OTHERS |= {"torch.float32", "torch.float16", "torch.bfloat16", "torch.device", "torch.ComplexFloatStorage"}
ALLOWED = {TENSOR, PARAMETER, "collections.OrderedDict", "argparse.Namespace", *DTYPES, *OTHERS}
AVERAGES = {"ema": ("ema", "model_ema"), "net": ("model",)}
NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
UNREAD = re.compile(r"^projectors\.|(^|\.)rope_freqs$")
MAX_PICKLE = 2**26  # a hundred times that of SiT-XL/2 with its optimizer
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, KeyError, ValueError)


class TorchFile:
    """An open file of `torch.save`. content: what its pickle holds, tensors as `Node`s (see `tensor`)."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        """Read the pickle of a file of `size` bytes. Raises RefusedPickle, or one of DAMAGE."""
        self.archive, self.used = archive, set()
        self.members = {info.filename: info for info in archive.infolist()}
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise RefusedPickle(f"{info.filename[:200]!r} is compressed, which torch.save never does")
        if len(self.members) < len(archive.infolist()) or sum(x.file_size for x in archive.infolist()) > size:
            raise RefusedPickle("its members overlap, or share a name")
        pickles = [name for name in self.members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or self.members[pickles[0]].file_size > MAX_PICKLE:
            raise RefusedPickle(f"not a file of torch.save: no data.pkl of at most {MAX_PICKLE} bytes")
        self.folder = pickles[0].removesuffix("/data.pkl")
        order = f"{self.folder}/byteorder"
        if order in self.members and archive.read(order) != b"little":
            raise RefusedPickle("its byte order is not little")
        self.content = read_stream(io.BytesIO(archive.read(pickles[0])), ALLOWED)

    def tensor(self, node: object, where: str) -> Tensor:
        """Return a copy of one tensor, in float32. It must cover a storage of its own exactly.

        where: its name, for messages. Raises RefusedPickle, or one of DAMAGE.
        """
        if type(node) is Node and node.function == PARAMETER:
            node = arguments(node, PARAMETER, where, 3)[0]
        storage, offset, size, stride = arguments(node, TENSOR, where, 6, 7)[:4]
        match storage:
            case Node("persistent id", ("storage", Global(kind), str(key), str(), int(numel))):
                pass
            case _:
                raise RefusedPickle(f"{where}: not a tensor with a storage")
        member = self.members.get(f"{self.folder}/data/{key}")
        if kind not in DTYPES:
            raise RefusedPickle(f"{where}: of {kind}, not of floating point numbers")
        if member is None or member.file_size != numel * DTYPES[kind].itemsize:
            raise RefusedPickle(f"{where}: its storage is not in the file as declared")
        check_layout(offset, size, stride, numel, where)
        if key in self.used:
            raise RefusedPickle(f"{where}: shared with another tensor")
        self.used.add(key)
        return (
            torch.frombuffer(bytearray(self.archive.read(member)), dtype=DTYPES[kind]).float().reshape(size)
        )


def read_state(path: str | Path, average: str = "ema") -> tuple[dict[str, Tensor], str, list[str]]:
    """Return a state dict in float32, which average of the weights it is, and the names that are left out.

    The file holds the state dict itself, taken for an average, or beside others an average as `ema` or
    `model_ema` and the weights as they are, `net`, as `model`. Left out are REPA's projectors and tables of
    rotations. Raises OSError, RefusedPickle.
    """
    with open_torch_file(path) as file:
        content = file.content if type(file.content) is dict else {}
        held = [key for key in AVERAGES[average] if key in content]
        state = content[held[0]] if held else content
        if not state or type(state) is not dict or not all(type(x) is Node for x in state.values()):
            names = " or ".join(AVERAGES[average])
            raise RefusedPickle(f"neither a state dict of tensors nor a checkpoint that holds one as {names}")
        if wrong := [name for name in state if type(name) is not str or not NAME.fullmatch(name)]:
            raise RefusedPickle(f"{str(wrong[0])[:50]!r} is not the name of a parameter")
        named = {name.removeprefix("module."): node for name, node in state.items()}
        if len(named) < len(state):
            raise RefusedPickle("two of its names mean the same tensor")
        unread = [name for name in named if UNREAD.search(name)]
        tensors = {name: file.tensor(node, name) for name, node in named.items() if name not in unread}
        return tensors, average if held else "ema", unread


@contextmanager
def open_torch_file(path: str | Path) -> Iterator[TorchFile]:
    """Open a file of `torch.save`. Raises OSError where it cannot be opened.

    What is refused, or damaged, while it is open is a RefusedPickle that names the file.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield TorchFile(archive, Path(path).stat().st_size)
        except RefusedPickle as error:
            raise RefusedPickle(f"{path}: refused: {error}") from error
        except DAMAGE as error:
            raise RefusedPickle(f"{path}: refused: damaged ({str(error)[:200]})") from error
