"""One loss curve, however the work is spread: ranks, sharding, compilation, checkpointing, microbatches."""

import copy
from functools import partial

import pytest
import torch
from composer.core import Precision
from composer.distributed.fsdp2 import create_mixed_precision_policy
from torch._dynamo.utils import counters

from recipe.dit import DiT, DiTConfig
from recipe.draws import Stream, keys, normal
from recipe.objectives import IMF, OBJECTIVES, TVM, FlowMatching, MeanFlow
from recipe.objectives.base import Condition, draw
from recipe.parallel import ParallelConfig, parallelism, prepare_blocks
from recipe.sampler import sample
from recipe.settings import make
from recipe.text import Prompts, TextConfig, byte_tokens
from tests.conftest import EACH, JOINT, finishing, run

ONE = {
    "plain": "float64",
    "again": "float64",
    "microbatches": "float64;microbatch=4",
    "checkpointed": "float64;parallel.checkpoint_every=1",
    "plain32": "float32",
    "bf16_32": "bf16",
}
SHARDED = "float64;parallel.fsdp2=true;parallel.mixed_precision=FULL"
TWO = {
    "ddp": "float64",
    "fsdp2": SHARDED,
    "everything": f"{SHARDED};parallel.checkpoint_every=1;microbatch=4;parallel.reshard_after_forward=false",
    "hybrid": f"{SHARDED};parallel.replicas=2",
    "ddp32": "float32",
    "fsdp2_32": "float32;parallel.fsdp2=true",
    "fsdp2_bf16_32": "bf16;parallel.fsdp2=true",
}
# the others: plainly, and with everything at once on two ranks
for name, overrides in list(EACH.items())[1:]:
    ONE[f"{name}:plain"] = ";".join(["float64", *overrides])
    TWO[f"{name}:ddp"] = ";".join(["float64", *overrides])
    TWO[f"{name}:everything"] = ";".join([TWO["everything"], *overrides])
TWO["frechet:hybrid"] = ";".join([TWO["hybrid"], *EACH["frechet"]])
MUON = "optimizer.name=muon"  # with AdamW for what is no matrix
ONE["muon:plain"] = f"float64;{MUON}"
TWO["muon:ddp"] = ONE["muon:plain"]
TWO["muon:everything"] = f"{TWO['everything']};{MUON}"
TWO["muon:hybrid"] = f"{TWO['hybrid']};{MUON}"
ONE["joint:plain"] = ";".join(["float64", *JOINT])
TWO["joint:everything"] = ";".join([TWO["everything"], *JOINT])

DIFFERENTIATED = {
    **{name: overrides for name, overrides in EACH.items() if name != "flow_matching_first"},
    "imf_prompts": [*EACH["imf"], *EACH["prompts"]],
    "alpha_flow": ["objective.name=alpha_flow", "step.tangent_warmup=4"],
}  # every objective, with each kind of evaluation that has no gradient, and the example of docs/objectives.md
COMPILED = "parallel.compile=true;parallel.checkpoint_every=1"  # on two ranks for few, as it takes seconds


def gradient_cases(compiled, sharding):
    """gradients:OBJECTIVE:SHARDING:MODE => DTYPE;override;..."""
    cases = {}
    for name, overrides in DIFFERENTIATED.items():
        for how, options in sharding.items():
            settings = ";".join([*overrides, *options])
            cases[f"gradients:{name}:{how}:float32"] = f"float32;{settings}"
            cases[f"gradients:{name}:{how}:bf16"] = f"bf16;{settings}"
            if name in compiled:
                cases[f"gradients:{name}:{how}:compiled"] = f"bf16;{settings};{COMPILED}"
    return {name: settings.replace(";;", ";").strip(";") for name, settings in cases.items()}


GRADIENTS = {
    1: gradient_cases(DIFFERENTIATED, {"plain": []}),
    2: gradient_cases(("tvm", "imf"), {"ddp": [], "fsdp2": ["parallel.fsdp2=true"]}),
}


def launch(digits, folder, ranks, cases):
    """What tests/parallel_worker.py makes of the cases."""
    path, cases = folder / "results.pt", {name: how.format(digits=digits) for name, how in cases.items()}
    run("tests/parallel_worker.py", digits, path, *map("=".join, cases.items()), ranks=ranks)
    return torch.load(path)


@pytest.fixture(scope="module")
def gradients(digits, tmp_path_factory):
    found = {}
    for ranks, cases in GRADIENTS.items():
        found |= launch(digits, tmp_path_factory.mktemp("gradients"), ranks, cases)
    return found


@pytest.fixture(scope="module")
def results(digits, tmp_path_factory):
    out, folder = {}, tmp_path_factory.mktemp("elastic")
    first = {
        "two": f"float64;{MUON};save_folder={folder}/two",
        "sharded": f"{SHARDED};{MUON};save_folder={folder}/sharded",
    }
    second = {"then_one": f"float64;{MUON};load_path={folder}/two/ba6.pt;save_folder={folder}/one"}
    third = {
        "then_two": f"float64;{MUON};load_path={folder}/one/ba12.pt",
        "sharded_again": f"{SHARDED};{MUON};load_path={folder}/sharded/ep0-ba6",
    }
    for ranks, cases in ((2, first), (1, ONE | second), (2, TWO | third)):
        out |= launch(digits, tmp_path_factory.mktemp("parallel"), ranks, cases)
    return out


@pytest.mark.parametrize("name", [n for n in (*ONE, *TWO) if "32" not in n])
def test_every_setting_gives_the_same_curve_and_weights_in_float64(results, name):
    objective, colon, _ = name.rpartition(":")
    plain, other = results[f"{objective}{colon}plain"], results[name]
    assert other["samples"] == plain["samples"]
    assert other["losses"] == pytest.approx(plain["losses"], rel=1e-10, abs=0)
    for key, weight in plain["weights"].items():
        torch.testing.assert_close(other["weights"][key], weight, rtol=1e-9, atol=1e-9, msg=key)


def test_from_two_ranks_to_one_and_back_within_an_epoch_no_step_changes(results):
    plain = results["muon:plain"]
    for name, begin in (("two", 0), ("then_one", 6), ("then_two", 12), ("sharded_again", 6)):
        assert results[name]["samples"] == plain["samples"][begin:]
        assert results[name]["losses"] == pytest.approx(plain["losses"][begin:], rel=1e-10, abs=0)


@pytest.mark.parametrize("name", ["ddp32", "fsdp2_32"])
def test_float32_curves_agree_to_rounding_amplified_by_adam(results, name):
    assert results[name]["losses"] == pytest.approx(results["plain32"]["losses"], rel=1e-3)


def test_bf16_gathers_change_nothing_but_rounding(results):
    """FSDP2 gathers bf16 weights where one process casts them under autocast."""
    assert results["fsdp2_bf16_32"]["losses"] == pytest.approx(results["bf16_32"]["losses"], rel=5e-3)


def test_fsdp2_rounds_weights_and_not_what_enters_the_network():
    parallelism(ParallelConfig(fsdp2=True), "cpu")
    policy = create_mixed_precision_policy(Precision.AMP_BF16, "DEFAULT")
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not policy.cast_forward_inputs


@pytest.mark.parametrize("name", [name for cases in GRADIENTS.values() for name in cases])
def test_every_trained_tensor_gets_the_gradient_that_float32_gives(gradients, name):
    """Under autocast too, where weights' casts outlive the evaluation that made them."""
    want, found = gradients[f"gradients:{name.split(':')[1]}:plain:float32"], gradients[name]
    assert found.keys() == want.keys()
    for tensor, gradient in want.items():
        assert gradient.norm() > 0, tensor
        assert found[tensor] is not None, tensor
        assert torch.cosine_similarity(found[tensor].flatten(), gradient.flatten(), 0) > 0.99, tensor
        torch.testing.assert_close(found[tensor].norm(), gradient.norm(), rtol=0.05, atol=0, msg=tensor)


def test_the_same_setting_repeats_to_the_last_bit(results):
    assert results["again"]["losses"] == results["plain"]["losses"]
    for key, weight in results["plain"]["weights"].items():
        assert torch.equal(results["again"]["weights"][key], weight), key


def test_averages_differ_from_the_student_and_from_each_other(results):
    weights = results["fsdp2"]["weights"]
    name = "blocks.0.attn.qkv.weight"
    net, target, ema = (weights[f"{part}.{name}"] for part in ("net", "target", "ema"))
    assert not torch.equal(net, target)
    assert not torch.equal(net, ema)
    assert not torch.equal(target, ema)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 2}, "parallel.replicas: 2 needs parallel.fsdp2"),
        ({"replicas": 0}, "parallel.replicas: 0"),
        ({"mixed_precision": "HALF"}, "parallel.mixed_precision: 'HALF'"),
        ({"checkpoint_every": -1}, "parallel.checkpoint_every: -1"),
    ],
)
def test_impossible_settings_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        make(ParallelConfig, options, "parallel")


def compiled_and_plain(monkeypatch, checkpoint_every, text):
    # aot_eager traces forward and backward like inductor, without a C++ compiler
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    net = DiT(DiTConfig(size=4, channels=1, classes=3, width=16, depth=3, heads=2, text=text)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    pairs = []
    for config in (ParallelConfig(), ParallelConfig(compile=True, checkpoint_every=checkpoint_every)):
        student, teacher = copy.deepcopy(net), copy.deepcopy(net).requires_grad_(False)
        prepare_blocks(student, config, trained=True)
        prepare_blocks(teacher, config, trained=False)
        pairs.append((student, teacher))
    return pairs


# tvm: first dual block (no token tangent yet), other dual blocks, plain student, teacher; meanflow and imf:
# dual blocks, and plain ones without gradient
@pytest.mark.parametrize("checkpoint_every", [0, 1])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TVM(guidance=1.5), 4),
        (FlowMatching(), 1),
        (MeanFlow(omega=1.5), 2),
        (IMF(guidance=[1, 2]), 2),
        (finishing(TVM(guidance=1.5), (1, 4, 4), nfe=2, recompute=True), 1),
    ],
    ids=OBJECTIVES,
)
@pytest.mark.slow
def test_blocks_compile_whole_once_and_change_nothing(monkeypatch, config, expected, checkpoint_every):
    compiles_whole_once(monkeypatch, config, expected, checkpoint_every)


@pytest.mark.slow
def test_blocks_with_prompts_compile_whole_once_and_change_nothing(monkeypatch):
    text = TextConfig(tokens=9, width=32)
    compiles_whole_once(monkeypatch, TVM(guidance=1.5), expected=4, checkpoint_every=1, text=text)


def compiles_whole_once(monkeypatch, config, expected, checkpoint_every, text=None):
    pairs = compiled_and_plain(monkeypatch, checkpoint_every, text)
    ids, graphs = torch.arange(4), []

    def prompted(net):
        prompts = byte_tokens(["red heart", "", "flag: Japan", "a"], 9)[0]
        return net if text is None else Prompts(text, None, 3)(net, prompts)

    for step in range(10):
        when = torch.full_like(ids, step)
        x0 = normal(keys(1, when, ids, Stream.POSTERIOR), 1, 4, 4)
        batch = draw(x0, ids % 3, when, ids, 0, config, DiTConfig(classes=3))
        results = []
        for student, teacher in pairs:
            student.zero_grad()
            loss = config.loss(prompted(student), prompted(teacher), batch).total
            loss.mean().backward()
            gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
            results.append((loss.detach(), torch.cat(gradients)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == expected
    assert graphs[-1] == graphs[0]
    teacher = prompted(pairs[1][1])
    for nfe in (1, 2, 1):
        asked = Condition(torch.arange(12) % 3, 1.5, 3)
        sample(teacher, torch.randn(12, 1, 4, 4).double(), asked, nfe, config)
    assert counters["stats"]["unique_graphs"] == graphs[0] + 1  # of 8 that dynamo allows
    assert not counters["graph_break"]
