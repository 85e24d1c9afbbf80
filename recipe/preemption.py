"""Ending early and going on later: SIGTERM, a time limit, a launcher that has gone."""

import logging
import os
import signal
import socket
import threading
import time

import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist

log = logging.getLogger(__name__)

PREEMPTED = 75  # exit status: saved before the end, start the same command again (EX_TEMPFAIL)
# Exit status: ended by SIGTERM, unsaved. Not 75, as the launcher signals all ranks when one has crashed, too,
# and who starts a run again on 75 would do so for ever.
UNSAVED = 128 + signal.SIGTERM
PATIENCE = 20.0  # seconds; Composer's launcher kills after 30


def ignore_sigterm(_worker: int) -> None:
    """Let a loader's worker ignore SIGTERM, which schedulers send it: training needs it for one more step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Preemption(Callback):
    """Ends training after the current step on SIGTERM to any rank, or `limit` (e.g. 86000sec) after start.

    So does the end of the launcher, which a second SIGTERM ends at once: no rank is left behind. Composer
    then saves a checkpoint; `stopped` tells the caller to exit with PREEMPTED. Where no step has ended yet,
    so that nothing can be lost, or none ends (see `overdue`), SIGTERM exits with UNSAVED.
    """

    def __init__(self, limit: str | None) -> None:
        self.limit = Time.from_timestring(limit).value if limit else float("inf")
        self.started = time.monotonic()
        self.signalled = self.stopped = False
        self.launcher = os.getppid() if "LOCAL_RANK" in os.environ else None
        self.step_began: float | None = self.started  # None between steps, where weights are written
        self.longest: float | None = None
        signal.signal(signal.SIGTERM, self.on_signal)
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        threading.Thread(target=self.watch, args=(reader, writer), daemon=True).start()

    def on_signal(self, *_: object) -> None:
        """Set a flag alone, since the state may be halfway through a step."""
        self.signalled = True

    def watch(self, signals: socket.socket, _writer: socket.socket) -> None:
        """Wait for SIGTERM on a thread, since a rank that waits for another does not get to its handlers."""
        while signal.SIGTERM not in signals.recv(1):
            pass
        arrived = time.monotonic()
        while not self.overdue(arrived):
            time.sleep(0.1)
        log.error("ended by SIGTERM without saving: no step has ended since; start the same command again")
        os._exit(UNSAVED)

    def overdue(self, arrived: float) -> bool:
        """Return True if, since signal and start, the step has lasted PATIENCE and twice the longest."""
        began, longest = self.step_began, self.longest  # once: the main thread changes them meanwhile
        if began is None:
            return False
        patience = 0.0 if longest is None else max(PATIENCE, 2 * longest)
        return time.monotonic() - max(arrived, began) > patience

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Note when a step begins."""
        self.step_began = time.monotonic()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Note that no step has begun: there was no batch left."""
        self.step_began = None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Ask all ranks, and stop if one was told to."""
        orphaned = self.launcher is not None and os.getppid() != self.launcher
        stop = self.signalled or orphaned or time.monotonic() - self.started > self.limit
        flag = state.device.tensor_to_device(torch.tensor([int(stop)]))
        dist.all_reduce(flag, "MAX")
        self.longest = max(self.longest or 0.0, time.monotonic() - self.step_began)
        self.step_began = None
        if flag.item() and state.timestamp < state.max_duration:
            self.stopped = True
            state.stop_training()
