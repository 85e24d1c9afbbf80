"""TVM's released weights, for `eval.import_weights`.

A snapshot is a pickle of whole modules, with the Python source that the official loader executes inside. Here
it is read as data (`recipe.restricted`): parameters are found by their place in the tree of modules, their
values are copied from the raw bytes, and names and shapes are compared with our network. Snapshots of plain
and of compiled networks (torch.compile), written on a CPU or a GPU, are accepted; anything else is refused.
"""

import io
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipe.dit import DiTConfig, position_embedding
from recipe.restricted import (
    PARAMETER,
    TENSOR,
    Global,
    Node,
    RefusedPickle,
    arguments,
    check_layout,
    read_file,
    read_stream,
)
from recipe.settings import make
from recipe.weights import shapes

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
STORAGE = "torch.storage._load_from_bytes"
FLOAT_STORAGE = "torch.FloatStorage"

MODULES = {
    "timm.layers.mlp.Mlp",
    "timm.layers.patch_embed.PatchEmbed",
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.normalization.RMSNorm",
    "torch.nn.modules.sparse.Embedding",
    "training.dit.Attention",
}
SETTINGS = {
    "builtins.dict",
    "builtins.getattr",
    "builtins.int",
    "builtins.list",
    "collections.OrderedDict",
    "collections.defaultdict",
    "contextlib.nullcontext",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "timm.layers.format.Format",
    "torch._TorchCompileInductorWrapper",
    "torch._dynamo.convert_frame.CatchErrorsWrapper",
    "torch._dynamo.convert_frame.ConvertFrame",
    "torch._dynamo.convert_frame.ConvertFrameAssert",
    "torch._dynamo.eval_frame.OptimizeContext",
    "torch._dynamo.hooks.Hooks",
    "torch._dynamo.repro.after_dynamo.WrapBackendDebug",
    "torch.bfloat16",
    "typing.Any",
}
ALLOWED = MODULES | SETTINGS | {PERSISTENT, COMPILED, PARAMETER, TENSOR, STORAGE}

# torch.save before zip files: three pickles that say this much, then the storage.
STREAM_HEADER = [
    0x1950A86A20F9469CFC6C,
    1001,
    {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
]
MAX_STREAM_OPERATIONS = 100
MAX_DEPTH = 16

# Latent side => mean and standard deviation per channel of unscaled sd-vae-ft-ema latents (TVM's runs).
LATENTS = {
    32: ([0.86488, -0.27787343, 0.21616915, 0.3738409], [4.85503674, 5.31922414, 3.93725398, 3.9870003]),
    64: ([1.56, -0.695, 0.483, 0.729], [5.27, 5.91, 4.21, 4.31]),
}


def read_snapshot(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read a released snapshot, executing nothing.

    Returns the float32 parameters by the names of `recipe.dit.DiT` (the fixed position embedding is checked
    and left out), and facts: `model`, the arguments of `recipe.dit.DiTConfig`, and `method` with `objective`,
    `scaled` and `detach_jvp`. Raises OSError where the file cannot be opened, RefusedPickle where it is
    damaged, names a global that snapshots do not, or holds another network.
    """
    snapshot = read_file(path, ALLOWED)
    try:
        if type(snapshot) is not dict or "net" not in snapshot:
            raise RefusedPickle("not a snapshot: the pickle is not a dict with the key 'net'")
        network = snapshot["net"]
        if type(network) is Node and network.function == COMPILED:
            network = arguments(network, COMPILED, "net", 2)[0]
        wrapper = _attributes(network, "net")
        children = _get(wrapper, "_modules", dict, "net")
        if list(children) != ["model"]:
            raise RefusedPickle("net: its only child has to be 'model'")
        state = dict(_parameters(children["model"], "", set()))
        facts = _facts(wrapper, children["model"], state)
        _check_against_network(state, DiTConfig(**facts["model"]))
    except RefusedPickle as error:
        raise RefusedPickle(f"{path}: {error}") from error
    del state["pos_embed"]
    return state, facts


def _attributes(module: object, where: str) -> dict:
    """Return the `__dict__` of a persistent or ordinary module."""
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


def _get(attributes: dict, name: str, kind: type, where: str) -> object:
    value = attributes.get(name)
    if type(value) is not kind:
        raise RefusedPickle(f"{where}: {name} is not of type {kind.__name__}")
    return value


def _parameters(module: object, prefix: str, used: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of the parameters of `module` and those below it.

    `used` holds the modules and storages met so far: memory and time could otherwise grow exponentially with
    the file, since a pickle may refer to one object any number of times.
    """
    where = prefix or "model"
    if prefix.count(".") > MAX_DEPTH:
        raise RefusedPickle("modules are nested too deeply")
    attributes = _attributes(module, where)
    _use_once(module, where, used)
    if _get(attributes, "_buffers", dict, where):
        raise RefusedPickle(f"{where}: unexpected buffers")
    for key, parameter in _get(attributes, "_parameters", dict, where).items():
        name = _extend(prefix, key)
        if parameter is not None:
            yield name, _tensor(parameter, name, used)
    for key, child in _get(attributes, "_modules", dict, where).items():
        if child is not None:
            yield from _parameters(child, f"{_extend(prefix, key)}.", used)


def _extend(prefix: str, key: object) -> str:
    if type(key) is not str or not re.fullmatch(r"[A-Za-z0-9_]{1,64}", key):
        raise RefusedPickle(f"{prefix or 'model'}: a key that is not the name of a module or parameter")
    return f"{prefix}{key}"


def _use_once(thing: object, where: str, used: set[int]) -> None:
    if id(thing) in used:
        raise RefusedPickle(f"{where}: shared with another module or parameter")
    used.add(id(thing))


def _tensor(parameter: object, where: str, used: set[int]) -> Tensor:
    """Copy one parameter, freeing its bytes. Snapshots have whole, contiguous float32 storages alone."""
    tensor = arguments(parameter, PARAMETER, where, 3)[0]
    storage, offset, size, stride = arguments(tensor, TENSOR, where, 6, 7)[:4]
    (data,) = arguments(storage, STORAGE, where, 1)
    if type(data) is not bytes:
        raise RefusedPickle(f"{where}: a storage that is not bytes")
    _use_once(data, where, used)
    values = _storage(data, where)
    check_layout(offset, size, stride, len(values), where)
    storage.args = None
    return torch.from_numpy(values.astype(np.float32).reshape(size))


def _storage(data: bytes, where: str) -> np.ndarray:
    """Return the values of a storage of torch.save before zip files: five pickles, a count, raw float32."""
    stream = io.BytesIO(data)
    header = [read_stream(stream, (), MAX_STREAM_OPERATIONS) for _ in STREAM_HEADER]
    reference = read_stream(stream, {FLOAT_STORAGE}, MAX_STREAM_OPERATIONS)
    keys = read_stream(stream, (), MAX_STREAM_OPERATIONS)
    if header != STREAM_HEADER:
        raise RefusedPickle(f"{where}: not a storage written by torch.save")
    start = stream.tell() + 8
    match reference:
        case Node("persistent id", ("storage", Global(name), str(key), str(), int(numel), None)):
            known = name == FLOAT_STORAGE and keys == [key] and len(data) == start + 4 * numel
            if known and numel >= 0 and data[start - 8 : start] == struct.pack("<q", numel):
                return np.frombuffer(data, "<f4", numel, start)
    raise RefusedPickle(f"{where}: a storage that is not one array of float32 of the declared length")


def architecture(state: dict[str, Tensor]) -> dict:
    """Return the arguments of `DiTConfig` that the shapes of a DiT tell. Raises KeyError, ValueError."""
    _, tokens, width = state["pos_embed"].shape
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    return {
        "size": patch * math.isqrt(tokens),
        "channels": channels,
        "classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "patch": patch,
        "width": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
    }


def _facts(wrapper: dict, dit: Node, state: dict[str, Tensor]) -> dict:
    """Return architecture and method, by shapes where these tell, else by plain attributes."""
    attributes = _attributes(dit, "model")
    children = _get(attributes, "_modules", dict, "model")
    blocks = _get(_attributes(children.get("blocks"), "blocks"), "_modules", dict, "blocks")
    for module in (*blocks.values(), children.get("final_layer")):
        # Shapes do not show whether the modulation is normalised; our network always does it.
        if not _get(_attributes(module, "blocks, final_layer"), "do_mod_norm", bool, "blocks, final_layer"):
            raise RefusedPickle("a network without modulation norm (do_mod_norm is false)")
    try:
        model = architecture(state)
        model["heads"] = model["width"] // len(state["blocks.0.attn.q_norm.weight"])
        model["time_init"] = "spectral" if _get(attributes, "time_specinit", bool, "model") else "normal"
        model["patch_init"] = "xavier"
        make(DiTConfig, model, "model")
    except KeyError as error:
        raise RefusedPickle(f"not a DiT: there is no parameter {error}") from error
    except ValueError as error:
        raise RefusedPickle(f"not a DiT: {error}") from error
    scaled, detach_jvp = (_get(wrapper, name, bool, "net") for name in ("do_scale_param", "detach_jvp"))
    return {"model": model, "method": {"objective": "tvm", "scaled": scaled, "detach_jvp": detach_jvp}}


def _check_against_network(state: dict[str, Tensor], config: DiTConfig) -> None:
    """Refuse parameters whose names and shapes are not exactly those of `recipe.dit.DiT`."""
    embedding = position_embedding(config.width, config.size // config.patch)
    expected = {**shapes(config), "pos_embed": embedding.shape}
    found = {name: tensor.shape for name, tensor in state.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        raise RefusedPickle(f"parameters missing, unknown or of another shape: {', '.join(wrong[:5])}")
    if not torch.allclose(state["pos_embed"], embedding, rtol=0, atol=1e-6):
        raise RefusedPickle("pos_embed: not the two-dimensional sine-cosine embedding")
