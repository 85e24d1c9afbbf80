"""Programs of the project as forks of one process that has imported everybody else's modules already.

Importing torch, Composer and what these import takes a core eight seconds, and the tests start hundreds of
programs. Each is a process of its own with its own modules of this project, as if Python had started it.
"""

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from composer.utils.misc import get_free_tcp_port

OTHERS = ["composer", "streaming", "omegaconf", "pydantic", "diffusers", "matplotlib.pyplot", "scipy.stats"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(OTHERS)


def become(arguments, cwd, env, files):
    """Run `python ARGUMENTS` in this process, which leads a session of its own."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # TMPDIR may be another one
    multiprocessing.set_start_method("fork", force=True)  # as Python sets it for whoever is started alone
    for number, (path, stream) in enumerate(zip(files, ("stdout", "stderr"), strict=True), 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        setattr(sys, stream, os.fdopen(number, "w", buffering=1, closefd=False))
    faulthandler.enable()
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(":"))]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out


def environments(ranks):
    """What Composer's launcher tells each rank; a program alone is told nothing."""
    if ranks is None:
        return [{}]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = get_free_tcp_port()
    each = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in one.items()} for one in each]


def end(processes, sign):
    """Send a signal to every process and its children, and wait for them."""
    for process in processes:
        if process.is_alive():
            os.killpg(process.pid, sign)
        process.join()


def run(arguments, cwd, env, ranks, patience):
    """Run `python ARGUMENTS`, alone or as so many ranks, of which the first failure ends all.

    Returns the one that failed, or rank 0, as a completed process with its output as text.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [(f"{folder}/{rank}.out", f"{folder}/{rank}.err") for rank in range(ranks or 1)]
        processes = [
            FORKS.Process(target=become, args=(arguments, str(cwd), env | more, paths))
            for more, paths in zip(environments(ranks), files, strict=True)
        ]
        for process in processes:
            process.start()
        running, late = list(processes), time.monotonic() + patience
        while running and not any(process.exitcode for process in processes):
            if not wait([process.sentinel for process in running], late - time.monotonic()):
                end(processes, signal.SIGABRT)  # every process of the program says where it hangs
            running = [process for process in running if process.is_alive()]
        end(processes, signal.SIGKILL)
        first = next((i for i, process in enumerate(processes) if process.exitcode), 0)
        said = (Path(path).read_text() if Path(path).exists() else "" for path in files[first])
        return subprocess.CompletedProcess(arguments, processes[first].exitcode, *said)
