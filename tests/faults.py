"""`make faults`: tries every fault on real processes and writes the table of docs/faults.md.

A case survives when the losses of all steps, and weights and averages at the end, have the bits of an
undisturbed run with as many ranks. `bytes lost` counts those of differing tensors, and 8 for each loss.

`python -m tests.faults costs` prints, for the digits run with S3 on loopback, the time from the start of the
launcher to the end of the first step after a resume, what a checkpoint keeps training waiting and its share
of the time at the YAML's interval, and the time from the end of the last step to the exit.
"""

import importlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipe.checkpoints import checkpoints
from recipe.config import TrainConfig, load_config
from recipe.manual import answer
from recipe.weights import load_weights
from storage import Folder
from tests.conftest import run
from tests.fakes import Cloud
from tests.test_cloud import Job, settings

STEPS, INTERVAL = 24, 4
YAML = "yamls/digits.yaml"
RUN = (f"duration={STEPS}ba", f"save_interval={INTERVAL}ba")


class Scene:
    """One storage service with the dataset in it, and the undisturbed runs to compare with."""

    def __init__(self, scheme, folder, digits):
        self.cloud, self.folder = Cloud(scheme, folder / "home"), folder
        os.environ.update(self.cloud.env)
        if scheme == "oci":
            importlib.import_module("tests.fakes.site.sitecustomize")
        data = Folder(self.cloud.uri("digits"))
        for file in digits.iterdir():
            if file.is_file():
                data.put(file.name, file)
        self.data, self.straight = data.uri, {}

    def job(self, name, ranks, *more):
        sharded = () if ranks == 1 else ("parallel.fsdp2=true",)
        save = self.cloud.uri(name)
        arguments = settings(self.folder / name, self.data, save, *RUN, *sharded, *more)
        return Job(self.cloud.env, *arguments, ranks=ranks)

    def finish(self, name, ranks, *more):
        """Runs to the end; returns the output."""
        status, output = self.job(name, ranks, *more).end()
        if status:
            raise AssertionError(f"{name}: exit status {status}\n{output}")
        return output

    def undisturbed(self, ranks):
        """Losses and tensors of a run that nothing happens to."""
        if ranks not in self.straight:
            self.finish(f"straight{ranks}", ranks)
            self.straight[ranks] = state(self.folder / f"straight{ranks}")
        return self.straight[ranks]

    def lost(self, name, ranks):
        """Bytes of weights and averages that differ from the undisturbed run's, and 8 for each such loss."""
        (expected, straight), (losses, tensors) = self.undisturbed(ranks), state(self.folder / name)
        steps = sum(losses.get(k) != v for k, v in expected.items())
        lost = sum(int((a != b).sum()) * 4 for a, b in zip(tensors, straight, strict=True))
        return lost + 8 * steps


def state(folder):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    nets = [load_weights(folder / f"weights/ba{STEPS:07d}-{average}")[0] for average in ("ema", "net")]
    return (
        {row["step"]: row["loss/train/total"] for row in rows},
        [t.clone() for net in nets for t in net.state_dict().values() if t.dtype == torch.float32],
    )


def data_file(ranks):
    """Rank 0's share of a checkpoint."""
    return "__0_0.distcp" if ranks > 1 else "rank0.pt"


def kill_at(scene, name, ranks, moment):
    """SIGKILL to the launcher and all ranks when the file that ends with `moment` starts to be uploaded, or
    so many seconds after the first checkpoint."""
    job = scene.job(name, ranks)
    seconds = moment if isinstance(moment, float) else None
    first = []

    def watch(method, path):
        if method != "PUT":
            return
        if seconds is None:
            if path.endswith(moment):
                job.kill()
        elif "ep0-ba4" in path and not first:
            first.append(time.time())

    scene.cloud.faults.watch = watch
    while job.process.poll() is None:
        time.sleep(0.01)
        if first and time.time() - first[0] > seconds:
            job.kill()
    scene.cloud.faults.heal()
    job.end()


def killed(scene, ranks):
    """Six kills in one run: three in uploads, three at random moments; then to the end."""
    name, draw = f"killed{ranks}", random.Random(ranks)
    data = data_file(ranks)
    moments = [f"ep0-ba4/{data}", "ep0-ba8/rank0.json", draw.random(), f"ep0-ba16/{data}"]
    for moment in [*moments, draw.random(), draw.random()]:
        kill_at(scene, name, ranks, moment)
    scene.finish(name, ranks)
    return scene.lost(name, ranks)


def preempted(scene, ranks):
    """SIGTERM to the launcher in the middle, exit status 75, then to the end."""
    name = f"preempted{ranks}"
    job = scene.job(name, ranks)
    moment = f"ep0-ba8/{data_file(ranks)}"
    scene.cloud.faults.watch = lambda method, path: (
        job.process.terminate() if method == "PUT" and path.endswith(moment) else None
    )
    status, output = job.end()
    scene.cloud.faults.heal()
    assert status == 75, (status, output)
    scene.finish(name, ranks)
    return scene.lost(name, ranks)


def truncated(scene, ranks):
    """The newest checkpoint is cut in half after a kill; the one before is used."""
    name = f"truncated{ranks}"
    kill_at(scene, name, ranks, "ep0-ba16/rank0.json")
    folder = Folder(scene.cloud.uri(name))
    newest = next(c for c in checkpoints(folder, folder.names()) if "rank0.json" in c.files)
    file = f"{newest.name}/{data_file(ranks)}"
    content = folder.read(file)
    folder.write(file, content[: len(content) // 2])
    output = scene.finish(name, ranks)
    assert "is damaged: not used" in output, output
    return scene.lost(name, ranks)


def flaky(scene, ranks):
    """30% of all requests fail: 503, reset, or half of the body."""
    scene.cloud.faults.rate, before = 0.3, scene.cloud.faults.failed
    scene.finish(f"flaky{ranks}", ranks)
    scene.cloud.faults.heal()
    assert scene.cloud.faults.failed > before
    return scene.lost(f"flaky{ranks}", ranks)


def elastic(scene, ranks):
    """2 ranks, then 1, then 2: 8 bytes for each step whose loss differs by more than 1e-5 (relative)."""
    for count, stop in ((2, "8ba"), (1, "16ba"), (ranks, f"{STEPS}ba")):
        scene.finish("elastic", count, "parallel.fsdp2=true", f"duration={stop}")
    expected, losses = scene.undisturbed(ranks)[0], state(scene.folder / "elastic")[0]
    return 8 * sum(abs(losses[k] / v - 1) > 1e-5 for k, v in expected.items())


CASES = [
    ("SIGKILL, 6 times, 3 of them in uploads", killed, (1, 2)),
    ("SIGTERM to the launcher", preempted, (1, 2)),
    ("newest checkpoint cut in half", truncated, (1, 2)),
    ("30% of requests fail (503, reset, half a body)", flaky, (1, 2)),
    ("2 ranks, 1, 2", elastic, (2,)),
]


HEAD = """# Faults

Made by `make faults`: the digits run of 24 steps, a checkpoint every 4, data and checkpoints in a bucket
(moto for S3, a fake service under the real `oci` SDK), through the launcher. Survived: the losses of all
steps, and weights and averages at the end, have the bits of an undisturbed run; for changing ranks,
losses within 1e-5.

| fault | storage | ranks | survived | bytes lost |
|---|---|---|---|---|
"""


def timed(cloud, folder, duration, *arguments):
    """(seconds to the first line of the log, from there to the last, from there to the exit, lines)."""
    log = folder / "train.jsonl"
    before, started, first, last, size = log.stat().st_size if log.exists() else 0, time.time(), None, None, 0
    job = Job(cloud.env, YAML, *arguments, f"duration={duration}ba")
    while job.process.poll() is None:
        time.sleep(0.02)
        now = log.stat().st_size if log.exists() else 0
        if now > max(before, size):
            size, last = now, time.time()
            first = first or last
    status, output = job.end()
    assert status == 0, output
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return first - started, last - first, time.time() - last, rows


def costs():
    """Two runs: one to have something to resume, one that is timed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cloud = Cloud("s3", folder)
        run("-m", "streaming_convert", "digits", "--out", folder / "digits")
        config = load_config(TrainConfig, YAML, [f"data.local={folder}/digits/train"])
        save = Folder(cloud.uri("run"))
        arguments = (f"folder={folder}/run", f"data.local={folder}/digits/train", f"save_folder={save.uri}")
        arguments += ("save_interval=30ba", "log.interval=1", "log.progress_bar=false")
        timed(cloud, folder / "run", 60, *arguments)
        resume, steps, leave, rows = timed(cloud, folder / "run", 150, *arguments)
        saving = max(row.get("time/checkpoint_seconds", 0) for row in rows[60:]) / 2  # after steps 90 and 120
        step = steps / 89
        interval = int(config.save_interval.removesuffix("ba"))
        print(f"resume {resume:.1f} s, exit {leave:.1f} s, saving {1000 * saving:.0f} ms of ", end="")
        share = 100 * saving / (saving + interval * step)
        print(f"{interval} steps of {1000 * step:.0f} ms: {share:.2f}%")


def table(path, schemes):
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        run("-m", "streaming_convert", "digits", "--out", f"{scratch}/digits")
        for scheme in schemes:
            folder = Path(scratch, scheme)
            scene = Scene(scheme, folder, Path(scratch, "digits/train"))
            for title, case, counts in CASES:
                for ranks in counts:
                    lost = case(scene, ranks)
                    rows.append(f"| {title} | {scheme}:// | {ranks} | {'no' if lost else 'yes'} | {lost} |")
                    Path(path).write_text(HEAD + "\n".join(rows) + "\n")


def main(arguments):
    answer(arguments, "python -m tests.faults PAGE.md [s3] [oci], or python -m tests.faults costs", __doc__)
    if arguments == ["costs"]:
        costs()
    else:
        table(arguments[0], arguments[1:] or ["s3", "oci"])


if __name__ == "__main__":
    main(sys.argv[1:])
