"""What resuming, saving and leaving cost the digits run, with S3 on loopback: `python -m benchmarks.resume`.

resume: from the start of the launcher to the end of the first step; exit: from the end of the last step;
saving: what a checkpoint keeps training waiting, and its share of the time at the YAML's interval.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # run by path, too, this checkout's code goes before what is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipe.config import TrainConfig, load_config
from recipe.storage import Folder
from tests.conftest import run
from tests.fakes import Cloud
from tests.test_cloud import Job

YAML = "yamls/digits.yaml"


def timed(
    cloud: Cloud, folder: Path, duration: int, *arguments: str
) -> tuple[float, float, float, list[dict[str, float]]]:
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


def main() -> None:
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


if __name__ == "__main__":
    main()
