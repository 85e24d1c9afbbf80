"""The reader of released snapshots: bit-exact on genuine layouts, and nothing in a file ever runs."""

import contextlib
import enum
import io
import os
import pickle
import pickletools
import re
import struct
import sys
import tracemalloc
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from eval.import_weights import Told, import_weights, main
from recipe.dit import DiT, DiTConfig
from recipe.generator import Generator
from recipe.restricted import RefusedPickle, read_stream
from recipe.weights import load_weights
from tests.conftest import OFFICIAL

TINY = DiTConfig(size=8, channels=4, classes=10, patch=2, width=16, depth=2, heads=1)
LATENT = DiTConfig(size=32, channels=4, classes=10, patch=2, width=32, depth=1, heads=2)

# ---------------------------------------------------------------- tripwires

EXECUTED = (
    "compile",
    "exec",
    "import",
    "os.system",
    "pickle.find_class",
    "subprocess.Popen",
    "ctypes.dlopen",
)
events: list[str] = []
watching = False


def _audit(event, _):
    if watching and event in EXECUTED:
        events.append(event)


sys.addaudithook(_audit)


@contextlib.contextmanager
def nothing_executed():
    """Fails if anything is imported, compiled or executed, or a global looked up for a pickle, meanwhile."""
    global watching
    events.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
    assert events == []


def _tripwire(*_):
    raise AssertionError("the reader called something that the file names")


# ---------------------------------------------------------------- snapshots in the documented layout


class Persistent(nn.Module):
    """Pickles as the authors' persistent classes do: source text, class name and `__dict__`."""

    def __reduce__(self):
        source = "raise SystemError('the source in the file was executed')"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": type(self).__name__}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (
            meta | {"state": self.__dict__},
        )


class TVMWrapper(Persistent):
    def __init__(self, model, config):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = config.size, config.channels, config.classes
        self.do_scale_param, self.detach_jvp, self.dtype = True, False, torch.bfloat16
        self.model_kwargs = OmegaConf.create({"qk_norm": True, "sizes": [1, 2]})
        self.model = model


class DiT_XL_2_18h(Persistent):  # noqa: N801
    def __init__(self, config):
        super().__init__()
        d, p = config.width, config.patch
        self.in_channels, self.patch_size, self.num_heads = config.channels, p, config.heads
        self.learn_guidance, self.init_type, self.time_specinit = True, "spectral", False
        self.x_embedder = fake("timm.layers.patch_embed", "PatchEmbed")
        self.x_embedder.proj = nn.Conv2d(config.channels, d, p, p)
        self.x_embedder.norm = nn.Identity()
        self.x_embedder.output_fmt = sys.modules["timm.layers.format"].Format("NCHW")
        for name in ("t_embedder", "s_embedder", "guidance_embedder"):
            self.add_module(name, TimestepEmbedder(d))
        self.y_embedder = LabelEmbedder(config.classes, d)
        self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, d))
        self.blocks = nn.ModuleList(DiTBlock(d, config.heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, p * p * config.channels)


class TimestepEmbedder(Persistent):
    def __init__(self, d):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))


class LabelEmbedder(Persistent):
    def __init__(self, classes, d):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, d)


class DiTBlock(Persistent):
    def __init__(self, d, heads):
        super().__init__()
        self.do_mod_norm = True
        self.norm1, self.norm2 = (nn.RMSNorm(d, elementwise_affine=False) for _ in range(2))
        self.attn = fake("training.dit", "Attention")
        self.attn.qkv, self.attn.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.attn.q_norm, self.attn.k_norm = nn.RMSNorm(d // heads), nn.RMSNorm(d // heads)
        self.attn.attn_drop, self.attn.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.mlp = fake("timm.layers.mlp", "Mlp")
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(d, 4 * d), nn.GELU("tanh"), nn.Linear(4 * d, d)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))


class FinalLayer(Persistent):
    def __init__(self, d, features):
        super().__init__()
        self.do_mod_norm = True
        self.norm_final = nn.RMSNorm(d, elementwise_affine=False)
        self.linear = nn.Linear(d, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))


def fake(module, name):
    return getattr(sys.modules[module], name)()


@contextlib.contextmanager
def reference_modules():
    """Makes the names that a snapshot refers to importable, so that pickle can write them."""
    names = ("torch_utils.persistence", "training.dit", "timm.layers.mlp", "timm.layers.patch_embed")
    packages = ("torch_utils", "training", "timm", "timm.layers", "timm.layers.format")
    modules = {name: types.ModuleType(name) for name in (*packages, *names)}
    reconstruct = types.FunctionType(_tripwire.__code__, {}, "_reconstruct_persistent_obj")
    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", reconstruct.__name__
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    for module, name in zip(names[1:], ("Attention", "Mlp", "PatchEmbed"), strict=True):
        setattr(modules[module], name, type(name, (nn.Module,), {"__module__": module}))
    layout = enum.Enum("Format", {"NCHW": "NCHW"}, module="timm.layers.format")
    modules["timm.layers.format"].Format = layout
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def random_weights(config):
    torch.manual_seed(0)
    network = DiT(config)
    state = {name: torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    return state, network.pos_embed


def snapshot(config=TINY, compiled=False, change=lambda network: None):
    """A snapshot's bytes and the weights in it; `change` edits the network before it is pickled."""
    state, pos_embed = random_weights(config)
    with reference_modules():
        network = TVMWrapper(DiT_XL_2_18h(config), config)
        named = {f"model.{name}": tensor for name, tensor in state.items()}
        network.load_state_dict(named | {"model.pos_embed": pos_embed})
        network.requires_grad_(False)
        change(network)
        net = torch.compile(network) if compiled else network
        data = pickle.dumps({"net": net, "dataset_kwargs": {"path": "x", "xflip": False}}, protocol=4)
    return data, state


VALID, WEIGHTS = snapshot()
TOLD = Told(guidance=2.0, mean=[0.0], std=[1.0])


@pytest.fixture(scope="module", autouse=True)
def _what_torch_imports_late_is_imported(tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "snapshot.pkl"
    path.write_bytes(VALID)
    import_weights(path, TOLD)


def read(data, folder):
    path = folder / "snapshot.pkl"
    path.write_bytes(data)
    with nothing_executed():
        return import_weights(path, TOLD)


def refused(data, folder, message):
    """Expects one clear error that holds `message`, no execution, and little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as error:
            read(data, folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "snapshot.pkl" in str(error.value)
    assert len(str(error.value)) < 1000
    assert peak < 3 * len(data) + 30e6


# ---------------------------------------------------------------- genuine files


# What torch.compile's wrapper pickles to changes with torch; torch 2.7 wrote the released files.
TORCH_2_7 = pytest.mark.skipif(not OFFICIAL, reason="needs the wrapper of torch 2.7")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=TORCH_2_7)])
def test_weights_are_recovered_bit_for_bit(tmp_path, compiled):
    # the wrapper pickles the compiler's settings, which other tests of this process change
    with torch._inductor.config.patch(post_grad_custom_pre_pass=None):
        data, expected = snapshot(compiled=compiled)
    state, config, facts, _ = read(data, tmp_path)
    assert list(state) and state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert facts["method"] == {"objective": "tvm", "scaled": True, "detach_jvp": False, "guidance": [2]}
    assert (config.size, config.classes, config.heads, config.depth) == (8, 10, 1, 2)
    DiT(config).load_state_dict(state)


def test_storages_written_on_a_gpu_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    data = snapshot()[0]
    assert data.count(b"cuda:3") == len(WEIGHTS) + 1
    state = read(data, tmp_path).state
    assert all(torch.equal(state[name], WEIGHTS[name]) for name in WEIGHTS)


def test_time_init_and_method_follow_the_attributes(tmp_path):
    def change(network):
        network.do_scale_param, network.detach_jvp, network.model.time_specinit = False, True, True

    found = read(snapshot(change=change)[0], tmp_path)
    assert (found.facts["method"]["scaled"], found.facts["method"]["detach_jvp"]) == (False, True)
    assert found.config.time_init == "spectral"


def test_command_writes_weights_that_load(tmp_path, capsys):
    data, expected = snapshot(LATENT)
    (tmp_path / "snapshot.pkl").write_bytes(data)
    arguments = [str(tmp_path / "snapshot.pkl"), "--guidance", "2", "--out", str(tmp_path / "w")]
    assert main(arguments) == 0
    network, facts = load_weights(tmp_path / "w")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    assert facts["method"]["guidance"] == [2.0]
    assert len(facts["data"]["mean"]) == 4

    (tmp_path / "snapshot.pkl").write_bytes(data[:1000])
    assert main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_networks_of_other_data_take_their_normalisation_from_the_command(tmp_path, capsys):
    def command(config, *options):
        (tmp_path / "snapshot.pkl").write_bytes(snapshot(config)[0])
        return main(
            [str(tmp_path / "snapshot.pkl"), "--guidance", "2", "--out", str(tmp_path / "w"), *options]
        )

    assert command(TINY) == 1
    assert "a network of 4 channels at 8x8" in (error := capsys.readouterr().err)
    assert error.endswith("give --mean and --std\n") and not (tmp_path / "w.json").exists()
    assert command(TINY, "--mean", "-1", "0.5", "2", "0", "--std", "4") == 0
    data = load_weights(tmp_path / "w")[1]["data"]
    assert (data["column"], data["mean"], data["std"]) == ("latents", [-1, 0.5, 2, 0], [4] * 4)
    assert data["encoder"]["name"] == "stabilityai/sd-vae-ft-ema"
    assert command(TINY, "--mean", "1", "2", "--std", "4") == 1
    assert capsys.readouterr().err.endswith("snapshot.pkl: --mean: 2 numbers for 4 channels\n")

    assert command(replace(TINY, channels=3), "--mean", "127.5", "--std", "64") == 0
    generator, seeds = Generator(tmp_path / "w"), torch.arange(2)
    images = generator(torch.tensor([0, 10]), seeds, 1, 2.0)
    assert (images.shape, images.dtype) == ((2, 3, 8, 8), torch.uint8)
    pixels = generator.normalizer.invert(torch.zeros(2, 3, 8, 8))
    assert torch.equal(pixels, torch.full_like(pixels, 127.5))
    for options in (["--mean", "0"], ["--mean", "0", "--std", "0"], ["--mean", "nan", "--std", "1"]):
        with pytest.raises(SystemExit):
            command(TINY, *options)
        assert re.search("--(mean|std).*(positive|both)", capsys.readouterr().err)


# ---------------------------------------------------------------- other networks


def test_networks_that_ours_cannot_represent_are_refused(tmp_path):
    def without_norm(network):
        network.model.blocks[1].do_mod_norm = False

    def without_guidance(network):
        del network.model.guidance_embedder

    def with_buffer(network):
        network.model.blocks[0].register_buffer("extra", torch.zeros(2))

    def with_other_embedding(network):
        network.model.pos_embed.add_(0.01)

    def with_half(network):
        network.model.half()

    def tied(network):
        network.model.s_embedder = network.model.t_embedder

    def strided(network):
        linear = network.model.blocks[0].attn.proj
        linear.weight = nn.Parameter(linear.weight.T, requires_grad=False)

    for change, message in [
        (without_norm, "do_mod_norm"),
        (without_guidance, "guidance_embedder"),
        (with_buffer, "buffers"),
        (with_other_embedding, "pos_embed"),
        (with_half, "torch.HalfStorage"),
        (tied, "shared"),
        (strided, "stride"),
    ]:
        refused(snapshot(change=change)[0], tmp_path, message)


# ---------------------------------------------------------------- hostile files


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch /tmp/tripwire",), f"{os.name}.system"),
        (eval, ("1/0",), "builtins.eval"),
        (exec, ("1/0",), "builtins.exec"),
        (__import__, ("this",), "builtins.__import__"),
        (pickle.loads, (b"N.",), "_pickle.loads"),
        (torch.load, ("x",), "torch.serialization.load"),
        (np.load, ("x",), "numpy.load"),
    ],
)
def test_unlisted_globals_are_refused_by_name(tmp_path, function, args, name):
    for payload in (
        {"net": Call(function, *args)},
        {"net": Call(getattr, Call(function, *args), "x")},
        Call(function, *args),
    ):
        refused(pickle.dumps(payload, protocol=4), tmp_path, name)


def test_listed_globals_are_never_called(tmp_path):
    chain = Call(getattr, Call(getattr, dict, "__class__"), "__subclasses__")
    refused(pickle.dumps({"net": chain}, 4), tmp_path, "net: not a call of")
    # REDUCE on the result of getattr: the step from a name to a call.
    called = b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x01a\x8c\x01b\x86R)R."
    refused(called, tmp_path, "call of something that is not a global")


def with_storage(inner):
    """VALID with the bytes of its first storage, which are returned too, replaced."""
    old = next(a for op, a, _ in pickletools.genops(VALID) if op.name == "BINBYTES" and len(a) > 200)
    before, after = VALID.split(struct.pack("<I", len(old)) + old)
    return before + struct.pack("<I", len(inner)) + inner + after, old


def test_nested_streams_are_data_too(tmp_path):
    inner = with_storage(b"")[1]
    bomb = pickle.dumps(Call(os.system, "true"), protocol=2)
    saved = io.BytesIO()
    torch.save(torch.zeros(3), saved)
    for replacement, message in [
        (bomb + inner, "refused global 'posix.system'"),
        (inner[: inner.index(b"\x80", 1)] + bomb + inner, "refused global 'posix.system'"),
        (saved.getvalue(), "damaged pickle"),
        (b"", "damaged pickle"),
        (inner[:-1], "declared length"),
        (inner + b"\0", "declared length"),
        (b"\x80\x02" + b"N" * 1000 + inner, "more than 100 pickle operations"),
        (inner.replace(b"FloatStorage", b"DoubleStorage"), "refused global 'torch.DoubleStorage'"),
    ]:
        refused(with_storage(replacement)[0], tmp_path, message)


def declared(numel, inner):
    """`inner` with its element count replaced everywhere: in the persistent id and in front of the data."""
    ops = [(op.name, arg, pos) for op, arg, pos in pickletools.genops(inner[_fourth(inner) :])]
    name, _, position = next(o for o in ops if o[0].startswith("BININT"))
    start = _fourth(inner) + position
    width = {"BININT1": 1, "BININT2": 2, "BININT": 4}[name]
    return inner[:start] + b"J" + struct.pack("<i", numel) + inner[start + 1 + width :]


def _fourth(inner):
    """Where the fourth pickle of a storage stream, the one with the declared size, begins."""
    stream = io.BytesIO(inner)
    for _ in range(3):
        list(pickletools.genops(stream))
    return stream.tell()


def test_declared_sizes_reserve_nothing(tmp_path):
    inner = with_storage(b"")[1]
    sparse = tmp_path / "sparse.pkl"
    with sparse.open("wb") as file:
        file.truncate(2**35)
    with pytest.raises(ValueError, match=r"has 34359738368 bytes"):
        import_weights(sparse, TOLD)
    for numel in (2**31 - 1, -1, 0):
        refused(with_storage(declared(numel, inner))[0], tmp_path, "declared length")
    for data in (
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",  # a frame
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc",  # BINBYTES8
        b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"abc",  # BINUNICODE
        b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b".",  # LONG_BINPUT far beyond the memo
        b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"abc",  # LONG4
    ):
        refused(data, tmp_path, "damaged pickle|not a snapshot|opcode")


def test_bombs_end_quickly(tmp_path):
    pairs = b"N\x94" + b"".join(b"h%c\x86\x94" % i for i in range(60))  # of itself, so that 2^60 leaves
    refused(b"\x80\x04}" + pairs + b"Ns.", tmp_path, "tuple as key")
    refused(b"\x80\x04" + b"]" * 30_000 + b"a" * 29_999 + b".", tmp_path, "not a snapshot")
    refused(b"\x80\x04N" + b"\x85" * 60_000 + b".", tmp_path, "not a snapshot")
    refused(b"\x80\x04}\x8a\x09" + (2**61 - 1).to_bytes(9, "little") + b"Ns.", tmp_path, "int as key")
    with pytest.raises(RefusedPickle, match="more than 1000 pickle operations"):
        read_stream(io.BytesIO(b"\x80\x04" + b"\x8f" * 10_000_000), (), max_operations=1000)


def test_shared_modules_cannot_multiply(tmp_path):
    def change(network):
        deep = nn.Linear(1, 1).requires_grad_(False)
        for _ in range(60):
            deep = nn.ModuleList([deep, deep])
        network.model.extra = deep

    refused(snapshot(change=change)[0], tmp_path, "shared|deep")


def test_files_that_are_no_snapshots(tmp_path):
    for data, message in [
        (b"", "has 0 bytes"),
        (b"hello", "damaged"),
        (pickle.dumps({"ema": 1}, 4), "'net'"),
        (pickle.dumps({"net": {}}, 4), "net: not a call"),
        (pickle.dumps([], 4), "'net'"),
        (VALID[: len(VALID) // 2], "damaged"),
        (os.urandom(4096), None),
    ]:
        refused(data, tmp_path, message)
    with pytest.raises(FileNotFoundError):
        import_weights(tmp_path / "absent.pkl", TOLD)


# ---------------------------------------------------------------- fuzzing

POSITIONS = [position for _, _, position in pickletools.genops(VALID)]
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
edits = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(POSITIONS), st.integers(0, len(VALID) - 1)),
        st.integers(0, 4),
        st.one_of(
            st.binary(max_size=4), st.sampled_from([o.code.encode("latin1") for o in pickletools.opcodes])
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(FUZZ, max_examples=150)
@given(edits=edits, end=st.one_of(st.none(), st.integers(0, len(VALID))))
def test_mutations_give_weights_or_one_error(tmp_path, edits, end):
    data = bytearray(VALID)
    for position, length, replacement in edits:
        data[position : position + length] = replacement
    try:
        state = read(bytes(data[:end]), tmp_path).state
    except ValueError as error:
        assert len(str(error)) < 1000
    else:
        assert {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in WEIGHTS.items()
        }


@settings(FUZZ, max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([o.code.encode("latin1") for o in pickletools.opcodes]),
            st.sampled_from([b"\x8c\x02os\x8c\x06system\x93", b"K\x01", b"\x8c\x01a", b"cos\nsystem\n"]),
            st.binary(max_size=3),
        ),
        max_size=60,
    )
)
def test_random_opcodes_give_a_value_or_one_error(parts):
    with nothing_executed(), contextlib.suppress(RefusedPickle):
        read_stream(io.BytesIO(b"".join(parts) + b"."), {"builtins.getattr", "collections.OrderedDict"})
