"""Reads files of weights as data: nothing that they name is imported, called or executed.

What `torch.save` writes is a ZIP archive: FOLDER/data.pkl is a pickle (recipe/restricted.py), and
FOLDER/data/KEY are the bytes of a storage. torch never compresses, so what is compressed, or declares more
than the file has, is refused before anything of that size is made.

A snapshot of TVM is a pickle of whole modules, with the Python source that the official loader executes
inside. Its parameters are found by their place in the tree of modules. Snapshots of plain and of compiled
networks (torch.compile), written on a CPU or a GPU, are accepted; anything else is refused.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
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
SAVED = {TENSOR, PARAMETER, "collections.OrderedDict", "argparse.Namespace", *DTYPES, *OTHERS}
AVERAGES = {"ema": ("ema", "model_ema"), "net": ("model",)}
NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
UNREAD = re.compile(r"^projectors\.|(^|\.)rope_freqs$")
MAX_PICKLE = 2**26  # a hundred times that of SiT-XL/2 with its optimizer
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, KeyError, UnicodeError)

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
STORAGE = "torch.storage._load_from_bytes"
MODULES = {"timm.layers.mlp.Mlp", "timm.layers.patch_embed.PatchEmbed", "training.dit.Attention"}
MODULES |= {f"torch.nn.modules.{name}" for name in ("activation.GELU", "activation.SiLU", "conv.Conv2d")}
MODULES |= {f"torch.nn.modules.{name}" for name in ("container.ModuleList", "container.Sequential")}
MODULES |= {f"torch.nn.modules.{name}" for name in ("dropout.Dropout", "linear.Identity", "linear.Linear")}
MODULES |= {f"torch.nn.modules.{name}" for name in ("normalization.RMSNorm", "sparse.Embedding")}
SETTINGS = {"builtins.dict", "builtins.getattr", "builtins.int", "builtins.list", "typing.Any"}
SETTINGS |= {"collections.OrderedDict", "collections.defaultdict", "contextlib.nullcontext"}
SETTINGS |= {"omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode"}
SETTINGS |= {"omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"}
SETTINGS |= {"timm.layers.format.Format", "torch.bfloat16", "torch._TorchCompileInductorWrapper"}
SETTINGS |= {"torch._dynamo.convert_frame.CatchErrorsWrapper", "torch._dynamo.convert_frame.ConvertFrame"}
SETTINGS |= {"torch._dynamo.convert_frame.ConvertFrameAssert", "torch._dynamo.eval_frame.OptimizeContext"}
SETTINGS |= {"torch._dynamo.hooks.Hooks", "torch._dynamo.repro.after_dynamo.WrapBackendDebug"}
SNAPSHOT = MODULES | SETTINGS | {PERSISTENT, COMPILED, PARAMETER, TENSOR, STORAGE}
# torch.save before zip files: three pickles that say this much, then the storage.
STREAM_HEADER = [
    0x1950A86A20F9469CFC6C,
    1001,
    {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
]
MAX_STREAM_OPERATIONS = 100
MAX_DEPTH = 16


def tensor(node: object, where: str, values: Callable[[object, str], Tensor]) -> Tensor:
    """Return one tensor in float32, which must cover a storage of its own exactly. Raises RefusedPickle.

    where: its name, for messages; values: from a storage and that name to a copy of its numbers, (n,).
    """
    if type(node) is Node and node.function == PARAMETER:
        node = arguments(node, PARAMETER, where, 3)[0]
    storage, offset, size, stride = arguments(node, TENSOR, where, 6, 7)[:4]
    flat = values(storage, where)
    check_layout(offset, size, stride, len(flat), where)
    return flat.float().reshape(size)


def use_once(key: object, where: str, used: set[object]) -> None:
    """Add a key to those used. Raises RefusedPickle where it is there.

    A pickle may refer to one object any number of times: memory and time could grow exponentially with it.
    """
    if key in used:
        raise RefusedPickle(f"{where}: shared with another tensor or module")
    used.add(key)


# ---------------------------------------------------------------- files of torch.save


class TorchFile:
    """An open file of `torch.save`. content: what its pickle holds, with tensors as `Node`s."""

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
        self.content = read_stream(io.BytesIO(archive.read(pickles[0])), SAVED)

    def values(self, storage: object, where: str) -> Tensor:
        """Return the numbers of a storage, which is read once. Raises RefusedPickle, or one of DAMAGE."""
        match storage:
            case Node("persistent id", ("storage", Global(kind), str(key), str(), int(numel))):
                pass
            case _:
                raise RefusedPickle(f"{where}: not a tensor with a storage")
        member = self.members.get(f"{self.folder}/data/{key}")
        if kind not in DTYPES:
            raise RefusedPickle(f"{where}: of {kind}, not of floating point numbers")
        if member is None or not 0 < member.file_size == numel * DTYPES[kind].itemsize:
            raise RefusedPickle(f"{where}: its storage is empty, or not in the file as declared")
        use_once(key, where, self.used)
        return torch.frombuffer(bytearray(self.archive.read(member)), dtype=DTYPES[kind])


def read_state(path: str | Path, average: str) -> tuple[dict[str, Tensor], str, list[str]]:
    """Return a state dict in float32, which average of the weights it is, and the names that are left out.

    The file holds the state dict itself, taken for an average, or beside others an average as `ema` or
    `model_ema` and the weights as they are, `net`, as `model`. Left out are REPA's projectors and tables of
    rotations. Raises RefusedPickle, or one of DAMAGE.
    """
    with zipfile.ZipFile(path) as archive:
        file = TorchFile(archive, Path(path).stat().st_size)
        content = file.content if type(file.content) is dict else {}
        held = [key for key in AVERAGES[average] if key in content]
        named = named_tensors(content[held[0]] if held else content, average)
        unread = [name for name in named if UNREAD.search(name)]
        state = {name: tensor(node, name, file.values) for name, node in named.items() if name not in unread}
    return state, average if held else "ema", unread


def named_tensors(state: object, average: str) -> dict[str, Node]:
    """Return the tensors of a state dict by their names without `module.`. Raises RefusedPickle."""
    if not state or type(state) is not dict or not all(type(x) is Node for x in state.values()):
        names = " or ".join(AVERAGES[average])
        raise RefusedPickle(f"neither a state dict of tensors nor a checkpoint that holds one as {names}")
    if wrong := [name for name in state if type(name) is not str or not NAME.fullmatch(name)]:
        raise RefusedPickle(f"{str(wrong[0])[:50]!r} is not the name of a parameter")
    named = {name.removeprefix("module."): node for name, node in state.items()}
    if len(named) < len(state):
        raise RefusedPickle("two of its names mean the same tensor")
    return named


# ---------------------------------------------------------------- snapshots of TVM


def read_snapshot(content: object) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """Return the float32 parameters of a snapshot, and what it says of itself: do_scale_param, detach_jvp,
    time_specinit.

    content: of the pickle, whose tensors are freed. Raises RefusedPickle for what is no snapshot, and for a
    network whose modulation is not normalised, which shapes do not show.
    """
    if type(content) is not dict or "net" not in content:
        raise RefusedPickle("not a snapshot: the pickle is not a dict with the key 'net'")
    network = content["net"]
    if type(network) is Node and network.function == COMPILED:
        network = arguments(network, COMPILED, "net", 2)[0]
    wrapper = attributes_of(network, "net")
    children = get(wrapper, "_modules", dict, "net")
    if list(children) != ["model"]:
        raise RefusedPickle("net: its only child has to be 'model'")
    used: set[object] = set()
    values = partial(stream_values, used=used)
    state = {name: tensor(node, name, values) for name, node in parameters(children["model"], "", used)}
    model = attributes_of(children["model"], "model")
    modules = get(model, "_modules", dict, "model")
    blocks = get(attributes_of(modules.get("blocks"), "blocks"), "_modules", dict, "blocks")
    for module in (*blocks.values(), modules.get("final_layer")):
        if not get(attributes_of(module, "blocks, final_layer"), "do_mod_norm", bool, "blocks, final_layer"):
            raise RefusedPickle("a network without modulation norm (do_mod_norm is false)")
    said = {name: get(wrapper, name, bool, "net") for name in ("do_scale_param", "detach_jvp")}
    return state, {**said, "time_specinit": get(model, "time_specinit", bool, "model")}


def attributes_of(module: object, where: str) -> dict:
    """Return the `__dict__` of a persistent or ordinary module. Raises RefusedPickle."""
    if type(module) is Node and module.function in MODULES:
        attributes = module.state
    else:
        (meta,) = arguments(module, PERSISTENT, where, 1)  # its `module_src` is code, of no concern here
        if type(meta) is not dict or meta.get("type") != "class" or meta.get("version") != 6:
            raise RefusedPickle(f"{where}: not a persistent class of version 6")
        attributes = meta.get("state")
    if type(attributes) is not dict:
        raise RefusedPickle(f"{where}: a module without attributes")
    return attributes


def get(attributes: dict, name: str, kind: type, where: str) -> object:
    """Return an attribute of this type. Raises RefusedPickle."""
    value = attributes.get(name)
    if type(value) is not kind:
        raise RefusedPickle(f"{where}: {name} is not of type {kind.__name__}")
    return value


def parameters(module: object, prefix: str, used: set[object]) -> Iterator[tuple[str, object]]:
    """Yield the names and nodes of the parameters of `module` and those below it.

    used: keys of the modules and storages met so far. Raises RefusedPickle.
    """
    where = prefix or "model"
    if prefix.count(".") > MAX_DEPTH:
        raise RefusedPickle("modules are nested too deeply")
    attributes = attributes_of(module, where)
    use_once(id(module), where, used)
    if get(attributes, "_buffers", dict, where):
        raise RefusedPickle(f"{where}: unexpected buffers")
    named, children = (get(attributes, name, dict, where) for name in ("_parameters", "_modules"))
    for key in (*named, *children):
        if type(key) is not str or not re.fullmatch(r"[A-Za-z0-9_]{1,64}", key):
            raise RefusedPickle(f"{where}: a key that is not the name of a module or parameter")
    yield from ((f"{prefix}{key}", node) for key, node in named.items() if node is not None)
    for key, child in children.items():
        if child is not None:
            yield from parameters(child, f"{prefix}{key}.", used)


def stream_values(storage: object, where: str, used: set[object]) -> Tensor:
    """Return the numbers of a storage of torch.save before zip files, and free its bytes.

    They are five pickles, a count and float32. used: see `parameters`. Raises RefusedPickle.
    """
    (data,) = arguments(storage, STORAGE, where, 1)
    if type(data) is not bytes:
        raise RefusedPickle(f"{where}: a storage that is not bytes")
    use_once(id(data), where, used)
    stream = io.BytesIO(data)
    header = [read_stream(stream, (), MAX_STREAM_OPERATIONS) for _ in STREAM_HEADER]
    reference = read_stream(stream, {"torch.FloatStorage"}, MAX_STREAM_OPERATIONS)
    keys = read_stream(stream, (), MAX_STREAM_OPERATIONS)
    if header != STREAM_HEADER:
        raise RefusedPickle(f"{where}: not a storage written by torch.save")
    start = stream.tell() + 8
    match reference:
        case Node("persistent id", ("storage", Global("torch.FloatStorage"), str(key), str(), int(n), None)):
            known = keys == [key] and len(data) == start + 4 * n
            if known and n >= 0 and data[start - 8 : start] == struct.pack("<q", n):
                storage.args = None
                return torch.from_numpy(np.frombuffer(data, "<f4", n, start).astype(np.float32))
    raise RefusedPickle(f"{where}: a storage that is not one array of float32 of the declared length")
