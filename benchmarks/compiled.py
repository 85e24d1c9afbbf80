"""The kernels that Inductor makes of a training step for a GPU, found on a machine without one.

    python -m benchmarks.compiled yamls/imagenet256_w2.yaml [gpu=h100] [key=value ...]

Every pass of the step through one block is traced on fake CPU tensors, since autograd on fake CUDA tensors
asks the driver for a stream. Its graphs are moved to a device that Inductor takes for a GPU and lowered. This
gives the kernels that a GPU would run and the bytes that each moves, and a roofline predicts their times. A
step is one microbatch on one GPU with the optimizer's update, without what lies outside the blocks. Exit
status: 1 if a bar is missed or the configuration is wrong, 3 if Inductor is not what this was written for.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from triton.backends.compiler import GPUTarget

import kernels
from benchmarks import Figure
from kernels import operators
from kernels.inspect import assemble
from recipe import plan
from recipe.config import ConfigError, TrainConfig
from recipe.dit import Block, NetworkConfig
from recipe.dual import Dual
from recipe.manual import answer
from recipe.mit import MiTBlock, MiTConfig
from recipe.objectives.base import Pass
from recipe.parallel import configure_compiler

GROUPS = ("GEMM", "attention", "norm + modulation", "query-key norm", "activation", "casts", "rest")
CASTS = ("convert_element_type", "clone", "view", "permute", "expand")
NORMS = {"rms_norm", "modulate", "mul", "add", "silu"}  # functions of recipe/dual.py
SOURCE = r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str"
DIRECTIONS = {"fw": "forward", "bw": "backward", "inference": "inference"}
BARRED = (1152, 18, 256, 32, "h100")  # width, heads, tokens, images, GPU of the bars
BARS = {
    "student, dual, forward": 1.00,
    "student, dual, backward": 2.10,
    "student, forward": 0.41,
    "student, backward": 1.00,
    "student, dual, forward, kept": 0.62,
    "spills": 0,
    "peak": 42,
    "step": 0.203,
}
Graphs = dict[str, tuple[fx.GraphModule, list[Tensor]]]


class Kernel(NamedTuple):
    """A launch: its group, the bytes it reads and writes, its FLOPs, and whether Inductor generated it."""

    group: str
    bytes: float
    flops: float
    generated: bool


class Compiled(NamedTuple):
    """A direction of a block: launches, bytes kept for the backward pass, sources of generated kernels.

    Weights and their casts do not count among the bytes; sources are by the name of the kernel.
    """

    kernels: list[Kernel]
    kept: float
    sources: dict[str, str]

    @property
    def generated(self) -> list[Kernel]:
        """The kernels that Inductor generated."""
        return [kernel for kernel in self.kernels if kernel.generated]


class Part(NamedTuple):
    """A direction of a block in a step: of which pass, how often it runs, and how often it keeps bytes."""

    title: str
    block: Compiled
    runs: int
    keeping: int


def trace(make: Callable[[], tuple[Callable, tuple]], grad: bool = True, autocast: bool = True) -> Graphs:
    """Return AOTAutograd's graphs of the function and arguments that `make` returns, with their inputs.

    The keys are directions. `make` is called while every tensor is fake. Dynamo runs first, as in training,
    and records the source line of each operation.
    """
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    graphs = {}

    def keep(direction: str, module: fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs[direction] = module, inputs
        return make_boxed_func(module.forward)

    def backend(module: fx.GraphModule, _: list[Tensor]) -> Callable:
        options = {f"{short}_compiler": partial(keep, name) for short, name in DIRECTIONS.items()}
        options["partition_fn"] = min_cut_rematerialization_partition
        options["decompositions"] = select_decomp_table()
        return lambda *inputs: aot_module_simplified(module, inputs, **options)(*inputs)

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(grad):
        function, arguments = make()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*arguments)
        if grad:
            results = [x for x in results if x is not None and x.requires_grad]
            torch.autograd.backward(results, [torch.empty_like(x) for x in results])
    return graphs


@contextmanager
def pretended(gpu: plan.GPU) -> Iterator[None]:
    """Let Inductor and Triton find a GPU of this kind within the context; nothing can run on it."""
    import torch._inductor.config as inductor
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses import fake_tensor

    capability = divmod(gpu.arch, 10)
    properties = SimpleNamespace(
        name=f"sm_{gpu.arch}",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=gpu.multiprocessors,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        gcnArchName="",
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_compute_capability": gpu.arch,
    }
    driver = SimpleNamespace(  # all that Triton needs before a launch
        get_current_target=lambda: GPUTarget("cuda", gpu.arch, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_benchmarker=lambda: None,
    )
    with ExitStack() as stack:
        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            for name in filter(partial(hasattr, owner), answers):
                stack.enter_context(patch.object(owner, name, return_value=answers[name]))
        stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda _: None))
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        drivers = triton.runtime.driver  # from Triton 3.5 on, its reset_active would look for a GPU
        active = "_active" if hasattr(drivers, "_active") else "active"
        stack.enter_context(patch.object(drivers, active, driver))
        settings = {"compile_threads": 1, "force_disable_caches": True, "use_static_cuda_launcher": False}
        settings = {name: value for name, value in settings.items() if hasattr(inductor, name)}
        stack.enter_context(inductor.patch(**settings))
        stack.callback(_forget_devices)
        _forget_devices()
        yield


def _forget_devices() -> None:
    """Clear what torch has cached about the GPUs of this machine."""
    from torch._inductor.runtime.hints import DeviceProperties

    for function in (*vars(torch.utils._triton).values(), DeviceProperties.create):
        getattr(function, "cache_clear", lambda: None)()


def lower(
    direction: str, module: fx.GraphModule, inputs: list[Tensor]
) -> tuple[list[Kernel], dict[str, str]]:
    """Return Inductor's launches for one graph, and the sources of the generated kernels by name."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    cuda, mode = torch.device("cuda", 0), FakeTensorMode(allow_non_fake_inputs=True)
    move(module.graph, cuda)
    module.recompile()
    with torch.no_grad(), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        with mode:
            inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=cuda) for x in inputs]
        FakeTensorProp(module, mode).propagate(*inputs)
        inference = {"is_inference": direction == "inference"}
        post_grad_passes(module, **inference)
        FakeTensorProp(module, mode).propagate(*inputs)
        graph = GraphLowering(module, example_inputs=inputs, is_backward=direction == "backward", **inference)
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            code = graph.codegen()[0].value
            launches = [kernel for node in graph.scheduler.nodes for kernel in read(node)]
    return launches, dict(re.findall(SOURCE, code, re.DOTALL))


def move(graph: fx.Graph, device: torch.device) -> None:
    """Replace every device in the graph by `device`, and delete shapes and types, to be inferred again."""
    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda x: device if isinstance(x, torch.device) else x
        )
        for key in ("val", "tensor_meta"):
            node.meta.pop(key, None)


def read(node: Any) -> list[Kernel]:  # noqa: ANN401
    """Return the launches of a node of Inductor's schedule."""
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import NopKernelSchedulerNode

    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
        return []
    origins = [origin for inner in node.get_nodes() for origin in inner.node.origins]
    if not node.is_extern():
        return [Kernel(generated_group(origins), node.get_read_write_buffers_sizes(), 0, generated=True)]
    call = max(origins, key=flops)
    if call.target == torch.ops.terminal_velocity.qkv_norm_attention_backward.default:
        return attention_backward(call)
    group = "attention" if "attention" in str(call.target) else "GEMM" if flops(call) else "rest"
    return [Kernel(group, size_of([*call.all_input_nodes, call]), flops(call), generated=False)]


def size_of(nodes: object) -> int:
    """Return the bytes of the values of the nodes; None counts as nothing."""
    values = [node.meta["val"] for node in tree_leaves(nodes) if node is not None]
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))


def attention_backward(call: fx.Node) -> list[Kernel]:
    """Return the launches of attention's backward pass: `backward_rows` and `backward_columns`.

    The first does 3 of 7 products. Both read queries, keys, values and the gradients of the outputs and, if
    queries and keys are normed, one of their two thirds of the projection.
    """
    names = [argument.name for argument in call.target._schema.arguments]
    given = dict(zip(names, call.args, strict=False))
    third = size_of([given["qkv"], given["tqkv"]]) / 3
    normed = given["gain"] is not None
    heads = size_of([given["qk"], given["tqk"]]) + third if normed else 3 * third
    shared = heads + normed * third + size_of([given[name] for name in ("do", "dto", "lse", "mu")])
    rows, columns = shared + size_of([given["o"], given["to"]]) + third, shared + 2 * third
    work = flops(call) / 7
    return [Kernel("attention", *cost, generated=False) for cost in ((rows, 3 * work), (columns, 4 * work))]


def flops(call: fx.Node) -> int:
    """Return the FLOPs of a call by torch's formulas; 0 if there is none."""
    aten = torch.ops.aten
    formulas = flop_registry | {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    }
    formula = formulas.get(getattr(call.target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((call.args, call.kwargs), lambda x: x.meta["val"])
    return formula(*args, **kwargs, out_val=call.meta["val"])


def generated_group(origins: list[fx.Node]) -> str:
    """Return the group of a generated kernel, by the source lines of its operations."""
    if all(any(cast in str(origin.target) for cast in CASTS) for origin in origins):
        return "casts"
    lines = "".join(origin.meta.get("stack_trace") or "" for origin in origins)
    called = set(re.findall(r", in (\w+)$", lines, re.MULTILINE))
    if called & {"gelu", "swiglu"}:
        return "activation"
    if "q_norm" in lines:
        return "query-key norm"
    return "norm + modulation" if called & NORMS else "rest"


def block_of(model: NetworkConfig) -> Block | MiTBlock:
    """Return a block of the network."""
    return (MiTBlock if isinstance(model, MiTConfig) else Block)(model)


def conditions(model: NetworkConfig, one: Pass, images: int, grad: bool) -> tuple:
    """Return what a block takes beside its tokens: of mit the rotation, of dit what modulates, and text."""
    detach = one.dual and one.gradient == "value"
    if isinstance(model, MiTConfig):
        pairs = model.width // model.heads // 2
        return *(torch.empty(model.sequence, pairs) for _ in range(2)), detach
    c, tangent = (torch.empty(images, model.width, requires_grad=grad) for _ in range(2))
    context = None
    if (text := model.text) is not None:
        tokens = torch.empty(images, text.tokens, model.width, requires_grad=grad)
        context = tokens, torch.full((images,), text.tokens)
    return Dual(c, tangent if one.dual else None), detach, context


def trace_pass(config: TrainConfig, one: Pass, images: int) -> Graphs:
    """Return the graphs of one block in one pass over `images` samples, with the operators of a GPU."""
    model = config.model
    gathered = config.parallel.fsdp2 and plan.gathered_size(config) == plan.BF16
    grad = one.gradient != "none"

    def make() -> tuple[Callable, tuple]:
        torch.set_default_dtype(torch.bfloat16 if gathered else torch.float32)  # torch 2.11 casts no fakes
        try:
            block = block_of(model).requires_grad_(grad)
        finally:
            torch.set_default_dtype(torch.float32)
        shape = images, model.sequence, model.width
        value, tangent = (torch.empty(shape, requires_grad=grad) for _ in range(2))
        z = Dual(value, tangent if one.dual else None)
        return block, (z, *conditions(model, one, images, grad))

    with patch.multiple(kernels, _operators=operators, _use_triton=lambda *_: True):
        return trace(make, grad, config.precision == "amp_bf16")


def compile_pass(config: TrainConfig, one: Pass, images: int, gpu: plan.GPU) -> dict[str, Compiled]:
    """Compile one block in one pass over `images` samples; return the result by direction."""
    configure_compiler(config.parallel)
    found, graphs = {}, trace_pass(config, one, images)
    with pretended(gpu):
        for direction, (module, inputs) in graphs.items():
            launches, sources = lower(direction, module, inputs)
            saved = module.graph.output_node().args[0][1 + one.dual :] if direction == "forward" else []
            found[direction] = Compiled(launches, kept_bytes(saved, config.model), sources)
    return found


def kept_bytes(saved: list[fx.Node], model: NetworkConfig) -> int:
    """Return the bytes of the distinct storages among these outputs, without weights and their casts."""
    with torch.device("meta"):
        block = block_of(model)
    weights = {tuple(sorted(p.shape)) for p in block.parameters()}
    tensors = [node.meta["val"] for node in saved]
    storages = [x.untyped_storage() for x in tensors if tuple(sorted(x.shape)) not in weights]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def compile_step(config: TrainConfig, images: int, gpu: plan.GPU) -> list[Part]:
    """Compile every direction of every pass of the objective over `images` samples."""
    model, step = config.model, []
    for one in config.objective.passes(model.v_head):
        title = ("teacher" if one.teacher else "student") + (", dual" if one.dual else "")
        title += ", auxiliary head" if one.head else ""
        blocks = model.head_depth if one.head else model.depth
        again = round(plan.checkpointed_share(model, config.parallel) * blocks)
        for direction, compiled in compile_pass(config, one, images * one.batches, gpu).items():
            runs = blocks + (again if direction == "forward" else 0)
            step.append(Part(f"{title}, {direction}", compiled, runs, blocks - again))
    return step


def assembled(step: list[Part], gpu: plan.GPU) -> dict[str, tuple[int, int]]:
    """Return (bytes of spills, registers) per thread of each generated kernel.

    Of several configurations the one that spills least counts, since a run would try them all.
    """
    from torch._inductor.codecache import PyCodeCache

    found = {}
    with pretended(gpu):
        for one in step:
            for name, source in one.block.sources.items():
                tuner = getattr(PyCodeCache.load(source), name)
                built = (tuner._precompile_config(config).kernel.asm["ptx"] for config in tuner.configs)
                texts = [assemble(ptx, gpu.arch) for ptx in built]
                found[f"{one.title}: {name}"] = min(map(spills_and_registers, texts))
    return found


def spills_and_registers(report: str) -> tuple[int, int]:
    """Return (bytes of spills, registers) per thread from a report of the assembler."""
    spills = max(map(int, re.findall(r"(\d+) bytes spill", report)))
    return spills, int(re.search(r"Used (\d+) registers", report)[1])


def predicted_seconds(kernel: Kernel, roofline: plan.Roofline) -> float:
    """Predict the seconds of one launch by the roofline."""
    share = {"GEMM": roofline.gemm, "attention": roofline.attention}.get(kernel.group, 1)
    return max(roofline.launch, roofline.seconds(kernel.bytes, kernel.flops, share))


def group_times(step: list[Part], roofline: plan.Roofline) -> dict[str, float]:
    """Predict the seconds of a step in each group, over all passes and blocks."""
    times = dict.fromkeys(GROUPS, 0.0)
    for one in step:
        for kernel in one.block.kernels:
            times[kernel.group] += one.runs * predicted_seconds(kernel, roofline)
    return times


def peak_memory(config: TrainConfig, step: list[Part], images: int) -> float:
    """Return peak bytes: the activations that were found here, and the planner's other parts for one GPU."""
    parts = plan.memory(config, 1)
    kept = sum(one.keeping * one.block.kept for one in step)
    return sum(parts.values()) - parts["activations"] + kept + plan.working_bytes(config) * images


def table(step: list[Part], roofline: plan.Roofline) -> str:
    """Return Markdown with one line for each group of each direction of one block."""
    lines = ["| of one block | group | calls | GB | GFLOP | ms |", "|---|---|---:|---:|---:|---:|"]
    for one in step:
        for group in GROUPS:
            members = [kernel for kernel in one.block.kernels if kernel.group == group]
            size, work = (sum(getattr(k, name) for k in members) / 1e9 for name in ("bytes", "flops"))
            time = 1e3 * sum(predicted_seconds(k, roofline) for k in members)
            lines.append(f"| {one.title} | {group} | {len(members)} | {size:.3f} | {work:.1f} | {time:.3f} |")
        size = sum(kernel.bytes for kernel in one.block.generated) / 1e9
        lines.append(f"| {one.title} | (generated) | {len(one.block.generated)} | {size:.3f} | | |")
    return "\n".join(lines)


def figures(step: list[Part], time: float, peak: float, spills: int, barred: bool) -> list[Figure]:
    """Return the results of a step, with bars if the configuration is the one that they were set for."""
    rows = []
    for one in step:
        size = sum(kernel.bytes for kernel in one.block.generated)
        rows.append((f"{one.title}: GB a block, generated", size / 1e9, one.title))
        if one.block.kept:
            name = f"{one.title}: GB a block, kept for the backward"
            rows.append((name, one.block.kept / 1e9, f"{one.title}, kept"))
    rows.append(("spills of a generated kernel, bytes a thread, at most", spills, "spills"))
    rows.append(("peak memory, GiB, predicted", peak / plan.GIB, "peak"))
    rows.append(("step, s, predicted", time, "step"))
    return [Figure(name, value, BARS.get(key) if barred else None) for name, value, key in rows]


def report(config: TrainConfig, roofline: plan.Roofline) -> bool:
    """Compile a step and print the results. Returns True if no bar is missed."""
    images, gpu = plan.layout(config, 1)[0], roofline.sheet
    step = compile_step(config, images, gpu)
    model, found = config.model, assembled(step, gpu)
    times = group_times(step, roofline)
    update = plan.update_time(config, 1, roofline)
    sizes = model.width, model.heads, model.tokens, images, roofline.gpu
    barred = model.network == "dit" and model.text is None and sizes == BARRED
    time, peak = sum(times.values()) + update, peak_memory(config, step, images)
    rows = figures(step, time, peak, max(spills for spills, _ in found.values()), barred)
    most = max(GROUPS[2:], key=times.get)
    lines = [
        f"{config.run_name}: {images} images of {model.sequence} tokens, {model.depth} blocks of width "
        f"{model.width}; torch {torch.__version__}, triton {triton.__version__}, sm_{gpu.arch}.",
        roofline.assumptions(),
        "",
        table(step, roofline),
        "",
        f"Generated kernels: {len(found)}, up to {max(r for _, r in found.values())} registers a thread.",
        *(f"SPILLS {spills} bytes: {name}" for name, (spills, _) in found.items() if spills),
        "Step, ms: " + ", ".join(f"{g} {1e3 * t:.1f}" for g, t in (times | {"update": update}).items()) + ".",
        f"After the matrix products, {most} takes most time.",
        *map(str, rows),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return not any(row.missed for row in rows)


def main(arguments: list[str]) -> int:
    """Run the command line: CONFIG.yaml, then key=value of Roofline and of the configuration."""
    usage = "python -m benchmarks.compiled CONFIG.yaml [gpu=h100] [key=value ...]"
    answer(arguments, usage, __doc__, plan.Roofline, TrainConfig)
    try:
        config, roofline = plan.read(arguments, plan.Roofline)
        plan.layout(config, 1)
    except ConfigError as error:
        raise SystemExit(f"config error: {error}") from error
    try:
        return int(not report(config, roofline))
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError) as error:
        place, reason = traceback.extract_tb(error.__traceback__)[-1], str(error).partition("\n")[0]
        sys.stdout.write(
            f"torch {torch.__version__}: Inductor is not what this was written for: {type(error).__name__}: "
            f"{reason} ({place.filename}:{place.lineno})\n"
        )
        return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
