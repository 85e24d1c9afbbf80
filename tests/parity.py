"""Checks the network, the loss, training and the sampler against golden float64 data of the published method.

    python tests/parity.py FOLDER

FOLDER holds, for TVM, `<case>_io.npz`, `<case>_weights_{student,teacher}.npz`, `<case>_grads.npz`,
`<case>_acts.npz` and `sample_ts.npz`; for MeanFlow and iMF `objectives_<case>_{io,weights}.npz`; for SiT
`sit_<case>_io.npz`, `sit_<case>.pt` and `sit_<case>_train.pt`; for iMF and pMF `<case>_io.npz`, `<case>.pth`
and `<case>_inference.pth`. Sizes and options are read from each case's
`config_json`. Prints the worst relative error (max abs error / max abs value) of each array and exits 1 where
one is above its tolerance.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.import_weights import Told, import_weights, rename
from recipe.dit import DiT, DiTConfig
from recipe.draws import Stream, keys, uniform
from recipe.dual import Dual
from recipe.ema import ema_update
from recipe.mit import MiT
from recipe.networks import build
from recipe.objectives import IMF, MeanFlow, from_facts
from recipe.objectives.base import Condition, Draw
from recipe.objectives.tvm import TVM, displacement
from recipe.sampler import sample

TOLERANCE = 1e-9
QUANTILE_TOLERANCE = 0.01


def load_case(folder: Path, case: str) -> dict[str, dict[str, Tensor]]:
    """All arrays of a case: part -> name -> tensor; `io` also carries the configuration as a dict."""
    parts = {}
    for part in ("io", "weights_student", "weights_teacher", "grads", "acts"):
        path = folder / f"{case}_{part}.npz"
        if path.exists():
            with np.load(path) as arrays:
                parts[part] = {name: arrays[name] for name in arrays.files}
    parts["config"] = json.loads(str(parts["io"].pop("config_json")))
    return parts


def tensors(arrays: dict) -> dict[str, Tensor]:
    return {n: torch.from_numpy(a) for n, a in arrays.items() if a.dtype.kind in "fi"}


def dit_config(sizes: dict, **options: str) -> DiTConfig:
    """The settings of a network whose sizes have the names of the published code."""
    return DiTConfig(
        size=sizes["img"],
        channels=sizes["channels"],
        classes=sizes["num_classes"],
        patch=sizes["patch"],
        width=sizes["hidden"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        mlp_ratio=sizes.get("mlp_ratio", 4.0),
        **options,
    )


def build_dit(config: dict, weights: dict) -> DiT:
    """The network of a case with the given weights, in float64."""
    net = DiT(dit_config(config)).double()
    state = {name.removeprefix("model."): w.double() for name, w in tensors(weights).items()}
    torch.testing.assert_close(net.pos_embed, state.pop("pos_embed"), rtol=0, atol=0)
    net.load_state_dict(state)
    return net


def index(one_hot: Tensor) -> Tensor:
    """One-hot rows to class indices; an all-zero row is the index K, no label."""
    return torch.where(one_hot.sum(1) > 0, one_hot.argmax(1), one_hot.shape[1])


class Table:
    """Collects (array, relative error, tolerance)."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []

    def check(self, name: str, got: Tensor, want: Tensor | np.ndarray, tolerance: float = TOLERANCE) -> None:
        want = torch.as_tensor(want)
        got = got.detach().reshape(want.shape)
        scale = want.abs().max().clamp(min=1e-300)
        error = ((got - want).abs().max() / scale).nan_to_num(nan=float("inf")).item()
        self.rows.append((name, error, tolerance))

    @property
    def failed(self) -> list[tuple[str, float, float]]:
        return [row for row in self.rows if not row[1] <= row[2]]

    def __str__(self) -> str:
        lines = [f"{'array':58} {'error':>9} {'tolerance':>9}"]
        for name, error, tolerance in self.rows:
            lines.append(f"{name:58} {error:9.1e} {tolerance:9.1e}{'' if error <= tolerance else '  FAILED'}")
        return "\n".join(lines)


def objective(config: dict) -> TVM:
    loss = config["loss"]
    guidance = loss.get("cfg") or [loss.get("min_cfg", 1.0), loss.get("max_cfg", 2.0)]
    return TVM(guidance=guidance, scaled=config["do_scale_param"])


def injected_batch(io: dict[str, Tensor], config: dict) -> Draw:
    """The step's random draws as the golden data injected them, w and labels derived by the stated rules."""
    loss, null = config["loss"], config["num_classes"]
    u = io["in/u_beta"]
    if loss.get("cfg"):
        w = torch.full_like(u, loss["cfg"])
    elif loss.get("max_cfg"):
        w = u * (loss["max_cfg"] - loss["min_cfg"]) + loss["min_cfg"]
    else:
        w = 1 / u
    dropped = io["in/u_drop"] < loss.get("label_dropout", 0.0)
    label = torch.where(dropped, null, index(io["in/labels_before_drop"]))
    times = (io["in/t"], io["in/s"], io["in/s_prime"])
    w = torch.where(dropped, 1.0, w)
    return Draw(io["in/images"], io["in/noise"], times, label, w, label, null)


def check_forward(table: Table, case: str, parts: dict) -> None:
    io, config = tensors(parts["io"]), parts["config"]
    student, teacher = (build_dit(config, parts[f"weights_{who}"]) for who in ("student", "teacher"))
    x, t, s, label, beta = (io[f"in/fwd_{n}"] for n in ("x", "t", "s", "labels", "beta"))
    label = index(label)
    acts: dict[str, Tensor] = {}

    def record(module: torch.nn.Module, _inputs: tuple, out: Dual | list) -> None:
        if isinstance(out, Dual):
            acts.setdefault(paths[module], out.value)

    paths = {module: name for name, module in student.named_modules()}
    for module in paths:
        module.register_forward_hook(record)
    table.check(f"{case} fwd_out", student(x, t, t - s, label, beta).value, io["out/fwd_out"])
    check_activations(table, case, acts, parts.get("acts", {}))
    table.check(f"{case} fwd_out_nobeta", student(x, t, t - s, label).value, io["out/fwd_out_nobeta"])
    table.check(f"{case} fwd_out_teacher", teacher(x, t, t - s, label, beta).value, io["out/fwd_out_teacher"])
    k = 1 / beta if config["do_scale_param"] else torch.ones_like(beta)
    f, _ = displacement(student, x, t, s, label, beta, k)
    table.check(f"{case} fwd_f_st", x + f.value, io["out/fwd_f_st"])
    table.check(f"{case} fwd_df_ds", f.tangent, io["out/fwd_df_ds"])


def check_activations(table: Table, case: str, acts: dict[str, Tensor], golden: dict) -> None:
    names = {
        "block0_attn_out": "blocks.0.attn",
        "block0_mlp_out": "blocks.0.mlp",
        **{n: n for n in ("t_embedder", "s_embedder", "guidance_embedder", "y_embedder", "x_embedder")},
        "final_layer": "final_layer",
    }
    for name, want in golden.items():
        ours = names.get(name, name.replace("block", "blocks."))
        if ours in acts:
            table.check(f"{case} activation {name}", acts[ours], want)


def check_loss(table: Table, case: str, parts: dict) -> None:
    io, config = tensors(parts["io"]), parts["config"]
    student, teacher = (build_dit(config, parts[f"weights_{who}"]) for who in ("student", "teacher"))
    batch = injected_batch(io, config)
    table.check(f"{case} w", batch.w, io["out/w"])
    table.check(f"{case} labels", batch.label.double(), index(io["out/labels"]).double())
    for detach, key in ((False, "grad"), (True, "grad_detach_jvp")):
        options = objective(config)
        options.detach_jvp = detach
        student.zero_grad()
        loss = options.loss(student, teacher, batch)
        loss.total.mean().backward()
        if not detach:
            table.check(f"{case} terminal_loss", loss.terms["terminal"].value, io["out/terminal_loss"])
            table.check(f"{case} fm_loss", loss.terms["flow_matching"].value, io["out/fm_loss"])
            table.check(f"{case} mean_loss", loss.total.mean(), io["out/mean_loss"])
            table.check(f"{case} F_ts", loss.evaluated["F"], io["out/F_ts"])
        check_gradients(table, case, key, student, parts["grads"])


def check_gradients(table: Table, case: str, key: str, net: DiT, golden: dict) -> None:
    grads = {f"model.{name}": p.grad for name, p in net.named_parameters()}
    names = [str(name) for name in golden["grad_names" if key == "grad" else f"{key}_names"]]
    assert sorted(grads) == sorted(names), "the parameters with a gradient differ"
    norms = torch.stack([grads[name].norm() for name in names])
    table.check(f"{case} {key} norms of all parameters", norms, golden[f"{key}_l2"])
    sums, want = torch.stack([grads[n].sum() for n in names]), torch.as_tensor(golden[f"{key}_sum"])
    table.check(f"{case} {key} sums of all parameters", sums, want)
    for name, array in golden.items():
        kind, _, parameter = name.partition("/")
        if kind == key:
            table.check(f"{case} {name}", grads[parameter], array)
        elif kind == f"{key}_val":
            at = torch.as_tensor(golden[f"{key}_idx/{parameter}"])
            table.check(f"{case} {name}", grads[parameter].flatten()[at], array)


def check_training(table: Table, case: str, parts: dict) -> None:
    """Four AdamW steps on one batch, with target average 0.99, evaluation average 0.9999 and clipping."""
    io, config = tensors(parts["io"]), parts["config"]
    net = build_dit(config, parts["weights_student"])
    target, average = copy.deepcopy(net), copy.deepcopy(net)
    batch, options = injected_batch(io, config), objective(config)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, (0.9, 0.95), 1e-8, 0.0)
    losses, norms = [], []
    for _ in range(4):
        optimizer.zero_grad()
        loss = options.loss(net, target, batch).total
        loss.mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), config["clip"] or float("inf")))
        optimizer.step()
        ema_update(net, [(target, 0.99), (average, 0.9999)])
        losses.append(loss.detach())
    table.check(f"{case} train_loss", torch.stack(losses), io["out/train_loss"])
    table.check(f"{case} train_grad_norm", torch.stack(norms), io["out/train_grad_norm"])
    for kind, module in (("net", net), ("ema", average), ("ema_target", target)):
        state = module.state_dict()
        for name, want in io.items():
            if name.startswith(f"out/train_{kind}/"):
                table.check(f"{case} {name[4:]}", state[name.split("/model.")[1]], want)


def check_sampler(table: Table, case: str, parts: dict) -> None:
    """The published sampler takes w without label too, as if no label (-1) meant none; ours takes 1 there."""
    io, config = tensors(parts["io"]), parts["config"]
    net = build_dit(config, parts["weights_student"])
    options, null = objective(config), config["num_classes"]
    z, label = io["in/samp_z"], index(io["in/samp_labels"])
    w = config["samp_cfg"]
    for nfe in (1, 2, 4):
        got = sample(net, z, Condition(label, w, -1), nfe, options)
        table.check(f"{case} samp_out_{nfe}step", got, io[f"out/samp_out_{nfe}step"])
    unguided = io["out/samp_out_default_1step_w1"]
    got = sample(net, z, Condition(label, 1.0, null), 1, options)
    table.check(f"{case} samp_out_default_1step_w1", got, unguided)
    want = torch.where((label == null)[:, None, None, None], unguided, io["out/samp_out_1step"])
    got = sample(net, z, Condition(label, w, null), 1, options)
    table.check(f"{case} samp_out_1step, w = 1 without label", got, want)


def check_times(table: Table, folder: Path) -> None:
    """The deterministic map at injected draws; quantiles of our draws against 2,000,000 golden ones."""
    with np.load(folder / "sample_ts.npz") as arrays:
        golden = {
            name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind == "f"
        }
    z_gap, u, z_s = (golden[f"default/inj_{n}"] for n in ("z_gap", "u", "z_s_prime"))
    injected = torch.stack([torch.special.ndtr(z_gap), u, torch.special.ndtr(z_s), torch.ones_like(u)], -1)
    for name, got in zip(("t", "s", "s_prime"), TVM().sample_times(injected), strict=True):
        table.check(f"times: map to {name}", got, golden[f"default/inj_{name}"])
    sample = torch.arange(400_000)
    draws = uniform(keys(0, torch.zeros_like(sample), sample, Stream.TIMES), 4)
    t, s, s_prime = TVM().sample_times(draws)
    for name, values in (("t", t), ("s", s), ("s_prime", s_prime), ("gap", t - s)):
        got, want = torch.quantile(values, golden["levels"]), golden[f"default_2M/{name}_q"]
        error = (got - want).abs().max().item()
        table.rows.append((f"times: quantiles of {name}", error, QUANTILE_TOLERANCE))


def check_objectives(table: Table, folder: Path, case: str) -> None:
    """MeanFlow without and with kappa, and iMF: guided targets, u, du/dt, V, losses, gradients."""
    with np.load(folder / f"{case}_io.npz") as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "config_json"}
        config = json.loads(str(arrays["config_json"]))
    with np.load(folder / f"{case}_weights.npz") as arrays:
        state = {name: torch.from_numpy(arrays[name]).double() for name in arrays.files}
    net, null = DiT(DiTConfig(**config["model"])).double(), config["model"]["classes"]
    net.load_state_dict(state)
    power = {key: config["objective"][key] for key in ("norm_p", "norm_eps")}
    objectives = {
        "meanflow": MeanFlow(**{**config["objective"], "kappa": 0.0}),
        "meanflow_kappa": MeanFlow(**config["objective"]),
        "imf": IMF(guidance=[1, 8], **power),
    }
    for tag, objective in objectives.items():
        check_objective(table, f"{case} {tag}", net, objective, golden_of(golden, tag), null)


def golden_of(golden: dict[str, Tensor], tag: str) -> dict[str, Tensor]:
    """The inputs, and what the golden data say of one objective."""
    mine = {name.removeprefix(f"{tag}/"): x for name, x in golden.items() if name.startswith(f"{tag}/")}
    return {name: x for name, x in golden.items() if "/" not in name} | mine


def check_objective(
    table: Table, case: str, net: DiT, objective: MeanFlow | IMF, golden: dict[str, Tensor], null: int
) -> None:
    label = torch.where(golden["dropped"], null, golden["label"])
    t, r, w = golden["t"], golden["r"], golden.get("w", torch.ones_like(golden["t"]))
    batch = Draw(golden["x0"], golden["noise"], (t, r), label, w, golden["label"], null)
    net.zero_grad()
    loss = objective.loss(net, None, batch)
    loss.total.mean().backward()
    u, du_dt = loss.evaluated["F"], loss.evaluated["dF_dt"]
    x_t, guided = batch.at(t), golden["v_guided"]
    if isinstance(objective, MeanFlow):
        table.check(f"{case} v_guided", objective.guided_velocity(net, x_t, batch), guided)
        table.check(f"{case} u", u, golden["u"])
        table.check(f"{case} du_dt", du_dt, golden["du_dt"])
    else:
        table.check(f"{case} v_guided", objective.velocities(net, x_t, batch)[1], guided)
        table.check(f"{case} V", u + (t - r)[:, None, None, None] * du_dt, golden["V"])
    table.check(f"{case} loss", loss.total, golden["loss"])
    for name, p in net.named_parameters():
        if f"grad/{name}" in golden:
            table.check(f"{case} grad {name}", p.grad, golden[f"grad/{name}"])


def check_sit(table: Table, folder: Path, case: str) -> None:
    """The imported SiT evaluated at 1 - t and negated, from both forms of its file."""
    with np.load(folder / f"{case}_io.npz") as arrays:
        x, t, y, velocity = (torch.from_numpy(arrays[name]) for name in ("x", "t", "y", "velocity"))
        heads = json.loads(str(arrays["config_json"]))["num_heads"]
    for name in (case, f"{case}_train"):
        found = import_weights(folder / f"{name}.pt", Told(heads=heads))
        net = DiT(found.config).double()
        net.load_state_dict(found.state)
        got = -net(x, 1 - t, torch.zeros_like(t), y).value
        table.check(f"{name} velocity", got, velocity)


def check_mit(table: Table, folder: Path, case: str, config: dict) -> None:
    """iMF or pMF from both forms of its file: the network, the loss with its gradients, samples."""
    with np.load(folder / f"{case}_io.npz") as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "config_json"}
    settings, sampling = config["objective"], config["sampling"]
    size, scale = config["net"]["input_size"], settings["noise_scale"]
    told = Told(size=size, noise_scale=scale, mean=[0.0], std=[1.0])
    for name in (case, f"{case}_inference"):
        found = import_weights(folder / f"{name}.pth", told)
        found.config.t_floor = settings["t_eps"]
        net = build(found.config).double()
        net.load_state_dict(found.state)
        objective = from_facts(found.facts["method"])
        objective.norm_p, objective.norm_eps = settings["norm_p"], settings["norm_eps"]
        x, t, r, interval = golden["x"], golden["t"], golden["r"], (golden["t_min"], golden["t_max"])
        asked = x, t, t - r, golden["label"], 1 / golden["omega"]
        table.check(f"{name} u", net(*asked, interval=interval).value, golden["forward/u"])
        if found.config.v_head:
            v = net(*asked, interval=interval, head="both")[1]
            table.check(f"{name} v", v.value, golden["forward/v"])
            check_mit_loss(table, name, net, objective, golden)
        guided = partial(net, interval=(sampling["t_min"], sampling["t_max"]))
        noise = golden["noise"] / settings["noise_scale"]
        wanted = Condition(golden["label"], sampling["omega"], found.config.null)
        for nfe in (1, 2):
            got = sample(guided, noise, wanted, nfe, objective)
            table.check(f"{name} sample in {nfe} steps", got, golden[f"sample/{nfe}"])


def check_mit_loss(table: Table, case: str, net: MiT, objective: IMF, golden: dict[str, Tensor]) -> None:
    t, r, null = golden["t"], golden["r"], net.config.null
    label = torch.where(golden["dropped"], null, golden["label"])
    interval = golden["t_min"], golden["t_max"]
    floor = net.config.t_floor if net.config.output == "x" else 0.0
    told = golden["omega"], golden["label"], null, interval, floor
    drawn = Draw(golden["x"], golden["noise"], (t, r), label, *told)
    x_t = drawn.at(t)
    v_c, v_g = objective.velocities(net, x_t, drawn)
    v = net(x_t, t, t - r, label, 1 / drawn.w, interval=interval, head="both")[1].value
    loss = objective.loss(net, None, drawn)
    loss.total.mean().backward()
    values = {"v_t": drawn.velocity_at(t), "v_guided": v_g, "v_c": v_c, "v": v, "total": loss.total}
    values |= {"u": loss.evaluated["F"], "du_dt": loss.evaluated["dF_dt"]}
    values |= {f"error_{head}": loss.terms[term].value for head, term in (("u", "error"), ("v", "error_v"))}
    for name, value in values.items():
        table.check(f"{case} {name}", value, golden[f"loss/{name}"])
    grads = {name.removeprefix("grad/"): x for name, x in golden.items() if name.startswith("grad/")}
    grads, mine = rename(grads), dict(net.named_parameters())
    assert grads.keys() == mine.keys(), "the parameters with a gradient differ"
    for name, p in mine.items():
        table.check(f"{case} grad {name}", p.grad, grads[name])


def check_folder(folder: Path) -> Table:
    """Runs every check for every case of the folder."""
    cases = sorted(path.name.removesuffix("_io.npz") for path in folder.glob("*_io.npz"))
    if not cases:
        raise SystemExit(f"parity: {folder} holds no <case>_io.npz")
    table = Table()
    for case in cases:
        if case.startswith("objectives_"):
            check_objectives(table, folder, case)
        elif case.startswith("sit_"):
            check_sit(table, folder, case)
        elif (config := load_case(folder, case)["config"]).get("kind") in ("imf", "pmf"):
            check_mit(table, folder, case, config)
        else:
            parts = load_case(folder, case)
            for check in (check_forward, check_loss, check_training, check_sampler):
                check(table, case, parts)
    if (folder / "sample_ts.npz").exists():
        check_times(table, folder)
    return table


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the golden data: CASE_io.npz and what belongs to it")
    table = check_folder(parser.parse_args(arguments).folder)
    sys.stdout.write(f"{table}\n")
    sys.exit(1 if table.failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
