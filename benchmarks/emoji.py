"""Train one-step emoji for a given time, with a resume in the middle, and score them.

    python -m benchmarks.emoji tvm --minutes 7 --out FOLDER       (or flow_matching, or detached)
    python -m benchmarks.emoji agree --steps 500 --out FOLDER

The first stops the run at half of the time as a preemption would, starts the same command again, makes
weights of the last checkpoint, samples, and leaves summary.json, train.jsonl, results.jsonl, metrics.png and
samples.png. The second trains as the YAML says (compiled, bf16, Triton) and in fp32 PyTorch, with the same
draws, and compares the mean losses of the last tenth.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.device import environment
from eval.report import read_log
from eval.score import make_extractor, open_reference
from recipe.config import TrainConfig, load_config
from recipe.resume import PREEMPTED, newest

OBJECTIVES = {
    "tvm": [],
    "flow_matching": ["objective.name=flow_matching"],
    "detached": ["objective.detach_jvp=true"],
}
DATA = Path("data/emoji32")
TRAIN = ("-m", "composer.cli.launcher", "-n", "1", "recipe/train.py")
REFERENCE = (
    "import kernels, sys; kernels.set_backend('reference'); from recipe.train import main; main(sys.argv[1:])"
)


def python(*arguments: object, expect: int = 0) -> None:
    """Run a command of the project, and insist on its exit status."""
    status = subprocess.run([sys.executable, *map(str, arguments)]).returncode
    if status != expect:
        raise SystemExit(f"{arguments} ended with {status}, not {expect}")


def prepare() -> None:
    """The pictures, and the classifier in whose features the distance is taken; both are kept."""
    if not (DATA / "train").is_dir():
        python("-m", "streaming_convert", "emoji", "--size", 32, "--out", DATA)
    make_extractor("classifier", None, open_reference(str(DATA / "train")), str(DATA), torch.device("cpu"))


def train_and_score(objective: str, config: str, minutes: float, overrides: list[str], out: Path) -> dict:
    """One objective, `minutes` from start to stop, of which the process starts and compilation are a part."""
    prepare()
    run = Path("runs") / f"{Path(config).stem}_{objective}"
    settings = [f"run_name={run.name}", "duration=1000000ba", f"time_limit={int(30 * minutes)}sec"]
    settings += [*OBJECTIVES[objective], *overrides]
    for _ in range(2):
        python(*TRAIN, config, *settings, expect=PREEMPTED)
    with newest(load_config(TrainConfig, config, settings)) as (checkpoint, _):
        python("-m", "eval.export", checkpoint, "--out", run / "weights" / "last-ema")
    sweep = ["composer.cli.launcher", "-n", 1, "eval/sweep.py", "yamls/eval/emoji32.yaml", f"folder={run}"]
    python("-m", *sweep, f"weights=[{run}/weights/last-ema]", f"extractor_weights={DATA}/classifier")
    for name in ("train.jsonl", "results.jsonl", "metrics.png", "samples.png"):
        shutil.copy(run / name, out)
    return summary(run)


def summary(run: Path) -> dict[str, Any]:
    """What the log and the sweep say."""
    log = read_log(run / "train.jsonl")
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    memory = log.get("memory/peak_allocated_mem")
    return {
        "steps": int(log["step"][-1]),
        "train_seconds": round(3600 * log["time/train"][-1], 1),
        "images_per_second_median": round(float(np.nanmedian(log["throughput/samples_per_sec"])), 1),
        "peak_allocated_gib": None if memory is None else float(np.nanmax(memory)),
        "skipped_steps": float(np.nanmax(log["train/skipped_steps"])),
        "frechet_distance": {row["nfe"]: round(row["frechet_distance"], 3) for row in results},
        "floor_H": round(results[0]["floor"], 3),
    }


def agree(config: str, steps: int, overrides: list[str]) -> dict[str, Any]:
    """The mean loss over the last tenth of the steps, in the precision of the YAML and in fp32 PyTorch."""
    prepare()
    means = {}
    plain = ["precision=fp32", "parallel.compile=false"]
    for name, program, options in (
        ("as_configured", TRAIN, []),
        ("fp32_reference", ("-c", REFERENCE), plain),
    ):
        run = Path("runs") / f"{Path(config).stem}_{name}"
        shutil.rmtree(run, ignore_errors=True)
        settings = [f"run_name={run.name}", f"duration={steps}ba", "log.interval=1", *overrides, *options]
        python(*program, config, *settings)
        means[name] = float(read_log(run / "train.jsonl")["loss/train/total"][-max(1, steps // 10) :].mean())
    return {**means, "ratio": means["as_configured"] / means["fp32_reference"], "allowed": "0.97 to 1.03"}


def main() -> None:
    """Prints the result and writes it to OUT/summary.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=(*OBJECTIVES, "agree"))
    parser.add_argument("--config", default="yamls/emoji32.yaml")
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "agree":
        result = agree(args.config, args.steps, overrides)
    else:
        result = train_and_score(args.what, args.config, args.minutes, overrides, args.out)
    command = "python -m benchmarks.emoji " + " ".join(sys.argv[1:])
    result = {"what": args.what, **result, **environment(), "command": command}
    (args.out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
