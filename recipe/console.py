"""What a run says on the console: a bar in a terminal, lines elsewhere, and at last where results are."""

import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.loggers.progress_bar_logger import ProgressBarLogger

from recipe import commands
from recipe.config import TrainConfig
from recipe.optimizer import in_steps
from storage.manifest import Manifest

log = logging.getLogger("recipe.train")
EVERY = 20.0  # seconds between lines, at least


class Bar(ProgressBarLogger):
    """Composer's progress bar without a state.

    A checkpoint would bring back the length of the past run's bar, and a sharded one made without a bar could
    not be loaded with one.
    """

    def state_dict(self) -> dict:
        """Return nothing to save: the bar follows from the step and the duration."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Keep nothing of what was saved."""

    def fit_start(self, state: State, logger: Logger) -> None:
        """Build the bar also in mid-epoch, where no epoch starts, at the step of the resume."""
        super().fit_start(state, logger)
        self.epoch_start(state, logger)
        if self.train_pbar is not None:
            self.train_pbar.pbar.initial = int(getattr(state.timestamp, self.train_pbar.timestamp_key))
            self.train_pbar.update_to_timestamp(state.timestamp)


class ConsoleLines(LoggerDestination):
    """Logs a line of progress with every line of train.jsonl that comes `EVERY` seconds after the last one.

    Speed and time left are measured since that line, from the end of this start's first step on.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.metrics: dict[str, Any] = {}
        self.since: tuple[float, int] | None = None  # the time and the step of the last line
        self.said = False

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep the newest value of each metric."""
        self.metrics.update(metrics)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log a line where it is due."""
        now, step = time.monotonic(), int(state.timestamp.batch)
        if self.since is None:
            self.since = now, step
        seconds, done = now - self.since[0], step - self.since[1]
        late = seconds >= EVERY or not self.said
        if step % self.config.log.interval or not done or not late:
            return
        batch, each = self.config.data.batch_size, seconds / done
        last = in_steps(self.config.duration, len(state.train_dataloader), batch)
        loss, rate = (float(self.metrics[name]) for name in ("loss/train/total", "train/learning_rate"))
        log.info(
            f"{self.config.run_name}: step {step} of {last}, loss {loss:.4f}, learning rate {rate:.3g}, "
            f"{batch / each:,.0f} samples/s, {timedelta(seconds=round((last - step) * each))} left"
        )
        self.since, self.said = (now, step), True


def summary(config: TrainConfig, manifest: Manifest, step: int) -> str:
    """Return where a finished run left its results, and the commands that go on with them: to draw samples of
    the weights, and, of pixels, to score all exports in a report.
    """
    folder = Path(config.folder)
    exports = [folder / f"weights/ba{step:07d}-{average}" for average in config.export]
    weights = next((str(path) for path in exports if path.with_suffix(".json").exists()), None)
    here = {"samples": folder / "samples", "numbers": folder / "train.jsonl"}
    places = {"weights": weights} if weights else {}
    places |= {name: str(path) for name, path in here.items() if path.exists()}
    places["checkpoints"] = config.save_folder
    if weights:
        ask = ["--prompts", "a few words"] if config.model.text is not None else []
        ask += ["--vae", config.grid.vae] if manifest.column == "latents" and config.grid.vae else []
        ask += ["--nfe", "1", "--out", f"{folder}/grid.png"]
        places["next, to draw samples"] = commands.module("eval.sample", weights, *ask)
    if weights and manifest.column == "image":
        yaml = commands.short(commands.YAMLS / "eval/digits.yaml")
        keys = f"folder={folder}", f"weights=[{folder}/weights]", f"reference={config.data.source}"
        places["next, for scores and a report"] = commands.composer("eval/sweep.py", yaml, *keys)
    return "\n".join(f"  {name}: {place}" for name, place in places.items())
