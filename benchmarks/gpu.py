"""All measurements of a GPU on one page: `make gpu`, or `python -m benchmarks.gpu [STAGE ...] [--out DIR]`.

    correctness           the compiled kernels against float64
    attention, step       their times and memory (benchmarks.attention, benchmarks.step), at the size of XL/2
    emoji_data            the pictures, and the classifier in whose features samples are scored
    emoji_tvm             one-step emoji after seven minutes of training, with a resume in the middle
    emoji_flow_matching   plain flow matching, trained for the same time
    emoji_agree           whether compiled bf16 Triton and fp32 PyTorch train alike from the same draws

A stage is stopped after ten minutes; its result is DIR/STAGE.json, its output DIR/STAGE.log. The same command
continues with the stages whose results are missing, or from another GPU or commit. DIR/report.md puts what
`recipe.plan` predicts beside what was measured; DIR/files holds data and runs and may be deleted afterwards.
`--tiny` debugs the stages on a CPU, on digits: its figures mean nothing.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

from benchmarks import environment
from benchmarks.attention import BOTH_BAR, FORWARD_BAR
from benchmarks.step import measure_variants, predicted
from eval import command_line
from eval.reference import open_images
from eval.report import read_lines, read_log
from recipe.checkpoints import newest_checkpoint, own_checkpoints
from recipe.config import TrainConfig, load_config
from recipe.preemption import PREEMPTED
from recipe.reference import make_extractor
from storage import Folders
from storage.outside import read_json

ROOT = Path(__file__).parent.parent
LIMIT = 600
AGREEMENT = (0.97, 1.03)
LAUNCH = ("-m", "composer.cli.launcher", "-n", "1")
TRAIN = (*LAUNCH, "recipe/train.py")
PLAIN = "import kernels, recipe.train, sys; kernels.set_backend('reference'); recipe.train.main(sys.argv[1:])"
Result = dict[str, Any]
Row = tuple[str, str, str, str]  # of the page: what, predicted, measured, bar


class Size(NamedTuple):
    """The arguments of each stage's commands and their lengths. A YAML is followed by its overrides."""

    tests: tuple[str, ...] = ("-m", "gpu")
    attention: tuple[str, ...] = ()
    step: tuple[str, ...] = ("yamls/imagenet256_w2.yaml", "data.batch_size=32")
    pictures: tuple[str, ...] = ("emoji", "--size", "32")
    train: tuple[str, ...] = ("yamls/emoji32.yaml",)
    sweep: tuple[str, ...] = ("yamls/eval/emoji32.yaml",)
    minutes: float = 7
    agree_steps: int = 500


TINY_MODEL = ("model.preset=null", "model.size=8", "model.width=16", "model.depth=1", "model.heads=2")
TINY_MODEL += ("data.batch_size=16", "parallel.compile=false", "microbatch=null")
TINY = Size(
    tests=("-k", "reference"),
    attention=("--interpret",),
    step=("yamls/imagenet256_w2.yaml", *TINY_MODEL),
    pictures=("digits",),
    train=("yamls/digits.yaml", *TINY_MODEL),
    sweep=("yamls/eval/digits.yaml", "nfe=[1,2]", "samples=100"),
    minutes=0.4,
    agree_steps=20,
)


def python(*arguments: object, expect: int | None = 0) -> None:
    """Run a command of the project. Raises SystemExit unless it ends with status `expect` (None: any)."""
    status = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT).returncode
    if expect not in (None, status):
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {status}, not {expect}")


def number(value: float | None, spec: str, absent: str = "not measured") -> str:
    """Return the formatted value, or `absent` for None."""
    return absent if value is None else format(value, spec)


def compare(what: str, prediction: float | None, value: float | None, spec: str) -> Row:
    """Return a row whose two figures have the same format, without a bar."""
    return what, number(prediction, spec, "not predicted"), number(value, spec), ""


def step_rows(variants: dict[str, Result]) -> Iterator[Row]:
    """Yield rows with time, memory and share of the peak of each variant of a step."""
    for name, row in variants.items():
        guess = row["predicted"]
        yield compare(f"step, {name}, s", guess.get("seconds"), row.get("seconds"), ".3f")
        yield compare(f"step, {name}, peak GiB", guess.get("peak_gib"), row.get("peak_gib"), ".1f")
        yield f"step, {name}, share of the peak FLOP/s", "", number(row.get("share_of_peak"), ".1%"), ""


def attention_rows(row: Result) -> Iterator[Row]:
    """Yield rows with the error, and the times of attention in units of flash SDPA."""
    what = "attention, B, H, N, D = " + ", ".join(map(str, row["size"]))
    yield f"{what}: error", "", f"{row['error']:.1e}", f"{row['tolerance']:.0e}"
    times = row.get("times", {})
    for part, bar in (("forward_ms", FORWARD_BAR), ("both_ms", BOTH_BAR)):
        own, flash = (times.get(peer, {}).get(part) for peer in ("ours", "flash SDPA"))
        title = f"{what}: {part.removesuffix('_ms')}, ms"
        ratio = f" ({own / flash:.2f} of flash SDPA)" if own and flash else ""
        yield title, "not predicted", number(own, ".3f") + ratio, f"{bar} of flash SDPA"


def emoji_rows(name: str, result: Result) -> Iterator[Row]:
    """Yield rows with speed, memory and distances of a run."""
    guess, name = result["predicted"], name.replace("_", ", ", 1)
    speed = result["batch"] / guess["seconds"] if guess else None
    yield compare(f"{name}: images/s", speed, result["images_per_second_median"], ".0f")
    yield compare(f"{name}: peak GiB", guess.get("peak_gib"), result["peak_allocated_gib"], ".1f")
    yield f"{name}: steps in {result['train_seconds']:.0f} s", "", str(result["steps"]), ""
    for nfe, distance in result["frechet_distance"].items():
        unit = f"{distance:.2f} = {distance / result['floor_H']:.1f} H"
        yield f"{name}: Frechet distance, NFE {nfe}", "", unit, ""


def correctness(size: Size, out: Path) -> Result:
    """Run the tests of the kernels. The bar is missed if one fails or none ran."""
    file = out / "correctness.xml"
    python("-m", "pytest", "tests/test_kernels.py", *size.tests, f"--junitxml={file}", expect=None)
    suite = ElementTree.parse(file).getroot().find("testsuite")
    tests, skipped, *bad = (int(suite.get(key)) for key in ("tests", "skipped", "failures", "errors"))
    ran, wrong = tests - skipped, sum(bad)
    missed = [f"{wrong} of {ran} tests failed"] if wrong or not ran else []
    page = [("kernels' tests that failed", "", f"{wrong} of {ran}", "0")]
    return {"page": page, "missed": missed}


def attention(size: Size, out: Path) -> Result:
    """Measure attention and its peers."""
    file = out / "attention.json"
    python("-m", "benchmarks.attention", *size.attention, "--out", file, expect=None)
    result = read_json(file)
    missed = [f"{row['size']}: {what}" for row in result["rows"] for what in row.get("missed", [])]
    page = [line for row in result["rows"] for line in attention_rows(row)]
    return {**result, "page": page, "missed": missed}


def step(size: Size, out: Path) -> Result:
    """Measure whole training steps."""
    yaml, *overrides = size.step
    result = measure_variants(yaml, overrides)
    missed = [f"{name}: {row['error']}" for name, row in result["variants"].items() if "error" in row]
    return {**result, "page": list(step_rows(result["variants"])), "missed": missed}


def emoji_data(size: Size, out: Path) -> Result:
    """Make shards and classifier in OUT/files/data."""
    data = out / "files/data"
    python("-m", "streaming_convert", *size.pictures, "--out", data)
    images = open_images(str(data / "train"))
    make_extractor("classifier", None, images, str(data), "cpu")
    return {"page": [("pictures", "", str(len(images)), "")], "missed": []}


def new_run(size: Size, out: Path, name: str) -> tuple[Path, list[str]]:
    """Return the folder of a new run, deleted if it existed, and the overrides that select it."""
    run = out / "files" / name
    shutil.rmtree(run, ignore_errors=True)
    return run, [*size.train[1:], f"run_name={name}", f"folder={run}", f"data.local={out}/files/data/train"]


def train_and_score(name: str, override: str, size: Size, out: Path) -> Result:
    """Train for `size.minutes`, with starts and compilation, preempted at half of it, then score samples."""
    run, settings = new_run(size, out, name)
    settings += ["duration=1000000ba", f"time_limit={int(30 * size.minutes)}sec", override]
    yaml = size.train[0]
    for _ in range(2):
        python(*TRAIN, yaml, *settings, expect=PREEMPTED)
    config = load_config(TrainConfig, yaml, settings)
    folders = Folders()
    point = own_checkpoints(config, folders, folders[config.save_folder].names())
    with newest_checkpoint(config.folder, point, folders) as found:
        python("-m", "eval.export", found.load_path, "--out", run / "weights/last-ema")
    data = out / "files/data"
    sweep = [*size.sweep, f"folder={run}", f"weights=[{run}/weights/last-ema]", f"reference={data}/train"]
    python(*LAUNCH, "eval/sweep.py", *sweep, f"extractor_weights={data}/classifier")
    for file in ("train.jsonl", "results.jsonl", "metrics.png", "samples.png"):
        shutil.copy(run / file, out / f"{name}_{file}")
    result = summary(run, config)
    return {**result, "page": list(emoji_rows(name, result)), "missed": []}


def summary(run: Path, config: TrainConfig) -> Result:
    """Return the results of a run from its log and its sweep."""
    log = read_log(run / "train.jsonl")
    results = read_lines(run / "results.jsonl")
    memory = log.get("memory/peak_allocated_mem")
    steps, seconds = int(log["step"][-1]), 3600 * log["time/train"][-1]
    # A run shorter than the window of Composer's monitor has no rate but its mean
    rate = log.get("throughput/samples_per_sec", steps * config.data.batch_size / seconds)
    return {
        "predicted": predicted(config, environment()["device"]),
        "batch": config.data.batch_size,
        "steps": steps,
        "train_seconds": round(seconds, 1),
        "images_per_second_median": round(float(np.nanmedian(rate)), 1),
        "peak_allocated_gib": None if memory is None else float(np.nanmax(memory)),
        "skipped_steps": float(np.nanmax(log["train/skipped_steps"])),
        "frechet_distance": {row["nfe"]: round(row["frechet_distance"], 3) for row in results},
        "floor_H": round(results[0]["floor"], 3),
    }


def emoji_agree(size: Size, out: Path) -> Result:
    """Compare the mean loss over the last tenth of the steps as configured with that of fp32 PyTorch."""
    means = {}
    plain = ["precision=fp32", "parallel.compile=false"]
    for name, program, options in (("as_configured", TRAIN, []), ("fp32_reference", ("-c", PLAIN), plain)):
        run, settings = new_run(size, out, name)
        steps = [f"duration={size.agree_steps}ba", "log.interval=1"]
        python(*program, size.train[0], *settings, *steps, *options)
        losses = read_log(run / "train.jsonl")["loss/train/total"]
        means[name] = float(losses[-size.agree_steps // 10 :].mean())
    ratio = means["as_configured"] / means["fp32_reference"]
    low, high = AGREEMENT
    missed = [] if low <= ratio <= high else [f"the ratio of the losses is {ratio:.3f}"]
    page = [("loss, as configured / fp32 PyTorch", "", f"{ratio:.3f}", f"{low} to {high}")]
    return {**means, "page": page, "missed": missed}


STAGES = {
    "correctness": correctness,
    "attention": attention,
    "step": step,
    "emoji_data": emoji_data,
    "emoji_tvm": partial(train_and_score, "emoji_tvm", "objective.name=tvm"),
    "emoji_flow_matching": partial(train_and_score, "emoji_flow_matching", "objective.name=flow_matching"),
    "emoji_agree": emoji_agree,
}


def result_of(out: Path, stage: str) -> Result | None:
    """Return the result of a finished stage on this device and by this commit, or None."""
    file, where = out / f"{stage}.json", environment()
    result = read_json(file) if file.is_file() else {}
    same = "minutes" in result and all(result[key] == where[key] for key in ("device", "commit"))
    return result if same else None


def run_here(stage: str, size: Size, out: Path) -> None:
    """Run one stage in this process and write OUT/STAGE.json."""
    began = time.monotonic()
    for suffix in ("json", "xml"):
        (out / f"{stage}.{suffix}").unlink(missing_ok=True)
    result = STAGES[stage](size, out)
    minutes = round((time.monotonic() - began) / 60, 1)
    part = out / f"{stage}.part"
    part.write_text(json.dumps({**result, **environment(), "minutes": minutes}, indent=1) + "\n")
    part.replace(out / f"{stage}.json")


def run_apart(stage: str, out: Path, tiny: bool) -> str:
    """Run one stage in its own process. Returns why it did not finish, or an empty string."""
    options = ["--out", str(out), "--here", *(["--tiny"] if tiny else [])]
    command, log = [sys.executable, "-m", "benchmarks.gpu", stage, *options], out / f"{stage}.log"
    with log.open("w") as file:
        where = {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **where, start_new_session=True)
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return f"still ran after {LIMIT} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if not status:
        return ""
    last = log.read_text().strip().rpartition("\n")[2]
    return f"{last or status}; see {log.name}"


def report(out: Path, failed: dict[str, str]) -> list[str]:
    """Write OUT/report.md. Returns the stages and bars that were missed, failed or not run."""
    lines, problems = ["| | predicted | measured | bar |", "|---|---:|---:|---|"], []
    for stage in STAGES:
        result = result_of(out, stage)
        if result is not None:
            lines += [f"| {' | '.join(row)} |" for row in result["page"]]
            problems += [f"{stage}: {what}" for what in result["missed"]]
        else:
            problems.append(f"{stage}: {failed.get(stage, 'not run')}")
    where = environment()
    head = "# {device}, {date}\n\nCommit {commit}, torch {torch}, Triton {triton}. ".format(**where)
    head += "Predicted by `recipe.plan` under the assumptions of docs/scale.md.\n"
    ending = [f"* {problem}" for problem in problems] or ["Every stage finished, every bar was met."]
    (out / "report.md").write_text("\n".join([head, *lines, "", *ending, ""]))
    return problems


def main(arguments: list[str]) -> int:
    """Run the command line; 1 if the page lacks anything or a bar is missed, 2 without device or checkout."""
    parser = command_line("benchmarks.gpu", __doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/GPU-DATE")
    parser.add_argument("--tiny", action="store_true", help="debug the stages on a CPU")
    parser.add_argument("--here", action="store_true", help="in this process, without limit or page")
    args = parser.parse_args(arguments)
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(STAGES)}")
    if not torch.cuda.is_available() and not args.tiny:
        sys.stderr.write("No CUDA device: nothing measured. --tiny debugs the stages without one.\n")
        return 2
    if not (ROOT / "tests").is_dir():
        sys.stderr.write(f"{ROOT} holds no tests/: run benchmarks.gpu in a checkout of the project.\n")
        return 2
    where, size = environment(), TINY if args.tiny else Size()
    name = "tiny" if args.tiny else where["device"].replace(" ", "-")
    out = (args.out or ROOT / "benchmarks/results" / f"{name}-{where['date']}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = args.stages or list(STAGES)
    if args.here:
        for stage in stages:
            run_here(stage, size, out)
        return 0
    failed: dict[str, str] = {}
    for stage in stages:
        if result_of(out, stage) is None:
            sys.stdout.write(f"{stage}: see {out / stage}.log\n")
            sys.stdout.flush()
            failed[stage] = run_apart(stage, out, args.tiny)
        problems = report(out, failed)
        if any(problem.startswith("correctness:") for problem in problems) and "correctness" in stages:
            break  # the speed of wrong kernels does not matter
    sys.stdout.write("\n".join([f"{out}/report.md", *problems, ""]))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
